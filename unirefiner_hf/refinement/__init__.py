"""The refinement methods: modules with one forward that returns a loss and its parts."""
