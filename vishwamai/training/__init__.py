"""Training: a pure step (state, batch) -> (state, metrics), and the loop around it."""
