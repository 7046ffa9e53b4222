"""What a run leaves and what is published of it: folders, checkpoints, cards, graphs."""
