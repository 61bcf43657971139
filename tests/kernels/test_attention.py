"""`attention` against plain maths in float64, forward and backward, over shapes, masks and types."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Mask, attention, backends
from kernels.attention import xla

NAMES = ("out", "lse", "d_q", "d_k", "d_v", "d_sinks")


@contextlib.contextmanager
def small_blocks():
    """Many pieces, blocks and remainders from little text."""
    sizes = {"BLOCK_LOGITS": 64, "MIN_BLOCK": 3, "MIN_PIECE": 10}
    before = {name: getattr(xla, name) for name in sizes}
    try:
        for name, size in sizes.items():
            setattr(xla, name, size)
        yield
    finally:
        for name, size in before.items():
            setattr(xla, name, size)


def inputs(seed: int, batch: int, queries: int, keys: int, heads: int, kv_heads: int, width: int, v_width: int = 0):
    draw = np.random.default_rng(seed).standard_normal
    q, k = draw((batch, queries, heads, width)), draw((batch, keys, kv_heads, width))
    return [x.astype(np.float32) for x in (q, k, draw((batch, keys, kv_heads, v_width or width)))]


def everything(qkv, mask=None, sinks=None, backend="auto", **options):
    """Output, log-sum-exp and the gradients of a loss that weighs both."""

    def loss(q, k, v, sinks):
        out, lse = attention(q, k, v, mask, sinks=sinks, return_lse=True, backend=backend, **options)
        weights = jnp.cos(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
        seen = jnp.where(jnp.isfinite(lse), lse, 0) * jnp.sin(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)
        return jnp.sum(weights * out.astype(lse.dtype)) + jnp.sum(seen), (out, lse)

    run = jax.value_and_grad(loss, (0, 1, 2) if sinks is None else (0, 1, 2, 3), has_aux=True)
    (_, outputs), gradients = jax.jit(run)(*qkv, sinks)
    return dict(zip(NAMES, (*outputs, *gradients), strict=False))


def exact(qkv, mask=None, sinks=None, **options):
    """The same from the reference in float64."""
    wide = [np.asarray(x).astype(np.float64) for x in qkv]
    with jax.enable_x64(True):
        sinks = None if sinks is None else np.asarray(sinks, np.float64)
        found = everything(wide, mask, sinks, "reference", **options)
        assert all(x.dtype == np.float64 for x in found.values())
        return {name: np.asarray(x) for name, x in found.items()}


def assert_close(found: dict, expected: dict, tolerance: float):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours = np.asarray(found[name]).astype(np.float64)
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(value), err_msg=name)
        ours, value = (np.where(np.isneginf(value), 0, x) for x in (ours, value))
        # A sum that cancels to (almost) nothing is measured against the size of what it sums.
        error, size = np.abs(ours - value).max(), max(np.abs(value).max(), 0.1)
        assert error <= tolerance * size, f"{name}: off by {error:.2e}, largest value {size:.2e}"


def by_hand(q, k, v, mask_rows, scale):
    """Loops, no matrices: the reference's own reference."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(k.shape[1]) if mask_rows[b][i][j]]
        logits = [scale * float(q[b, i, n] @ k[b, j, n // group]) for j in keys]
        weights = np.exp(np.array(logits) - max(logits, default=0))
        for weight, j in zip(weights, keys, strict=True):
            out[b, i, n] += weight / weights.sum() * v[b, j, n // group]
    return out


def test_the_reference_is_what_loops_give():
    q, k, v = (x.astype(np.float64) for x in inputs(0, 2, 3, 4, 4, 2, 5, 6))
    rows = np.array([[[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]])
    mask = Mask(
        q_segment_ids=np.array([[1, 0, 3], [2, 2, 2]]),
        kv_segment_ids=np.array([[1, 2, 2, 1], [1, 2, 3, 4]]),
    )
    rows[0, 2] = 0  # a segment without keys
    with jax.enable_x64(True):
        out = attention(q, k, v, mask, scale=0.3, backend="reference")
    np.testing.assert_allclose(out, by_hand(q, k, v, rows, 0.3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("blocks", [small_blocks, contextlib.nullcontext])
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(blocks, sign):
    # Whole numbers: float32 holds these logits exactly, so that all that differs is the softmax.
    q, k, v = inputs(2, 1, 21, 21, 4, 2, 4)
    q, k = np.round(q * 20), np.round(k * 20)
    q[0, :3], k[0, :3] = 50 * sign, 50
    mask = Mask(causal=True)
    with blocks():
        found = everything((q, k, v), mask, scale=1.0)
    assert np.abs(np.einsum("btnh,bsnh->bnts", q[:, :, :2], k)).max() == 10_000
    assert_close(found, exact((q, k, v), mask, scale=1.0), 1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
def test_bfloat16_keeps_float32_statistics(heads):
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in inputs(3, 2, 65, 65, *heads, 64)]
    mask = Mask(causal=True, q_segment_ids=np.repeat([[1, 2, 3, 4, 0]], 13, axis=1).repeat(2, axis=0))
    found = everything(qkv, mask)
    assert found["out"].dtype == found["d_k"].dtype == jnp.bfloat16 and found["lse"].dtype == jnp.float32
    expected = exact(qkv, mask)
    assert_close({"lse": found["lse"]}, {"lse": expected["lse"]}, 1e-5)
    assert_close(found, expected, 1e-2)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(kv_length=0),
        Mask(kv_length=np.array([0, 0])),
        Mask(causal=True, q_offset=-99),
        Mask(causal=True, q_offset=np.array([-99, -50])),
        Mask(q_segment_ids=np.zeros((2, 20), int)),
        Mask(q_segment_ids=np.ones((2, 20), int), kv_segment_ids=np.full((2, 20), 2)),
    ],
    ids=["no keys", "no keys, array", "before all", "before all, array", "padding", "other segment"],
)
def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(mask, backend):
    found = everything(inputs(4, 2, 20, 20, 4, 2, 8), mask, backend=backend)
    assert np.isneginf(found.pop("lse")).all()
    for name, value in found.items():
        assert not np.asarray(value).any(), name


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_nan_in_padding_reaches_nothing(backend):
    q, k, v = inputs(5, 2, 30, 30, 4, 2, 8)
    segments = np.repeat([[1, 1, 0], [2, 3, 3]], 10, axis=1)
    mask = Mask(causal=True, q_segment_ids=segments, kv_length=np.array([30, 25]))
    dead = (segments == 0) | (np.arange(30) >= np.array([[30], [25]]))
    spoiled = [np.where((segments == 0)[..., None, None], np.nan, q)]
    spoiled += [np.where(dead[..., None, None], np.nan, x) for x in (k, v)]
    clean, found = everything((q, k, v), mask, backend=backend), everything(spoiled, mask, backend=backend)
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # Nor does a NaN that flows back into padding.
    d_out = jnp.where((segments == 0)[..., None, None], jnp.nan, jnp.ones_like(q))
    back = jax.jit(lambda *qkv: jax.vjp(lambda *x: attention(*x, mask), *qkv)[1](d_out))
    for gradient in back(q, k, v):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("blocks", [small_blocks, contextlib.nullcontext])
def test_causality_shows_in_the_gradients(blocks):
    qkv = inputs(6, 1, 19, 19, 2, 1, 8)
    with blocks():
        for t in (0, 7, 18):
            row = jax.grad(lambda *x, t=t: jnp.sum(attention(*x, Mask(causal=True))[0, t]), (0, 1, 2))
            _, d_k, d_v = jax.jit(row)(*qkv)
            for gradient in (d_k, d_v):
                touched = np.abs(gradient[0]).sum((1, 2)) > 0
                assert not touched[t + 1 :].any()
            assert (np.abs(d_v[0]).sum((1, 2)) > 0)[: t + 1].all()


def test_packed_documents_are_as_if_alone():
    lengths = (5, 1, 12)
    q, k, v = inputs(7, 1, 20, 20, 4, 2, 8)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    with small_blocks():
        packed = jax.jit(attention)(q, k, v, Mask(causal=True, window=7, q_segment_ids=segments))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = jax.jit(attention)(q[:, part], k[:, part], v[:, part], Mask(causal=True, window=7))
        np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=1e-6)
        start += length
    assert not packed[:, start:].any()


def test_one_token_at_a_time_is_the_whole_text():
    q, k, v = inputs(8, 2, 9, 9, 4, 2, 8)
    whole = jax.jit(attention)(q, k, v, Mask(causal=True, window=4))
    step = jax.jit(lambda q, offset: attention(q, k, v, Mask(causal=True, window=4, q_offset=offset)))
    for t in range(9):
        np.testing.assert_allclose(step(q[:, t : t + 1], jnp.array(t))[:, 0], whole[:, t], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(causal=True, window=1024)], ids=str)
def test_32k_tokens_need_no_square_buffer(mask):
    length, heads = 32 * 1024, 4
    q = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, segments):
        whole = Mask(mask.causal, mask.window, q_segment_ids=segments)
        return jnp.sum(jnp.square(attention(q, k, v, whole)))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, kv, kv, segments).compile()
    one_byte_a_logit = heads * length * length
    assert compiled.memory_analysis().temp_size_in_bytes < one_byte_a_logit / 8


def test_auto_says_once_what_it_took(caplog):
    backends._say_once.cache_clear()
    q = np.zeros((1, 4, 2, 8), np.float32)
    with caplog.at_level(logging.INFO, logger="kernels"):
        attention(q, q, q)
        attention(q, q, q)
    assert len(caplog.records) == 1 and "backend xla" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "flash"}, ValueError, "no backend 'flash'; there are: auto, cudnn, xla, reference"),
        ({"k": (1, 4, 3, 8), "v": (1, 4, 3, 8)}, ValueError, "multiple of the key heads"),
        ({"k": (1, 4, 2, 9)}, ValueError, "q and k also H"),
        ({"v": (1, 5, 2, 8)}, ValueError, "k and v also S and K"),
        ({"q": (4, 4, 8)}, ValueError, "must be B T N H"),
        ({"k": (1, 0, 2, 8), "v": (1, 0, 2, 8)}, ValueError, "must not be empty"),
        ({"logit_softcap": 0.0}, ValueError, "must be positive, found 0.0"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"shape \(4,\)"),
        ({"dtype": np.float16}, TypeError, "one of bfloat16, float32, float64, found float16, float32, float32"),
        ({"dtype": np.int32}, TypeError, "found int32"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    shapes = {"q": (1, 4, 4, 8), "k": (1, 4, 2, 8), "v": (1, 4, 2, 8)} | {x: change[x] for x in "qkv" if x in change}
    q, k, v = (np.zeros(shapes[x], np.float32) for x in "qkv")
    options = {name: value for name, value in change.items() if name not in ("q", "k", "v", "dtype")}
    with pytest.raises(error, match=message):
        attention(q.astype(change.get("dtype", q.dtype)), k, v, **options)
