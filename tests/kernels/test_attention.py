"""`attention` as its callers meet it: packing, decoding, memory, the log and what is refused.

Its numbers are proven in test_attention_grid.py.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_in_float64 import assert_close, exact

from kernels import Mask, attention, backends


def inputs(seed: int, batch: int, length: int, heads: int, kv_heads: int, width: int):
    draw = np.random.default_rng(seed).standard_normal
    return [draw((batch, length, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def test_the_reference_computes_in_float64():
    """So that what has no plain formula can be held against it."""
    qkv = [x.astype(np.float64) for x in inputs(0, 2, 9, 4, 2, 5)]
    mask = Mask(causal=True, q_segment_ids=np.array([[1, 1, 1, 2, 2, 3, 0, 0, 0], [0, 0, 4, 4, 4, 4, 4, 4, 4]]))
    cotangents = np.ones((2, 9, 4, 5)), np.ones((2, 9, 4))
    with jax.enable_x64(True):
        run = jax.jit(lambda *x: attention(*x, mask, return_lse=True, backend="reference"))
        (out, lse), pull = jax.vjp(run, *qkv)
        found = dict(zip(("out", "lse", "d_q", "d_k", "d_v"), (out, lse, *pull(cotangents)), strict=True))
        assert all(x.dtype == np.float64 for x in found.values())
    assert_close(found, exact(qkv, mask, cotangents), 1e-13)


def test_packed_documents_are_as_if_alone():
    lengths = (5, 1, 12)
    q, k, v = inputs(7, 1, 20, 4, 2, 8)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    packed = jax.jit(attention)(q, k, v, Mask(causal=True, window=7, q_segment_ids=segments))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = jax.jit(attention)(q[:, part], k[:, part], v[:, part], Mask(causal=True, window=7))
        np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=1e-6)
        start += length
    assert not packed[:, start:].any()


def test_one_token_at_a_time_is_the_whole_text():
    q, k, v = inputs(8, 2, 9, 4, 2, 8)
    whole = jax.jit(attention)(q, k, v, Mask(causal=True, window=4))
    step = jax.jit(lambda q, offset: attention(q, k, v, Mask(causal=True, window=4, q_offset=offset)))
    for t in range(9):
        np.testing.assert_allclose(step(q[:, t : t + 1], jnp.array(t))[:, 0], whole[:, t], rtol=0, atol=1e-6)


SEGMENTS = np.ones((1, 1), int)
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "packed": Mask(q_segment_ids=SEGMENTS),
    "causal, packed": Mask(causal=True, q_segment_ids=SEGMENTS),
    "window, packed": Mask(causal=True, window=1024, q_segment_ids=SEGMENTS),
}


@pytest.mark.parametrize("name", MASKS)
def test_32k_tokens_need_no_square_buffer(name):
    length, heads = 32 * 1024, 4
    q = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    mask = jax.tree.map(lambda ids: jax.ShapeDtypeStruct((1, length), jnp.int32), MASKS[name])

    def loss(q, k, v, mask):
        return jnp.sum(jnp.square(attention(q, k, v, mask)))

    # The forward is part of it.
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, kv, kv, mask).compile()
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
        (
            {"backend": "flash"},
            ValueError,
            "no backend 'flash'; there are: auto, tpu, cudnn, mosaic_gpu, xla, reference",
        ),
        ({"k": (1, 4, 3, 8), "v": (1, 4, 3, 8)}, ValueError, "multiple of the key heads"),
        ({"k": (1, 4, 2, 9)}, ValueError, "q and k also H"),
        ({"v": (1, 5, 2, 8)}, ValueError, "k and v also S and K"),
        ({"q": (4, 4, 8)}, ValueError, "must be B T N H"),
        ({"k": (1, 0, 2, 8), "v": (1, 0, 2, 8)}, ValueError, "must not be empty"),
        ({"logit_softcap": 0.0}, ValueError, "must be positive, found 0.0"),
        ({"max_logit": np.ones(4, np.float32)}, ValueError, r"one number for all heads, found shape \(4,\)"),
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
