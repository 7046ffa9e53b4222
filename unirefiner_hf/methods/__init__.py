"""The refinement methods: each a module whose forward gives a loss and its parts."""
