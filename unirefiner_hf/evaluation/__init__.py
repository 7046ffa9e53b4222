"""Measuring towers: linear probes on tasks, label-free cleanliness, pictures."""
