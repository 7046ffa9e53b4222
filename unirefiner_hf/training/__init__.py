"""Training a refinement: data, arguments, trainer."""
