"""Images of every kind and source: one reading of pixels for all that use them."""
