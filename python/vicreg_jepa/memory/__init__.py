"""The persistent memory of a world model that plans: what was seen, where, when, and what came of
it, kept in one file and found again by embedding or by place.

memory.py has what a controller calls. reader.py and writer.py read and write a store. rows.py has
what is remembered, stored.py how the database holds it. scan.py has the exact search, index.py the
interface of any search; usearch_index.py and qdrant_index.py are other packages' indexes behind it.
eviction.py decides what goes when the space ends. database.py has the SQLite file: its schema, its
versions and its errors. report.py checks a store and says what it holds.
"""
