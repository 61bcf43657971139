"""Generation: a prompt is run once into a cache, then tokens are decoded one by one in a compiled loop."""

from vishwamai.generation.engine import Generation, generate
from vishwamai.generation.prompts import left_padded
from vishwamai.generation.sampling import Sampling

__all__ = ["Generation", "Sampling", "generate", "left_padded"]
