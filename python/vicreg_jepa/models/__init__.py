"""The networks: a transformer (vit.py) and the masks of its tokens, a convolutional encoder."""
