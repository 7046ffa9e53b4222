"""Injected artifacts: spurious tokens planted by a known rule, and who finds them."""
