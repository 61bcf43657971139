"""The maths, in the plainest form: every row against every matrix. Memory grows with M E."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, " E"], turned: bool):
    """y[m] = x[m] @ w[e] for the group e that row m is in, 0 behind the last group; `turned`: w is E F D."""
    w = w.swapaxes(1, 2) if turned else w
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    own = (rows < ends) & (rows >= ends - group_sizes)
    live = jnp.any(own, axis=1, keepdims=True)  # 0 times NaN must not reach anything
    wide = jnp.promote_types(x.dtype, jnp.float32)
    each = jnp.einsum("md,edf->mef", jnp.where(live, x, 0).astype(wide), w.astype(wide))
    return jnp.sum(jnp.where(own[:, :, None], each, 0), axis=1)
