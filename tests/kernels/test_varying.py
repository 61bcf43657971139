"""Inside a `jax.shard_map` that checks over which axes arrays vary, on 4 simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import Mask, attention, decode_attention, grouped_matmul
from kernels.attention.gpu.mosaic import refusal as attention_gpu
from kernels.attention.tpu import refusal as attention_tpu
from kernels.decode_attention.tpu import refusal as decoding_tpu
from kernels.grouped_matmul.gpu.backend import refusal as grouped_gpu
from kernels.grouped_matmul.tpu.backend import refusal as grouped_tpu

RNG = np.random.default_rng(0)


def split(f, of_arguments):
    """f by devices, each with its part of the arguments that say so; the others are the same on all."""
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=of_arguments, out_specs=P("d")))


def drawn(*shapes):
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


def assert_same(f, of_arguments, arguments, wanted):
    """Value and gradients; `wanted` is the whole on one device."""
    whole, parts = (jax.vjp(g, *arguments) for g in (wanted, split(f, of_arguments)))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5, atol=1e-5)
    (cotangent,) = drawn(whole[0].shape)
    for found, expected in zip(parts[1](cotangent), whole[1](cotangent), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_the_gradient_of_what_all_devices_share_is_the_sum_of_theirs(backend):
    q, k, v, sinks = drawn((4, 12, 2, 4), (1, 12, 1, 4), (1, 12, 1, 4), (2,))

    def each(q, k, v, sinks):
        return attention(q, k, v, Mask(causal=True, window=5), sinks=sinks, backend=backend)

    def whole(q, k, v, sinks):
        k, v = (jnp.repeat(x, 4, axis=0) for x in (k, v))
        return each(q, k, v, sinks)

    assert_same(each, (P("d"), P(), P(), P()), (q, k, v, sinks), whole)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_experts_that_all_devices_share(backend):
    x, w = drawn((40, 6), (2, 6, 3))
    sizes = jnp.array([4, 5])

    def each(x, w):
        return grouped_matmul(x, w, sizes, backend=backend)

    def whole(x, w):
        return jnp.concatenate([each(part, w) for part in jnp.split(x, 4)])

    assert_same(each, (P("d"), P()), (x, w), whole)


def test_pallas_kernels_are_left_alone():
    """They would have to say how what they give varies."""
    q, varying = drawn((1, 8, 2, 64), (4, 8, 2, 64))
    x, sizes = q.reshape(16, 64), jnp.array([8, 8])
    said = []

    def ask(k):  # the queries and the rows are alike on all devices
        arguments = q, k, k, Mask(), 1.0, None, None
        said.extend(refusal(*arguments) for refusal in (attention_tpu, attention_gpu, decoding_tpu))
        w = jnp.tile(k[0, 0, 0], (2, 64, 1))
        said.extend(refusal(x, (w,), sizes, False, None) for refusal in (grouped_tpu, grouped_gpu))
        return k

    split(ask, P("d"))(varying)
    assert len(said) == 5 and all("need check_vma=False" in reason for reason in said)


def test_a_cache_that_all_devices_share():
    q, k = drawn((4, 2, 2, 4), (1, 2, 30, 4))

    def each(q, k):
        return decode_attention(q, k, k, Mask(causal=True, q_offset=7))

    whole = decode_attention(q, *[jnp.repeat(k, 4, axis=0)] * 2, Mask(causal=True, q_offset=7))
    np.testing.assert_allclose(split(each, (P("d"), P()))(q, k), whole, rtol=1e-5, atol=1e-6)
