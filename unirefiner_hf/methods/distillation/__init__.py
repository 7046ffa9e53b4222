"""The self-distillation baseline: UniRefiner's steps without registers and filters."""
