"""The ops that a method computes with: those of vicreg_kernels (fused.py) or plain PyTorch
(reference.py).
"""
