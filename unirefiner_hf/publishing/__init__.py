"""From a run to a checkpoint others can load."""
