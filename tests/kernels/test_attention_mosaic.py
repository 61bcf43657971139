"""The Mosaic kernels for Hopper GPUs: their numbers and barriers in Pallas' GPU interpreter, what they know of a mask,
and, slowly, the machine code that they become for an H100. There is no GPU here: the tensor cores have never run.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_in_float64 import NAMES, assert_close, exact
from hopper import compiling_for
from hopper_interpreter import interpreter, races_found
from jax.sharding import PartitionSpec

from kernels import Mask, attention
from kernels.attention import xla
from kernels.attention.gpu import mosaic
from kernels.attention.gpu.mosaic import plan
from kernels.attention.mask import visible

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)


@pytest.fixture
def interpreted(monkeypatch):
    """Threads, copies, barriers and races of a GPU, but for the products: the interpreter knows no transposed operand,
    and none in registers. Each of its threads that waits holds one of XLA's: with two of them in all, nothing would
    ever end; conftest's 8 devices bring more.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    from kernels.attention.gpu.mosaic import tile

    options = interpreter(monkeypatch)
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    monkeypatch.setattr(tile, "product_with_rows", lambda a, b: product(a[...], b[...].T))
    monkeypatch.setattr(tile, "add_product", lambda total, a, b: total + product(a, b[...]))
    with force_gpu_interpret_mode(options):
        yield
        assert not races_found()
    gpu_callbacks.reset_gpu_interpret_mode_state()


def inputs(queries, keys, heads=1, kv_heads=1, width=16, v_width=None, batch=1):
    """q, k, v and cotangents of output and log-sum-exp, float32."""
    draw, v_width = np.random.default_rng(1).standard_normal, v_width or width
    shapes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, v_width), (queries, heads, v_width)
    *qkv, d_out = (draw((batch, *shape), np.float32) for shape in shapes)
    return qkv, (d_out, draw((batch, queries, heads), np.float32))


def ours(qkv, mask, cotangents=None, scale=0.3, logit_softcap=None, sinks=None):
    """Output and log-sum-exp, with cotangents the gradients too, each under its name."""

    @jax.jit
    def everything(qkv, mask, sinks, cotangents):
        def run(qkv, sinks):
            return mosaic.attention(*qkv, mask, scale, logit_softcap, sinks)

        if cotangents is None:
            return run(qkv, sinks)
        found, pull = jax.vjp(run, qkv, sinks)
        (d_q, d_k, d_v), d_sinks = pull(cotangents)
        return *found, d_q, d_k, d_v, d_sinks

    found = everything(qkv, mask, sinks, cotangents)
    return {name: x for name, x in zip(NAMES, found, strict=False) if x is not None}


def check(qkv, cotangents, mask, gradients=True, tolerance=1e-5, **options):
    found = ours(qkv, mask, cotangents if gradients else None, **options)
    expected = exact(qkv, mask, cotangents, options.pop("scale", 0.3), **options)
    assert_close(found, {name: expected[name] for name in found}, tolerance)


SEGMENTS = np.sort(RNG.integers(0, 3, (1, 100)), axis=1)
KEY_SEGMENTS = np.sort(RNG.integers(0, 3, (1, 200)), axis=1)
IMAGES = np.repeat(RNG.integers(0, 3, (2, 26)), 5, axis=1)


def test_everything_at_once(interpreted):
    """Rows that see nothing and NaN in padding among it."""
    qkv, cotangents = inputs(100, 200, width=24, v_width=16)
    for x, ids in zip((*qkv, *cotangents), (SEGMENTS, *[KEY_SEGMENTS] * 2, SEGMENTS, SEGMENTS), strict=True):
        x[ids == 0] = np.nan
    mask = Mask(
        causal=True,
        window=70,
        q_offset=60,
        prefix_length=np.array([5]),
        q_segment_ids=SEGMENTS,
        kv_segment_ids=KEY_SEGMENTS,
    )
    cotangents = cotangents[0], np.nan_to_num(cotangents[1])  # a sink gives such a row a log-sum-exp and its gradient
    check(qkv, cotangents, mask, logit_softcap=5.0, sinks=np.array([0.5], np.float32))


