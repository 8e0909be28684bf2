"""Many processes: ranks.py says which this one is, launch.py joins them, sharding.py and
batchnorm.py put a model on them.
"""
