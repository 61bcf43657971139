"""Every backend of attention against float64, forward and backward, over shapes, types, masks and spoiled padding.

A program is what compiles: shapes, types and what is static in a mask. What it is run on is drawn.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_in_float64 import NAMES, assert_close, exact
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.experimental.pallas import tpu as pltpu

from kernels import Mask, attention
from kernels.attention import xla


@contextlib.contextmanager
def sizes(**constants: int):
    """The xla backend with other constants."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in constants.items():
            patch.setattr(xla, name, size)
        yield


# Many pieces, blocks and remainders from little text.
SMALL = dict(BLOCK_LOGITS=64, MIN_BLOCK=5, MIN_PIECE=12)
# What is held against float64: the name of a backend, and what to trace it in.
RUNS = {
    "reference": ("reference", contextlib.nullcontext),
    "xla": ("xla", contextlib.nullcontext),
    "small blocks": ("xla", functools.partial(sizes, **SMALL)),
    "a head at a time": ("xla", functools.partial(sizes, TOGETHER=0)),
    "a head of a row at a time": ("xla", functools.partial(sizes, TOGETHER=0, ROWS_LOGITS=0, **SMALL)),
    "tpu": ("tpu", pltpu.force_tpu_interpret_mode),
}


class Program(NamedTuple):
    """Lengths T and S, heads N and K, head dims H and V; of the mask, what is static and which fields are drawn."""

    lengths: tuple[int, int]
    heads: tuple[int, int]
    widths: tuple[int, int]
    static: Mask = Mask()
    drawn: tuple[str, ...] = ()
    softcap: float | None = None
    sinks: bool = False
    dtype: str = "float32"


PROGRAMS = {
    "full": Program((23, 23), (2, 2), (64, 64)),
    "causal": Program((23, 23), (4, 1), (72, 72), Mask(causal=True)),
    "packed": Program((23, 23), (4, 2), (80, 80), Mask(causal=True), ("q_segment_ids",)),
    "window, packed": Program((23, 23), (3, 1), (96, 96), Mask(causal=True, window=4), ("q_segment_ids",)),
    "window wider than the text": Program((23, 29), (2, 1), (8, 8), Mask(causal=True, window=100), ("kv_length",)),
    "cached": Program((5, 29), (2, 1), (192, 128), Mask(causal=True, q_offset=7), ("kv_length",), sinks=True),
    "cached, array": Program((23, 29), (2, 1), (8, 5), Mask(causal=True, window=4), ("q_offset", "kv_length")),
    "one query": Program((1, 29), (8, 2), (8, 8), Mask(causal=True), ("q_offset", "kv_length"), softcap=2.0),
    "one key": Program((29, 1), (2, 2), (8, 8), Mask(causal=True, q_offset=-3), ("prefix_length",)),
    "static lengths": Program((23, 29), (2, 1), (8, 8), Mask(causal=True, window=3, prefix_length=5, kv_length=11)),
    "prefix": Program((23, 23), (2, 2), (128, 128), Mask(causal=True), ("prefix_length", "q_segment_ids")),
    "blocks": Program(
        (23, 23), (2, 1), (8, 8), Mask(causal=True, window=3), ("block_ids", "q_segment_ids"), sinks=True
    ),
    "two sides": Program((13, 29), (2, 2), (256, 256), Mask(), ("q_segment_ids", "kv_segment_ids"), 2.0, True),
    "bfloat16": Program((23, 23), (4, 1), (64, 64), Mask(causal=True), ("q_segment_ids",), dtype="bfloat16"),
    "bfloat16, all": Program(
        (23, 29), (4, 2), (72, 72), Mask(causal=True, window=9), ("q_offset", "kv_length"), 2.0, True, "bfloat16"
    ),
}
# These are cut in all ways that there are: many programs, so only what needs it.
ONLY = {
    "small blocks": (
        "window, packed",
        "cached, array",
        "static lengths",
        "prefix",
        "blocks",
        "two sides",
        "bfloat16, all",
    ),
    "a head at a time": ("packed", "two sides", "bfloat16, all"),
    "a head of a row at a time": ("packed", "blocks", "two sides", "bfloat16, all"),
}
# Interpreted, a case takes seconds. The TPU's kernels want widths in eights.
SLOW = {("tpu", name) for name in PROGRAMS}
CASES = [
    pytest.param(run, name, marks=[pytest.mark.slow] * ((run, name) in SLOW))
    for run in RUNS
    for name in ONLY.get(run, PROGRAMS)
    if run != "tpu" or not any(width % 8 for width in PROGRAMS[name].widths)
]
BATCH = 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class Inputs(NamedTuple):
    qkv: tuple
    mask: Mask
    sinks: np.ndarray | None
    cotangents: tuple


