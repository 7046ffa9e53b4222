"""The Hub: a run in progress, a published model, and the proof that it is whole."""
