"""What the border of register patches is filled with."""

FILLS = ("zero", "randn", "rand", "learnable")
"""Names of the fills, see `UniRefinerConfig`."""

__all__ = ["FILLS"]
