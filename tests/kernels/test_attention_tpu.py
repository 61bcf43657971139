"""The TPU's attention kernels in interpret mode against plain maths in float64, and the lists of blocks they visit."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_in_float64 import NAMES, assert_close, exact
from cases import quick_and_slow
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from kernels import Mask, attention
from kernels.attention import tpu
from kernels.attention.mask import visible
from kernels.attention.tpu import blocks, tuning
from kernels.attention.tpu.tuning import Sizes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.fixture
def small(monkeypatch):
    """Blocks of two tiles each way, two heads a step."""
    for kernel in ("forward", "backward"):
        sizes = Sizes(256, 256, 128, 128, heads=2, diagonal_keys=128)
        monkeypatch.setattr(tuning, kernel, lambda *arguments, sizes=sizes: sizes)


def inputs(seed, batch=2, queries=300, keys=None, heads=4, kv_heads=2, width=8, v_width=None):
    draw = np.random.default_rng(seed).standard_normal
    q, k = draw((batch, queries, heads, width)), draw((batch, keys or queries, kv_heads, width))
    return [x.astype(np.float32) for x in (q, k, draw((batch, keys or queries, kv_heads, v_width or width)))]


def everything(run, qkv, sinks=None):
    """Output, log-sum-exp and the gradients from cotangents of both; `run` gives out and lse."""
    (out, lse), pull = jax.vjp(jax.jit(run), *map(jnp.asarray, qkv), sinks)
    return dict(zip(NAMES, (out, lse, *pull(cotangents(out, lse))), strict=False))


def cotangents(out, lse):
    """Of any outputs of these shapes the same."""
    return tuple(np.random.default_rng(9).standard_normal(x.shape, np.float32).astype(x.dtype) for x in (out, lse))


def ours(qkv, mask=None, sinks=None, scale=0.3, logit_softcap=None, max_logit=None):
    mask = Mask() if mask is None else mask
    assert tpu.refusal(*qkv, mask, scale, logit_softcap, sinks) is None
    found = everything(lambda *x: tpu.attention(*x[:3], mask, scale, logit_softcap, x[3], max_logit), qkv, sinks)
    return found if sinks is not None else {name: x for name, x in found.items() if name != "d_sinks"}


def expected(qkv, mask=None, sinks=None, scale=0.3, logit_softcap=None):
    q, _, v = qkv
    out = np.broadcast_to(np.float32(0), (*q.shape[:3], v.shape[-1]))
    return exact(qkv, mask, cotangents(out, out[..., 0]), scale, logit_softcap, sinks)


RNG = np.random.default_rng(0)
SEGMENTS = np.sort(RNG.integers(0, 4, (2, 300)), axis=1)
IMAGES = np.repeat(RNG.integers(0, 3, (2, 60)), 5, axis=1)
SINKS = np.array([3.0, -1.0, 0.0, 40.0], np.float32)
CASES = {
    "full, cut": (Mask(), {}, {"queries": 130, "keys": 300, "v_width": 16}),
    "causal, sinks, softcap": (Mask(causal=True), {"sinks": SINKS, "logit_softcap": 2.0}, {}),
    "window, before the text": (Mask(causal=True, window=40, q_offset=-50), {"sinks": SINKS}, {}),
    "diagonal off the corner": (Mask(causal=True, q_offset=256, kv_length=500), {}, {"keys": 520}),
    "lengths and offsets of rows": (
        Mask(causal=True, kv_length=np.array([200, 0]), q_offset=np.array([-50, 30])),
        {"sinks": SINKS},
        {"keys": 520},
    ),
    "prefixes of rows": (Mask(causal=True, prefix_length=np.array([5, 280])), {}, {"keys": 260}),
    "packed": (Mask(causal=True, q_segment_ids=SEGMENTS), {"logit_softcap": 2.0}, {"kv_heads": 4}),
    "packed, any order": (
        Mask(q_segment_ids=SEGMENTS, kv_segment_ids=RNG.integers(0, 4, (2, 400))),
        {},
        {"keys": 400, "kv_heads": 1},
    ),
    "packed, images, window": (
        Mask(causal=True, q_segment_ids=SEGMENTS, block_ids=IMAGES, window=30, kv_length=290),
        {},
        {},
    ),
}


QUICK = "full, cut", "lengths and offsets of rows", "packed, any order", "packed, images, window"


@pytest.mark.parametrize("mask, options, shape", quick_and_slow(CASES, QUICK))
def test_float32(small, mask, options, shape):
    qkv = inputs(1, **shape)
    assert_close(ours(qkv, mask, **options), expected(qkv, mask, **options), 1e-5)


BOUNDED = ["causal, sinks, softcap", "lengths and offsets of rows", "packed, images, window"]


@pytest.mark.parametrize(
    "mask, options, shape", quick_and_slow({name: CASES[name] for name in BOUNDED}, ["packed, images, window"])
)
def test_float32_without_a_running_maximum(small, mask, options, shape):
    qkv = inputs(1, **shape)
    assert_close(ours(qkv, mask, max_logit=40.0, **options), expected(qkv, mask, **options), 1e-5)


def test_rows_at_both_ends_of_what_is_safe_without_a_running_maximum(small):
    q, k, v = inputs(1, batch=1, queries=130)
    q, k = np.sign(q), np.zeros_like(k) + 1
    q[:, :60], q[:, 60:90] = 1, -1  # q·k of 8 and -8 alone, then of what is between
    assert_close(ours((q, k, v), scale=50 / 8, max_logit=50.0), expected((q, k, v), Mask(), scale=50 / 8), 1e-5)


@pytest.mark.parametrize("max_logit", [2e4, np.nan])
def test_a_bound_too_high_to_be_safe_keeps_the_running_maximum(small, max_logit):
    q, k, v = inputs(5, batch=1, queries=130)
    q, k = np.round(q * 20), np.round(k * 20)
    found, without = (ours((q, k, v), Mask(causal=True), scale=1.0, max_logit=x) for x in (max_logit, None))
    for name, value in without.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
def test_a_bound_on_a_mesh(small):
    """A traced one, of which only its truth is asked: it has no gradient. An untrue one shows that it was used."""
    q, k, v = inputs(1, queries=20)
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

    def loss(q, max_logit, spec):
        return attention(q * 30, k, v, scale=1.0, spec=spec, max_logit=max_logit, backend="tpu").sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    whole = run(q, np.float32(1e4), None)
    assert not whole[1][1]
    with jax.set_mesh(mesh):
        for spec in PartitionSpec("data"), PartitionSpec(None, "data"):
            found = run(q, np.float32(1e4), spec)
            assert_close({"d_q": found[1][0]}, {"d_q": np.asarray(whole[1][0])}, 1e-5)
        assert not np.isfinite(run(q, np.float32(40), PartitionSpec("data"))[0])


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True, q_offset=340),
        Mask(
            causal=True,
            window=200,
            q_offset=np.array([340, -9]),
            prefix_length=np.array([300, 20]),
            kv_length=np.array([590, 530]),
            q_segment_ids=np.sort(RNG.integers(1, 4, (2, 260)), axis=1),
            kv_segment_ids=np.sort(RNG.integers(0, 4, (2, 600)), axis=1),
        ),
    ],
    ids=["causal", "everything"],
)
@pytest.mark.slow
def test_keys_in_pieces_give_the_same_gradients(small, monkeypatch, mask):
    qkv = inputs(2, queries=260, keys=600)
    whole = ours(qkv, mask)
    monkeypatch.setattr(tuning, "GRADIENT_BYTES", 8 * 256 * 16)
    assert len(tuning.pieces(blocks.Extent(260, 600, 256, 256), 16)) == 3
    assert_close(ours(qkv, mask), {name: np.asarray(x) for name, x in whole.items()}, 1e-6)


def test_pieces_are_even():
    pieces = tuning.pieces(blocks.Extent(131072, 131000, 1024, 1024), 256)
    sizes = [piece.num_keys - piece.first_key for piece in pieces]
    assert sum(sizes) == 131000 and len(set(sizes[:-1])) == 1 and sizes[-1] <= sizes[0]
    assert 8 * 256 * sizes[0] <= tuning.GRADIENT_BYTES < 8 * 256 * 2 * sizes[0]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(kv_length=0),
        Mask(causal=True, q_offset=np.array([-999, -500])),
        Mask(q_segment_ids=np.ones((2, 300), int), kv_segment_ids=np.full((2, 300), 2)),
        Mask(q_segment_ids=np.zeros((2, 300), int)),
    ],
    ids=["no keys", "before all", "other segment", "padding"],
)
@pytest.mark.parametrize("max_logit", [None, pytest.param(40.0, marks=pytest.mark.slow)])
def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(small, mask, max_logit):
    found = ours(inputs(3), mask, max_logit=max_logit)
    assert np.isneginf(found.pop("lse")).all()
    for name, value in found.items():
        assert not np.asarray(value).any(), name


def test_nan_in_padding_reaches_nothing(small):
    q, k, v = inputs(4)
    segments = np.repeat([[1, 1, 0], [2, 3, 3]], 100, axis=1)
    dead = (segments == 0) | (np.arange(300) >= np.array([[300], [250]]))
    spoiled = [np.where((segments == 0)[..., None, None], np.nan, q)]
    spoiled += [np.where(dead[..., None, None], np.nan, x) for x in (k, v)]
    mask = Mask(causal=True, q_segment_ids=segments, kv_length=np.array([300, 250]))
    clean, found = ours((q, k, v), mask, SINKS), ours(spoiled, mask, SINKS)
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # Nor does a NaN that flows back into padding.
    d_out = jnp.where((segments == 0)[..., None, None], jnp.nan, jnp.ones_like(q))
    run = lambda *x: tpu.attention(*x, mask, 0.3, None, SINKS)[0]  # noqa: E731
    for gradient in jax.jit(lambda *x: jax.vjp(run, *x)[1](d_out))(q, k, v):
        assert jnp.isfinite(gradient).all()


def test_logits_of_ten_thousand(small):
    q, k, v = inputs(5, batch=1, queries=130, width=8)
    q, k = np.round(q * 20), np.round(k * 20)
    q[0, :3], k[0, :3] = 35, 36
    mask = Mask(causal=True)
    assert_close(ours((q, k, v), mask, scale=1.0), expected((q, k, v), mask, scale=1.0), 1e-5)


@pytest.mark.parametrize(("tiles", "limit"), [("small", 1.0001), ("those of the table", 1.01)])
def test_bfloat16_is_as_exact_as_splash_attention(tiles, limit, request, monkeypatch):
    """With its tiles but for a bit here and there; the more keys share a maximum, the fewer weights are an exact 1."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if tiles == "small":
        request.getfixturevalue(tiles)
    length, heads = 256, 2
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in inputs(6, 1, length, None, heads, heads, 64)]
    qkv[0] *= 4
    size = {f"block_{name}": 128 for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")}
    theirs = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**size, use_fused_bwd_kernel=True),
        interpret=True,
    )

    def run_theirs(q, k, v, sinks):
        out = theirs(*(x[0].swapaxes(0, 1) for x in (q * 0.125, k, v))).swapaxes(0, 1)[None]
        return out, jnp.zeros(out.shape[:3], jnp.float32)

    def without_lse(q, k, v, sinks, max_logit=None):
        out, _ = tpu.attention(q, k, v, Mask(causal=True), 0.125, None, None, max_logit)
        return out, jnp.zeros(out.shape[:3], jnp.float32)

    def reference(q, k, v, sinks):
        out = attention(q, k, v, Mask(causal=True), 0.125, backend="reference")
        return out, jnp.zeros(out.shape[:3], out.dtype)

    found = everything(without_lse, qkv)
    bounded = everything(functools.partial(without_lse, max_logit=40.0), qkv)
    # The matrix unit rounds float32 operands to bfloat16 unless told not to; interpret mode does not.
    product = jax.lax.dot_general

    def rounding(a, b, *arguments, **options):
        return product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), *arguments, **options)

    with monkeypatch.context() as chip:
        chip.setattr(jax.lax, "dot_general", rounding)
        other = everything(run_theirs, qkv)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, everything(reference, [np.asarray(x).astype(np.float64) for x in qkv]))
    for name in ("out", "d_q", "d_k", "d_v"):
        ours_off, bounded_off, theirs_off = (
            np.sqrt(np.mean((np.asarray(x[name]).astype(np.float64) - expected[name]) ** 2))
            for x in (found, bounded, other)
        )
        assert ours_off <= limit * theirs_off, name
        assert bounded_off <= 1.5 * theirs_off, name


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=True),
        Mask(causal=True, window=150, q_offset=100),
        Mask(causal=True, prefix_length=300, kv_length=555),
        Mask(causal=True, q_offset=np.array([-700, 100]), window=60, kv_length=np.array([700, 0])),
        Mask(causal=True, prefix_length=np.array([0, 500])),
        Mask(causal=True, q_segment_ids=np.sort(RNG.integers(0, 5, (2, 700)), axis=1)),
        Mask(q_segment_ids=RNG.integers(-1, 2, (2, 700)) * RNG.integers(0, 2, (2, 700))),
        Mask(causal=True, block_ids=np.repeat([[0, 1, 0, 2, 2, 0, 3]], 100, axis=1).repeat(2, axis=0)),
    ],
    ids=lambda mask: ", ".join(name for name, value in vars(mask).items() if value is not None and value is not False),
)
@pytest.mark.parametrize("first_key", [0, 256])
def test_lists_of_visits_against_every_pair(mask, first_key):
    extent = blocks.Extent(700, 700, 128, 128, first_key)
    plan = blocks.plan(mask, extent)
    seen = visible(mask, 0, 700, 0, 700)
    seen = np.ones((1, 700, 700), bool) if seen is None else np.asarray(seen)
    table = np.asarray(plan.table)
    count = int(plan.visits)
    assert table.dtype == np.int32 and count <= table.shape[1]
    for b in range(max(len(seen), len(table))):
        entries = table[b % len(table)]
        kinds, queries, keys = entries & 3, entries >> 16, (entries >> 4) & 0xFFF
        assert not (entries[count:] & 15).any(), "behind the longest row nothing happens"
        visits = [(q, k) for q, k, entry in zip(queries, keys, entries, strict=True) if entry & 15]
        assert visits == sorted(set(visits)), "each block once, in order"
        for q in range(6):
            of_block = entries[(queries == q) & (entries & 15 != 0)]
            assert of_block[0] & blocks.FIRST and of_block[-1] & blocks.LAST
            assert (of_block & blocks.FIRST != 0).sum() == (of_block & blocks.LAST != 0).sum() == 1
            for k in range((700 - first_key + 127) // 128):
                rows = slice(q * 128, q * 128 + 128)
                pairs = seen[b % len(seen)][rows, first_key + k * 128 : first_key + k * 128 + 128]
                kind = kinds[(queries == q) & (keys == k)].max(initial=0)
                assert kind in plan.kinds | {blocks.NOTHING}
                if pairs.any():
                    assert kind, "a live block is visited"
                if kind == blocks.FULL:
                    assert pairs.all()
                if kind == blocks.DIAGONAL:
                    assert not np.triu(pairs, 1).any()


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True, window=200),
        Mask(causal=True, kv_length=np.array([700, 30]), q_segment_ids=np.sort(RNG.integers(0, 5, (2, 700)), axis=1)),
    ],
    ids=["known", "on the device"],
)
def test_plans_of_pieces_are_each_piece_s_plan(mask):
    pieces = [blocks.Extent(700, stop, 128, 128, start) for start, stop in ((0, 256), (256, 512), (512, 700))]
    together = blocks.plans(mask, pieces)
    assert together.table.shape[0] == len(together.visits) == 3
    for table, visits, piece in zip(together.table, together.visits, pieces, strict=True):
        alone = blocks.plan(mask, piece)
        assert visits == alone.visits and alone.kinds <= together.kinds
        np.testing.assert_array_equal(table[:, :visits], alone.table[:, :visits])
        assert not (np.asarray(table)[:, visits:] & 15).any()


