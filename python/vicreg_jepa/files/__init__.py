"""Files, read and written with care: what a folder holds, pictures, tars, and what a run writes."""
