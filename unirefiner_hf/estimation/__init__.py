"""What a refinement will take, counted on tensors without data."""
