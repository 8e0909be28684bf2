"""A thin trainer for joint-embedding models, on the public API of vicreg_kernels.

config/ says what a run is made of, methods/ holds what can be trained, training/ trains it;
evaluation/ and surprise/ say what was learned, compare/ times it, and demo/ shows it all. Below
them are data/, distributed/, ops/, models/ and files/; physics/ simulates videos.
"""
