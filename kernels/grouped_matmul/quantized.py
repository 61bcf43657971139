"""Matrices in 8 bits with scales, as inference holds them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


class QuantizedMatrices(NamedTuple):
    """One matrix per group: `values` times `scales`, one for each column of the product or one for everything."""

    values: Num[Array, "E D F"]  # E F D where it is used transposed
    scales: Float[Array, "E F"] | Float[Array, ""]

    def spread(self, transpose_w: bool) -> Float[Array, "E 1 F"] | Float[Array, "E F 1"]:
        """The scales as they multiply the values."""
        groups, *sides = self.values.shape
        scales = jnp.broadcast_to(self.scales.astype(jnp.float32), (groups, sides[0 if transpose_w else 1]))
        return jnp.expand_dims(scales, 2 if transpose_w else 1)

    def dequantized(self, transpose_w: bool, dtype: jnp.dtype) -> Float[Array, "E D F"]:
        return (self.values.astype(jnp.float32) * self.spread(transpose_w)).astype(dtype)


def check(w: QuantizedMatrices, transpose_w: bool) -> None:
    """Raises ValueError or TypeError for scales that do not fit or values that are not 8 bits wide."""
    if w.values.dtype not in DTYPES:
        raise TypeError(f"quantized values must be one of {', '.join(DTYPES)}, found {w.values.dtype}")
    columns = (w.values.shape[0], w.values.shape[1 if transpose_w else 2])
    if w.scales.shape not in ((), columns):
        raise ValueError(
            f"scales must be a number or have shape {columns}, one for each column of each group's product, "
            f"found {w.scales.shape}"
        )
