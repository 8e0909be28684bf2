"""The data of the batches.

sources.py opens the data that the settings name: images (image_sets.py in memory, image_files.py on
disk) or videos (videos.py, video_decoders.py, video_containers.py). batches.py chooses the samples
of each step.
"""
