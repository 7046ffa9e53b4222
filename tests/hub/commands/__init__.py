"""Command lines of `unirefiner` against the loopback Hub."""
