"""Where batches come from.

sources.py opens what the settings name: images (image_sets.py in memory, image_files.py on the
disk) or videos (videos.py, video_decoders.py, video_containers.py); batches.py says what a step
takes.
"""
