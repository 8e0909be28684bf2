"""Careful reading and writing of files: folders, images, tars, and the output of a run."""