def test_blocks_that_look_both_ways_and_heads_that_share_keys(interpreted):
    qkv, cotangents = inputs(130, 130, heads=2)
    mask = Mask(causal=True, window=30, block_ids=IMAGES[:1], kv_length=120)
    check(qkv, cotangents, mask, gradients=False)


SLOW = {
    "full, more blocks than slots": (Mask(), {"queries": 70, "keys": 700}, {}),
    "causal, two blocks, sinks": (
        Mask(causal=True),
        {"queries": 200, "keys": 200},
        {"sinks": np.array([40.0], np.float32)},
    ),
    "lengths and offsets of rows": (
        Mask(causal=True, kv_length=np.array([100, 0]), q_offset=np.array([-20, 30])),
        {"queries": 90, "keys": 140, "batch": 2},
        {"sinks": np.array([-1.0], np.float32)},
    ),
    "blocks, groups": (
        Mask(causal=True, window=30, block_ids=IMAGES, q_segment_ids=np.sort(IMAGES, axis=1), kv_length=120),
        {"queries": 130, "keys": 130, "heads": 2, "batch": 2},
        {"logit_softcap": 2.0},
    ),
    "prefixes of rows, q and k wider than v": (
        Mask(causal=True, prefix_length=np.array([5, 90])),
        {"queries": 100, "keys": 100, "batch": 2, "width": 72, "v_width": 40},
        {},
    ),
    "sums one after the other": (
        Mask(causal=True, q_offset=40),
        {"queries": 60, "keys": 140, "width": 256},
        {"scale": 0.1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_float32(interpreted, name):
    mask, shape, options = SLOW[name]
    check(*inputs(**shape), mask, **options)


@pytest.mark.slow
def test_logits_of_1e4(interpreted):
    """In float32 their last bit is 1e-3, which the backward's weights feel: less than bfloat16's, 4e-3."""
    check(*inputs(60, 60), Mask(causal=True, window=9), scale=3e3, tolerance=4e-3)


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_in_xla(interpreted):
    qkv, cotangents = inputs(128, 128, width=64)
    qkv, cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (qkv, cotangents))
    cotangents = cotangents[0], cotangents[1].astype(jnp.float32) * 0
    mask = Mask(causal=True)
    expected = exact(qkv, mask, cotangents, 0.5)
    found = ours(qkv, mask, cotangents, 0.5)
    out, pull = jax.vjp(lambda *x: xla.attention(*x, mask, 0.5, None, None), *qkv)
    theirs = dict(zip(NAMES, (*out, *pull(cotangents)), strict=False))
    for name in ("out", "d_q", "d_k", "d_v"):
        off, limit = (
            np.sqrt(np.mean((np.asarray(x[name]).astype(np.float64) - expected[name]) ** 2)) for x in (found, theirs)
        )
        assert off <= 1.02 * limit, name


MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=150, q_offset=100),
    "prefix": Mask(causal=True, prefix_length=300, kv_length=555),
    "prefix, window": Mask(causal=True, prefix_length=np.array([200, 0]), window=20, q_offset=-30),
    "of rows": Mask(causal=True, q_offset=np.array([-700, 100]), window=60, kv_length=np.array([700, 0])),
    "a length that matters to no row": Mask(kv_length=9999),
    "packed": Mask(causal=True, q_segment_ids=np.sort(RNG.integers(0, 5, (2, 700)), axis=1)),
    "any order": Mask(q_segment_ids=RNG.integers(0, 5, (2, 700)), kv_segment_ids=RNG.integers(0, 5, (2, 700))),
    "one segment": Mask(q_segment_ids=np.ones((1, 700), np.int32), kv_length=np.array([256, 700])),
    "images": Mask(causal=True, block_ids=np.repeat(RNG.integers(0, 3, (2, 7)), 100, axis=1), kv_length=650),
    "prefix, images": Mask(
        causal=True, prefix_length=130, block_ids=np.repeat(RNG.integers(0, 3, (2, 7)), 100, axis=1), kv_length=100
    ),
    "all": Mask(
        causal=True,
        window=90,
        prefix_length=130,
        block_ids=np.repeat(RNG.integers(0, 3, (2, 7)), 100, axis=1),
        q_segment_ids=np.sort(RNG.integers(0, 5, (2, 700)), axis=1),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_the_kernels_know_of_a_mask(name):
    """Their numbers say of each pair what the mask says; no block is missed, and none called full has a hidden pair."""
    from kernels.attention.gpu.mosaic import tile

    mask, length, padded = MASKS[name], 700, 768
    if name == "one segment":
        mask = jax.tree.map(lambda x: np.broadcast_to(x, (2, 700)) if x.ndim == 2 else x, mask)
    static = isinstance(plan.numbers(mask, length, length, padded, padded).queries, np.ndarray)
    assert static == (not jax.tree.leaves(mask))

    @jax.jit
    def everything(mask):
        found = plan.numbers(mask, length, length, padded, padded)
        queries = jnp.broadcast_to(found.queries, (2, *found.queries.shape[1:]))
        seen = [
            tile.visible(found.seen, queries[b].__getitem__, lambda n, b=b: found.keys[b][n], 0, (padded, padded), 0)
            for b in range(2)
        ]
        known = visible(mask, 0, length, 0, length)
        visits = {size: (plan.of_queries(found, padded, size), plan.of_keys(found, padded, size)) for size in (64, 128)}
        return jnp.stack(seen), True if known is None else known, visits

    seen, expected, visits = jax.tree.map(np.asarray, everything(mask))
    expected = np.broadcast_to(expected, (2, length, length))
    np.testing.assert_array_equal(seen[:, :length, :length], expected)
    assert not seen[:, :, length:].any()
    for size, (of_queries, of_keys) in visits.items():
        for each, tiles in (
            (of_queries, seen.reshape(2, -1, 128, padded // size, size).swapaxes(2, 3)),
            (of_keys, seen.reshape(2, -1, size, padded // 128, 128).transpose(0, 3, 1, 2, 4)),
        ):
            table, counts = (np.broadcast_to(x, (2, *x.shape[1:])) for x in each)
            for b, i in np.ndindex(table.shape[:2]):
                plain, count = counts[b, i]
                assert sorted(table[b, i]) == list(range(table.shape[2]))
                assert tiles[b, i, table[b, i, :plain]].all()
                assert not tiles[b, i, table[b, i, count:]].any()


def test_few_blocks_are_visited():
    packed = np.repeat([[1, 2, 3, 4]], 256, axis=1)
    for mask, plain, count in (
        (Mask(), 64, 64),
        (Mask(causal=True), 28, 36),
        (Mask(causal=True, window=256), 7, 21),
        (Mask(causal=True, q_segment_ids=packed), 4, 12),
        (Mask(causal=True, prefix_length=256), 31, 37),
    ):

        @jax.jit
        def both(mask):
            found = plan.numbers(mask, 1024, 1024, 1024, 1024)
            return [of(found, 1024, 128).counts.sum(axis=(0, 1)) for of in (plan.of_queries, plan.of_keys)]

        np.testing.assert_array_equal(both(mask), [[plain, count]] * 2)


def kernels_of(mask, gradient=False, **options) -> set[str]:
    """Names of the kernels that `attention` becomes."""
    q, kv = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def run(q, k, v):
        return attention(q, k, v, mask, **options).astype(jnp.float32).sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(run, (0, 1, 2)) if gradient else run)(q, kv, kv))
    return set(re.findall(r"attention_(?:forward|backward_\w+)|dot_product_attention", jaxpr))


PACKED = np.ones((2, 256), np.int32)
KINDS = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"]


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_it_on_a_hopper_gpu_for_what_cudnn_lacks(kind, monkeypatch):
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91_000)  # JAX asks even to trace
    with compiling_for(kind):
        assert kernels_of(Mask(causal=True, q_segment_ids=PACKED)) == set()
        monkeypatch.setenv("KERNELS_UNTRIED", "1")
        assert kernels_of(Mask(causal=True)) == {"dot_product_attention"}
        assert kernels_of(Mask(causal=True, q_segment_ids=PACKED)) == {"attention_forward"}
        everything = {f"attention_{name}" for name in ("forward", "backward_queries", "backward_keys")}
        assert kernels_of(Mask(causal=True, q_offset=3), gradient=True) == everything
        assert kernels_of(Mask(causal=True), logit_softcap=30.0) == {"attention_forward"}


def test_auto_leaves_other_gpus_to_xla(monkeypatch):
    monkeypatch.setenv("KERNELS_UNTRIED", "1")
    for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA H2000", "any"):
        with compiling_for(kind):
            assert kernels_of(Mask(causal=True, q_segment_ids=PACKED)) == set()


def test_over_a_mesh_each_device_runs_it(monkeypatch):
    monkeypatch.setenv("KERNELS_UNTRIED", "1")
    mask = Mask(causal=True, q_segment_ids=PACKED)
    with compiling_for(KINDS[0], (2, 2), ("data", "tensor")):
        assert kernels_of(mask) == set()
        assert kernels_of(mask, spec=PartitionSpec("data", None, "tensor")) == {"attention_forward"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "take bfloat16, not float32"),
        ({"width": 264}, "at most 256, that of v no larger than q's, not 264 and 264"),
        ({"v_width": 128}, "not 64 and 128"),
        ({"scale": -1.0}, "must be positive, found -1.0"),
        ({"kind": "NVIDIA A100-SXM4-80GB"}, "for Hopper GPUs, not for 'NVIDIA A100"),
        ({"kind": "any", "mesh": (2,)}, "give attention a spec"),
    ],
)
def test_what_it_can_not_do(change, reason):
    q = jnp.zeros((2, 64, 4, change.get("width", 64)), change.get("dtype", jnp.bfloat16))
    v = jnp.zeros((2, 64, 4, change.get("v_width", q.shape[3])), q.dtype)
    with compiling_for(change.get("kind", KINDS[0]), change.get("mesh", (1,))), pytest.raises(ValueError, match=reason):
        attention(q, q, v, scale=change.get("scale"), backend="mosaic_gpu")


def test_on_a_cpu_it_says_so():
    q = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="for gpu, and this is compiled for cpu"):
        attention(q, q, q, backend="mosaic_gpu")


