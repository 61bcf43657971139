"""Models: nnx modules that hold parameters and say what the maths is."""
