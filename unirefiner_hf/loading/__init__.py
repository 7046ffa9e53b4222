"""From a name or a folder to a backbone with its processor and its adapter."""
