"""The refinement methods, a room each: settings (no torch) and the training objective.

A method is a subclass of `MethodSettings` that names its `Objective`, and a line in
`registry.METHODS`.
"""
