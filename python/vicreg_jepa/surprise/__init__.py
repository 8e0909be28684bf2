"""Measures the surprise of a video model: curves of a video, the physics test, tables and
pictures.
"""