@pytest.mark.parametrize(
    ("mask", "visits"),
    [
        (Mask(), 64),
        (Mask(causal=True), 36),
        (Mask(causal=True, window=512), 15),
        (Mask(causal=True, q_segment_ids=np.repeat([[1, 2, 3, 4]], 1024, axis=1)), 12),
        (Mask(causal=True, kv_length=np.array([1000])), 15),
    ],
    ids=["full", "causal", "window", "packed", "length"],
)
def test_only_live_blocks_are_visited(mask, visits):
    assert blocks.plan(mask, blocks.Extent(4096, 4096, 512, 512)).visits == visits


@pytest.mark.parametrize("kernel", [tuning.forward, tuning.backward])
@pytest.mark.parametrize("length", [1, 128, 129, 300, 729, 1024, 1100, 4096, 5000, 131072])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (16, 8), (8, 1)])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True, window=64)], ids=["full", "window"])
def test_sizes_divide_each_other(kernel, length, heads, mask):
    q, k = (jax.ShapeDtypeStruct((1, length, n, 64), jnp.bfloat16) for n in heads)
    sizes = kernel(q, k, k, mask)
    for block, tile in ((sizes.queries, sizes.tile_queries), (sizes.keys, sizes.tile_keys)):
        assert block % tile == 0 and tile % 128 == 0
        assert -(-length // block) * block - length < max(128, 256 * -(-length // block))
    assert sizes.keys % min(sizes.tile_keys, sizes.diagonal_keys) == 0
    group = heads[0] // heads[1]
    assert heads[0] % sizes.heads == 0 and (group % sizes.heads == 0 or sizes.heads % group == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.float64}, "no float64"),
        ({"width": 12}, "multiples of 8, found 12 and 12"),
        ({"scale": -1.0}, "must be positive, found -1.0"),
        ({"length": 2**19}, "fewer rows"),
    ],
)
def test_what_it_cannot_do(change, message):
    shape = (2, change.get("length", 16), 2, change.get("width", 8))
    q = np.broadcast_to(np.zeros((), change.get("dtype", np.float32)), shape)
    assert message in tpu.refusal(
        q, q, q, Mask(causal=True, kv_length=np.array([3, 4])), change.get("scale", 1.0), None, None
    )


def test_pallas_is_imported_when_it_is_asked_for():
    script = "import sys, kernels.attention.tpu; print('jax.experimental.pallas' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "False", done.stderr
