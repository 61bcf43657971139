"""Products of float32 are asked for as such, whatever the chip's default is; those of bfloat16 are left as they are."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision
from jaxprs import precisions

from kernels import Mask, attention, decode_attention, grouped_matmul

Q, K = (2, 64, 4, 16), (2, 64, 2, 16)


def attend(q, k, v):
    return attention(q, k, v, Mask(causal=True), backend="xla")


def decode(q, k, v):
    return decode_attention(q[:, :2], k.swapaxes(1, 2), v.swapaxes(1, 2), Mask(kv_length=9), backend="xla")


def experts(x, w):
    return grouped_matmul(x, w, jnp.array([3, 4]), backend="xla")


def gradient(f):
    return jax.grad(lambda *arrays: f(*arrays).astype(jnp.float32).sum(), (0, 1))


@pytest.mark.parametrize(
    ("f", "shapes", "products"),
    [
        (attend, (Q, K, K), 1),
        (gradient(attend), (Q, K, K), 5),
        (decode, (Q, K, K), 2),
        (experts, ((7, 4), (2, 4, 3)), 1),
        (gradient(experts), ((7, 4), (2, 4, 3)), 3),
    ],
    ids=["attention", "its gradient", "decoding", "experts", "their gradient"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_multiplied_as_such(f, shapes, products, dtype):
    jaxpr = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).jaxpr
    found = list(precisions(jaxpr))
    assert len(found) >= products
    assert set(found) == {Precision.HIGHEST if dtype == "float32" else Precision.DEFAULT}
