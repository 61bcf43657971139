"""How exactly matrices are multiplied."""

import jax.numpy as jnp
from jax import lax


def precision(dtype) -> lax.Precision:
    """Float32 is multiplied as such: by default TPUs round it to bfloat16 and GPUs to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