@st.composite
def inputs(draw, program: Program):
    (queries, keys), (heads, kv_heads), (width, v_width) = program.lengths, program.heads, program.widths
    fields = {
        "q_offset": arrays(np.int32, BATCH, elements=st.integers(-3, keys)),
        "kv_length": arrays(np.int32, BATCH, elements=st.integers(0, keys + 2)),
        "prefix_length": arrays(np.int32, BATCH, elements=st.integers(0, keys + 2)),
        "q_segment_ids": segments(queries),
        "kv_segment_ids": segments(keys),
        "block_ids": segments(queries),
    }
    static = {name: getattr(program.static, name) for name in Mask.__dataclass_fields__}
    mask = Mask(**static | {name: draw(fields[name]) for name in program.drawn})
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return rng.standard_normal((BATCH, *shape)).astype(jnp.dtype(program.dtype))

    q, k, v = normal(queries, heads, width), normal(keys, kv_heads, width), normal(keys, kv_heads, v_width)
    d_out, d_lse = normal(queries, heads, v_width), normal(queries, heads).astype(np.float32)
    if draw(st.booleans()):  # padding holds NaN, and is told NaN
        hidden = np.zeros((BATCH, keys), bool)
        if mask.q_segment_ids is not None:
            padding = mask.q_segment_ids == 0
            q[padding], d_out[padding], hidden = np.nan, np.nan, mask.key_segments == 0
        if mask.kv_length is not None:
            hidden |= np.arange(keys) >= np.reshape(mask.kv_length, (-1, 1))
        k[hidden], v[hidden] = np.nan, np.nan
    sinks = rng.standard_normal(heads).astype(np.float32) if program.sinks else None
    return Inputs((q, k, v), mask, sinks, (d_out, d_lse))


def segments(length: int):
    """Ids from 0 to 3 for each row, documents side by side or anyhow."""
    ids = arrays(np.int32, (BATCH, length), elements=st.integers(0, 3))
    return st.one_of(ids, ids.map(lambda x: np.sort(x, axis=1)))


@functools.cache
def compiled(run: str, **options):
    """What gives output, log-sum-exp and gradients by this backend."""
    backend, context = RUNS[run]

    def everything(qkv, mask, sinks, cotangents):
        def forward(q, k, v, sinks):
            return attention(q, k, v, mask, sinks=sinks, return_lse=True, backend=backend, **options)

        with context():
            outputs, pull = jax.vjp(forward, *qkv, sinks)
            values = *outputs, *pull(cotangents)
        return dict(zip(NAMES, values[: 5 if sinks is None else 6], strict=False))

    return jax.jit(everything)


@pytest.mark.parametrize(("run", "name"), CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_everything_is_as_in_float64(run, name, data):
    program = PROGRAMS[name]
    drawn = data.draw(inputs(program))
    found = compiled(run, logit_softcap=program.softcap)(*drawn)
    assert found["out"].dtype == found["d_q"].dtype == program.dtype and found["lse"].dtype == np.float32
    expected = exact(drawn.qkv, drawn.mask, drawn.cotangents, None, program.softcap, drawn.sinks)
    assert_close({"lse": found["lse"]}, {"lse": expected["lse"]}, 1e-5)
    assert_close(found, expected, TOLERANCE[program.dtype])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(run, sign):
    # Whole numbers: float32 holds these logits exactly, so that all that differs is the softmax.
    rng = np.random.default_rng(2)
    q, k, v, d_out = (rng.standard_normal((1, 21, heads, 8), np.float32) for heads in (4, 2, 2, 4))
    q, k = np.round(q * 20), np.round(k * 20)
    q[0, :3], k[0, :3] = 25 * sign, 50
    assert np.abs(np.einsum("btnh,bsnh->bnts", q[:, :, :2], k)).max() == 10_000
    drawn = (q, k, v), Mask(causal=True), None, (d_out, d_out[..., 0])
    expected = exact(drawn[0], drawn[1], drawn[3], scale=1.0)
    assert_close(compiled(run, scale=1.0)(*drawn), expected, 1e-5)


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] * (run == "tpu")) for run in RUNS])
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
def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(run, mask):
    rng = np.random.default_rng(4)
    q, k, v, d_out = (rng.standard_normal((2, 20, heads, 8), np.float32) for heads in (4, 2, 2, 4))
    found = compiled(run)((q, k, v), mask, None, (d_out, d_out[..., 0]))
    assert np.isneginf(found.pop("lse")).all()
    for name, value in found.items():
        assert not np.asarray(value).any(), name


@pytest.mark.parametrize("run", RUNS)
def test_causality_shows_in_the_gradients(run):
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((1, 19, heads, 8), np.float32) for heads in (2, 1, 1))
    for t in (0, 7, 18):
        d_out = np.zeros_like(q)
        d_out[0, t] = 1
        found = compiled(run)((q, k, v), Mask(causal=True), None, (d_out, d_out[..., 0]))
        for name in ("d_k", "d_v"):
            touched = np.abs(found[name][0]).sum((1, 2)) > 0
            assert touched[: t + 1].all() and not touched[t + 1 :].any(), name


@pytest.mark.parametrize("together", [1, 2, 3], ids="{} rows".format)
def test_rows_that_go_together_keep_their_own_masks(together):
    rng = np.random.default_rng(7)
    q, k, v, d_out = (rng.standard_normal((6, 17, heads, 8), np.float32) for heads in (4, 2, 2, 4))
    mask = Mask(
        causal=True, kv_length=np.array([3, 17, 0, 9, 12, 5]), q_segment_ids=np.sort(rng.integers(0, 3, (6, 17)))
    )
    cotangents = d_out, d_out[..., 0]

    @jax.jit
    def everything(*qkv):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, return_lse=True, backend="xla"), *qkv)
        return dict(zip(NAMES[:5], (*out, *pull(cotangents)), strict=True))

    with sizes(TOGETHER=0, ROWS_LOGITS=together * 17 * 17):
        assert_close(everything(q, k, v), exact((q, k, v), mask, cotangents), 1e-5)
