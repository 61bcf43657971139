"""Generation: a prompt is run once into a cache, then tokens are decoded in a compiled loop."""

from vishwamai.generation.engine import Draft, Generation, generate
from vishwamai.generation.prompts import left_padded
from vishwamai.generation.sampling import Sampling

__all__ = ["Draft", "Generation", "Sampling", "generate", "left_padded"]
