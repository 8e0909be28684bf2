"""What every op stands on; nothing here imports an op."""
