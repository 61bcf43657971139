"""`decode_attention` split over 8 simulated devices: what one device gives, and nothing is gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels import Mask, decode_attention
from kernels.attention.sharding import over_mesh
from kernels.decode_attention import tpu
from kernels.decode_attention.quantized import quantize

P = PartitionSpec
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
B, T, N, S, H = 4, 2, 8, 40, 8
RAGGED = Mask(causal=True, window=30, q_offset=np.array([3, 37, 20, -9]), kv_length=np.array([40, 38, 9, 40]))
PACKED = Mask(
    causal=True,
    q_offset=np.array([30, 38, 20, 11]),
    prefix_length=np.array([0, 4, 0, 2]),
    q_segment_ids=np.array([[1, 1], [2, 0], [1, 2], [0, 0]]),
    kv_segment_ids=np.repeat([[0, 1, 2]], [10, 20, 10], axis=1).repeat(B, axis=0),
)
ROWS, HEADS, BOTH = P("data"), P(None, None, "tensor"), P("data", None, "tensor")
FOUR = P(("data", "fsdp"), None, "tensor")


def inputs(kv_heads: int, cache=None):
    draw = np.random.default_rng(0).standard_normal
    q, k, v, sinks = (draw(shape) for shape in ((B, T, N, H), (B, kv_heads, S, H), (B, kv_heads, S, 5), (N,)))
    q, k, v, sinks = (jnp.asarray(x, jnp.float32) for x in (q, k, v, sinks))
    return q, *((k, v) if cache is None else (quantize(x, cache) for x in (k, v))), sinks


def mesh_of(**axes: int):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def placed(mesh, spec, q, k, v, mask, sinks):
    """As generation keeps them: a cache whose heads can't be split is whole."""
    rows, _, heads = (*spec, None, None, None)[:3]
    kv_heads = jax.tree.leaves(k)[0].shape[1]
    keys = P(rows, heads if kv_heads % (mesh.shape[heads] if heads else 1) == 0 else None)
    at = functools.partial(NamedSharding, mesh)
    put = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, at(spec)), tree)  # noqa: E731
    return put(q, spec), put(k, keys), put(v, keys), put(mask, P(rows)), put(sinks, P(heads))


CASES = {
    "rows": (dict(data=4), ROWS, 4, RAGGED, None),
    "heads": (dict(tensor=4), HEADS, 4, PACKED, None),
    "both": (dict(data=2, fsdp=2, tensor=2), FOUR, 2, RAGGED, None),
    "both, int8": (dict(data=2, fsdp=2, tensor=2), FOUR, 4, PACKED, jnp.int8),
    "fewer key heads than devices": (dict(tensor=8), HEADS, 2, RAGGED, None),
    "fewer key heads than devices, float8": (dict(data=2, tensor=4), BOTH, 2, PACKED, "float8_e4m3fn"),
    "nothing, as rows can't be": (dict(data=8), P(), 4, RAGGED, None),
}  # fmt: skip


@pytest.mark.parametrize("axes, spec, kv_heads, mask, cache", CASES.values(), ids=CASES.keys())
def test_it_is_what_one_device_gives(axes, spec, kv_heads, mask, cache):
    *qkv, sinks = inputs(kv_heads, cache)
    expected = decode_attention(*qkv, mask, sinks=sinks, logit_softcap=3.0, backend="reference")
    mesh = mesh_of(**axes)

    def run(q, k, v, mask, sinks):
        return decode_attention(q, k, v, mask, sinks=sinks, logit_softcap=3.0, spec=spec)

    with jax.set_mesh(mesh):
        arguments = placed(mesh, spec, *qkv, mask, sinks)
        program = jax.jit(run).lower(*arguments).compile()
    assert not [name for name in COLLECTIVES if re.search(rf"\b{name}(-start)?\(", program.as_text())]
    found = program(*arguments)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_the_tpu_kernel_takes_its_share():
    q, k, v, sinks = inputs(2, jnp.int8)
    expected = decode_attention(q, k, v, RAGGED, sinks=sinks, backend="reference")
    kernel = functools.partial(tpu.decode_attention, blocks=tpu.Blocks(1, 128), interpret=True)
    with jax.set_mesh(mesh_of(data=2, tensor=4)):
        run = functools.partial(over_mesh, kernel, BOTH, heads_first=True)
        found = jax.jit(lambda *x: run(*x, H**-0.5, None, sinks))(q, k, v, RAGGED)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "spec", "kv_heads", "message"),
    [
        ({"data": 8}, P("data"), 4, "B = 4 is not divisible by the 8 devices"),
        ({"data": 8}, P("rows"), 4, r"no axes \['rows'\]; it has {'data': 8}"),
        ({"tensor": 4}, P(None, "tensor"), 4, "splits T = 2 new tokens: they read the whole cache"),
    ],
)
def test_what_can_not_be_split_is_refused(axes, spec, kv_heads, message):
    *qkv, _ = inputs(kv_heads)
    with jax.set_mesh(mesh_of(**axes)), pytest.raises(ValueError, match=message):
        decode_attention(*qkv, spec=spec)


def test_three_key_heads_can_not_be_split_over_two_devices():
    q, k = np.zeros((1, 1, 12, 8), np.float32), np.zeros((1, 3, 9, 8), np.float32)
    with jax.set_mesh(mesh_of(tensor=2)), pytest.raises(ValueError, match="3 key heads can't be split over the 2"):
        decode_attention(q, k, k, spec=HEADS)
