"""How surprised a video model is: curves of a clip, the test of physics, tables and pictures."""
