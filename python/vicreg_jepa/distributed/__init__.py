"""Several processes: ranks.py has the rank of this one, launch.py connects them, sharding.py and
batchnorm.py distribute a model over them.
"""
