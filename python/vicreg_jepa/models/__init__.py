"""The networks: a transformer (vit.py) and the masks of its tokens, a convolutional encoder; for
world models, encoders of frames (frames.py) and predictors (dynamics.py, dynamics_transformer.py).
"""
