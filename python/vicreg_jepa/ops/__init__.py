"""What a method computes with: the ops of vicreg_kernels (fused.py) or plain PyTorch
(reference.py).
"""
