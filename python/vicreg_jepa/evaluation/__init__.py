"""Measures what an encoder has learned: features, probes of images and videos, signs of
collapse.
"""
