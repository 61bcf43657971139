"""Keys and values in eight bits: each vector has its own scale, so that one token's never changes another's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class QuantizedVectors(NamedTuple):
    """`values * scales[..., None]`."""

    values: Num[Array, "... H"]
    scales: Float[Array, "..."]

    def dequantized(self, dtype: Any = jnp.float32) -> Float[Array, "... H"]:
        return self.values.astype(dtype) * self.scales.astype(dtype)[..., None]


def quantize(x: Float[Array, "... H"], dtype: Any) -> QuantizedVectors:
    """Vectors of int8 or float8_e4m3fn with a float32 scale each, which takes the largest component to the type's end.

    A component is off by at most max|x| / 254 as int8, and as float8 by 1/16 of itself or max|x| / 458,752, whichever
    is more. A vector with a NaN or an infinity keeps none of its components: its scale is that.

    Raises:
        TypeError: any other dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        raise TypeError(f"keys and values are quantised to {' or '.join(LARGEST)}, found {name}")
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / LARGEST[name]
    scales = jnp.where(scales == 0, 1, scales)
    values = jnp.clip(wide / scales[..., None], -LARGEST[name], LARGEST[name])
    values = jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values
    return QuantizedVectors(values.astype(dtype), jax.lax.stop_gradient(scales))
