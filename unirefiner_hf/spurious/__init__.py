"""Finding spurious tokens: the filters of UniRefiner, usable without training."""