COMPILED = """
import jax, jax.numpy as jnp
from hopper import compiled_for_h100
from kernels import Mask, attention

width, v_width, length, rich = {width}, {v_width}, {length}, {rich}

def gradient(q, k, v, ids, sinks, d_out):
    mask = Mask(causal=True, q_segment_ids=ids)
    options = {{}}
    if rich:
        mask = Mask(causal=True, window=1000, q_segment_ids=ids, block_ids=ids, prefix_length=ids[:, 0])
        options = {{"logit_softcap": 30.0, "sinks": sinks}}
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, backend="mosaic_gpu", **options), q, k, v)
    return out, pull(d_out)

def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

ids, sinks = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.float32)
shapes = array(1, length, 4, width), array(1, length, 2, width), array(1, length, 2, v_width)
compiled = compiled_for_h100(gradient, *shapes, ids, sinks, array(1, length, 4, v_width))
print("temporary bytes", compiled.memory_analysis().temp_size_in_bytes)
"""


def compiled(width: int, v_width: int, rich: bool, length: int = 4096) -> tuple[dict[str, int], int]:
    """Of the gradient: bytes that kernels of each name spill at most, and what XLA allots beside the results."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    script = COMPILED.format(width=width, v_width=v_width, length=length, rich=rich)
    paths = str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=550, env=environment)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores", text, re.DOTALL
    )
    most = {name: max(int(spilled) for each, spilled in found if each == name) for name, _ in found}
    return most, int(re.findall(r"temporary bytes (\d+)", text)[0])


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(64, 64), (72, 72), (128, 128), (192, 128), (256, 256)])
def test_it_compiles_for_an_h100(widths):
    spilled, _ = compiled(*widths, rich=False)
    assert spilled.keys() == {"attention_forward", "attention_backward_queries", "attention_backward_keys"}
    assert spilled["attention_forward"] == 0
    assert max(spilled.values()) <= (1024 if widths == (256, 256) else 0)  # a sum of 256 takes 128 registers alone


@pytest.mark.slow
def test_32k_tokens_on_an_h100():
    """No T x S array: one would take 2 GiB a head in bfloat16."""
    spilled, temporary = compiled(128, 128, rich=True, length=32768)
    assert temporary < 200 * 2**20
    assert max(spilled.values()) <= 256
