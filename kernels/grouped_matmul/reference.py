"""The maths, in the plainest form: every row against every matrix. Memory grows with M E."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "M D"],
    matrices: tuple[Float[Array, "E D F"], ...],
    group_sizes: Int[Array, " E"],
    turned: bool,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "M F"]:
    """y[m] = x[m] @ w[e] for the group e that row m is in, 0 behind the last group; `turned`: w is E F D.

    With an activation there are two matrices for each group: y[m] = activation(x[m] @ gate[e]) * (x[m] @ w[e]).
    """
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    own = (rows < ends) & (rows >= ends - group_sizes)
    live = jnp.any(own, axis=1, keepdims=True)  # 0 times NaN must not reach anything
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, letters = jnp.where(live, x, 0).astype(wide), "md,efd->mef" if turned else "md,edf->mef"
    each = [jnp.einsum(letters, x, w.astype(wide), precision="highest") for w in matrices]
    y = each[0] if activation is None else activation(each[0]) * each[1]
    return jnp.sum(jnp.where(own[:, :, None], y, 0), axis=1)
