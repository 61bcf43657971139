"""Attention split over 8 simulated devices by rows, heads and text: what one device gives, and nothing is gathered."""

import functools
import re

import jax
import numpy as np
import pytest
from attention_in_float64 import NAMES, assert_close, exact
from cases import quick_and_slow
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tpu_chips import devices
from uncached import uncached

from kernels import Mask, attention
from kernels.attention import steps, xla
from kernels.attention.mask import visible

P = PartitionSpec
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")
B, T, N, H = 4, 48, 8, 6
LENGTHS = np.array([48, 29, 0, 5])
SEGMENTS = np.repeat([[1, 1, 2, 0], [1, 2, 3, 4], [0, 0, 0, 0], [5, 5, 5, 5]], T // 4, axis=1)

# Images across parts, in two pieces, of an id that returns in another segment; of negative and of huge ids.
IMAGES = np.zeros((B, T), np.int32)
IMAGES[0, 5:30], IMAGES[0, 40:46] = 3, 3
IMAGES[1, :20], IMAGES[1, 22:24], IMAGES[1, 26:] = 2**31 - 1, -(2**31), -7
IMAGES[3, 8:10], IMAGES[3, 37:39] = 1, 1


def inputs(kv_heads: int, num_keys: int = T):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, num_keys, kv_heads, H), (B, num_keys, kv_heads, H), (B, T, N, H), (B, T, N)
    q, k, v, d_out, d_lse = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return (q, k, v), (d_out, d_lse)


def mesh_of(**axes: int):
    # Newer JAX makes explicit axes unless told otherwise; ours are Auto, as the trainer's are.
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def run(mesh, spec, qkv, cotangents, mask=None, sinks=None, lies=None):
    """The program, and the output, log-sum-exp and gradients that it gives; arguments lie as `lies` (`spec`) says."""
    mask = Mask() if mask is None else mask
    rows, text, heads = (*(lies or spec), None, None)[:3]
    forward = functools.partial(attention, return_lse=True, spec=spec)

    def everything(qkv, cotangents, mask, sinks):
        outputs, pull = jax.vjp(lambda q, k, v, sinks: forward(q, k, v, mask, sinks=sinks), *qkv, sinks)
        return *outputs, *pull(cotangents)[: 3 if sinks is None else 4]

    queries, own_keys = P(rows, text, heads), qkv[1].shape[2] % (mesh.shape[heads] if heads else 1) == 0
    keys = queries if own_keys else P(rows, text)
    of_mask = jax.tree.map(lambda x: P(*(rows, text)[: x.ndim]), mask)
    layout = (queries, keys, keys), (queries, queries), of_mask, None if sinks is None else P(heads)
    layout = jax.tree.map(functools.partial(NamedSharding, mesh), layout)
    arguments = jax.device_put((qkv, cotangents, mask, sinks), layout)
    with jax.set_mesh(mesh):
        program = jax.jit(everything).lower(*arguments).compile()
    return program.as_text(), dict(zip(NAMES, program(*arguments), strict=False))


def collectives(program: str) -> set[str]:
    return {name for name in COLLECTIVES if re.search(rf"\b{name}(-start)?\(", program)}


@pytest.mark.parametrize("spec", [P(("data", "fsdp"), None, "tensor"), None], ids=["spec", "left to XLA"])
def test_rows_and_heads_are_split_and_nothing_is_gathered(spec, monkeypatch):
    monkeypatch.setattr(xla, "TOGETHER", 0)  # as of a long text: heads come one after the other
    qkv, cotangents = inputs(4)
    mask, lies = Mask(causal=True, q_segment_ids=SEGMENTS, kv_length=LENGTHS), P(("data", "fsdp"), None, "tensor")
    program, found = run(mesh_of(data=2, fsdp=2, tensor=2), spec, qkv, cotangents, mask, lies=lies)
    assert not collectives(program)
    assert_close(found, exact(qkv, mask, cotangents), 1e-5)


def test_fewer_key_heads_than_devices():
    (qkv, cotangents), sinks = inputs(2), np.linspace(-1, 1, N, dtype=np.float32)
    program, found = run(mesh_of(data=2, tensor=4), P("data", None, "tensor"), qkv, cotangents, sinks=sinks)
    assert collectives(program) == {"all-reduce"}  # of d_k, d_v, d_sinks: many devices read a key head
    assert_close(found, exact(qkv, Mask(), cotangents, sinks=sinks), 1e-5)


RINGS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "packed": Mask(causal=True, q_segment_ids=SEGMENTS),
    "lengths": Mask(causal=True, kv_length=LENGTHS),
    "length, packed": Mask(causal=True, kv_length=43, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS[:, ::-1].copy()),
    "window": Mask(causal=True, window=14),
    "prefix, lengths": Mask(causal=True, prefix_length=np.array([3, 13, 0, 40]), kv_length=LENGTHS),
    "window, all": Mask(causal=True, window=9, prefix_length=2, kv_length=45, q_segment_ids=SEGMENTS),
    "both ways, packed": Mask(q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS[:, ::-1].copy()),
    "images": Mask(causal=True, block_ids=IMAGES),
    "images, packed, lengths": Mask(causal=True, block_ids=IMAGES, q_segment_ids=SEGMENTS, kv_length=LENGTHS),
    "images, window": Mask(causal=True, block_ids=IMAGES, window=14),
    "images, short window": Mask(causal=True, block_ids=IMAGES, window=2, q_segment_ids=SEGMENTS),
    "images, prefix": Mask(causal=True, block_ids=IMAGES, prefix_length=np.array([3, 13, 0, 40])),
    "images, all": Mask(
        causal=True, block_ids=IMAGES, window=9, prefix_length=7, kv_length=LENGTHS, q_segment_ids=SEGMENTS
    ),
    "images that nobody asks for": Mask(block_ids=IMAGES, prefix_length=5),
    "offset": Mask(causal=True, q_offset=17),
    "offset, window": Mask(causal=True, q_offset=31, window=9, q_segment_ids=SEGMENTS),
    "offsets, all": Mask(
        causal=True, window=9, prefix_length=2, kv_length=LENGTHS, q_offset=np.array([-50, 3, 13, -7]),
        q_segment_ids=SEGMENTS,
    ),
}  # fmt: skip


QUICK = {"full", "causal", "packed", "length, packed", "images, packed, lengths", "images, all", "offset, window"}


@pytest.mark.parametrize("mask", quick_and_slow(RINGS, QUICK | {"prefix, lengths", "both ways, packed"}))
def test_a_ring_over_the_text_is_the_whole_text(mask):
    qkv, cotangents = inputs(4)
    q, k, v = (x.copy() for x in qkv)
    sinks = np.linspace(-1, 1, N, dtype=np.float32) if mask is RINGS["packed"] else None
    if mask.q_segment_ids is not None:  # padding holds NaN, and is told NaN
        padding = mask.q_segment_ids == 0
        q[padding], cotangents[0][padding] = np.nan, np.nan
        k[mask.key_segments == 0], v[mask.key_segments == 0] = np.nan, np.nan
    program, found = run(mesh_of(tensor=2, context=4), P(None, "context", "tensor"), (q, k, v), cotangents, mask, sinks)
    assert collectives(program) == {"collective-permute"} | (set() if sinks is None else {"all-reduce"})
    assert not re.search(rf"[\[,]{T}[\],]", program)  # nothing is as long as the text
    assert_close(found, exact(qkv, mask, cotangents, sinks=sinks), 1e-5)


OTHER_LENGTHS = {
    "full": (40, Mask()),
    "causal": (40, Mask(causal=True)),
    "late queries": (64, Mask(causal=True, q_offset=16)),
    "late queries, window": (64, Mask(causal=True, q_offset=16, window=9)),
    "offsets, prefix": (
        64,
        Mask(causal=True, q_offset=np.array([16, 0, -48, 90]), prefix_length=np.array([0, 3, 1, 0])),
    ),
    "all": (
        40,
        Mask(causal=True, q_offset=-7, window=5, prefix_length=np.array([0, 3, 0, 7]),
             kv_length=np.array([40, 9, 0, 23]), q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS[:, 4:44].copy()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_keys, mask", quick_and_slow(OTHER_LENGTHS, {"late queries", "all"}))
def test_queries_and_keys_of_other_lengths(num_keys, mask):
    qkv, cotangents = inputs(4, num_keys)
    program, found = run(mesh_of(tensor=2, context=4), P(None, "context", "tensor"), qkv, cotangents, mask)
    assert collectives(program) == {"collective-permute"}
    assert not re.search(rf"[\[,]({T}|{num_keys})[\],]", program)
    assert_close(found, exact(qkv, mask, cotangents), 1e-5)


def test_queries_before_all_keys_move_nothing():
    (qkv, cotangents), mask = inputs(4), Mask(causal=True, q_offset=-T)
    program, found = run(mesh_of(tensor=2, context=4), P(None, "context", "tensor"), qkv, cotangents, mask)
    assert not collectives(program)
    assert_close(found, exact(qkv, mask, cotangents), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True, block_ids=np.zeros((2, 2048), int), q_segment_ids=np.zeros((2, 2048), int)),
        Mask(causal=True, q_offset=np.zeros(2, int), window=300),
    ],
    ids=["images, packed", "offsets, window"],
)
def test_a_ring_compiles_for_tpus(mask):
    mesh = Mesh(np.array(devices("v5e")).reshape(4), ("context",), axis_types=(AxisType.Auto,))
    whole = jax.ShapeDtypeStruct((2, 2048, 4, 128), "bfloat16", sharding=NamedSharding(mesh, P(None, "context")))
    ids = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "int32"), mask)

    def loss(q, k, v, mask):
        return attention(q, k, v, mask, spec=P(None, "context"), backend="tpu").astype("float32").sum()

    with uncached(), jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(whole, whole, whole, ids).compile().as_text()
    assert "attention_forward" in program and "attention_backward" in program
    assert collectives(program) == {"collective-permute"}


def test_parts_of_odd_length_stay_in_order():
    qkv, cotangents = jax.tree.map(lambda x: x[:, :44], inputs(4))
    _, found = run(mesh_of(tensor=2, context=4), P(None, "context", "tensor"), qkv, cotangents, Mask(causal=True))
    assert_close(found, exact(qkv, Mask(causal=True), cotangents), 1e-5)


def test_ids_of_blocks_and_segments_in_one():
    """Parts meet where a pair might be of one block and segment, and the joint ids say which are."""
    rng = np.random.default_rng(0)
    q_ids, k_ids = (rng.choice([0, -5, 1, 2, 2**31 - 1], (2, 3, size)).astype(np.int32) for size in (9, 7))
    found = steps.of_pairs(Mask(q_segment_ids=q_ids[0], kv_segment_ids=k_ids[0]), q_ids[1], k_ids[1])
    same = (q_ids[:, :, :, None] == k_ids[:, :, None]) & (q_ids != 0)[..., None]
    assert 0 < same.all(axis=0).sum() < same.any(axis=0).sum()
    np.testing.assert_array_equal(visible(found, 0, 9, 0, 7), same.all(axis=0))

    images = np.array([[0, 3, 3, 4], [0, 0, 0, 0]], np.int32)
    for others, meets in (([[4, 0], [0, 0]], True), ([[5, 9], [3, 3]], False), ([[0, 0], [0, 0]], False)):
        assert steps.may_meet(images, np.array(others, np.int32)) == meets


def test_a_causal_ring_gives_every_device_the_same_work():
    for places, parts in steps.steps(Mask(causal=True), 12, 12, 5, balanced=True):
        (behind, ahead), *nothing_else = parts
        assert not nothing_else
        assert all(work.order.causal == (places == 0) for work in (behind, ahead) if work)
        pairs = [len(range(12)[work.queries]) * len(range(12)[work.keys]) for work in (behind, ahead) if work]
        assert pairs == ([144] if places == 0 else [72, 72])


def test_a_ring_goes_no_further_than_the_window():
    (q, k, v), _ = inputs(4)

    def moves(window):
        run = functools.partial(attention, mask=Mask(causal=True, window=window), spec=P(None, "context"))
        back = jax.grad(lambda *qkv: run(*qkv).sum(), (0, 1, 2))
        return str(jax.make_jaxpr(run)(q, k, v)).count("ppermute"), str(jax.make_jaxpr(back)(q, k, v)).count("ppermute")

    with jax.set_mesh(mesh_of(context=8)):  # parts of 6: from a window of 2 on, the part before is seen, from 8 on two
        one, two, seven, eight, thirteen = (moves(window) for window in (1, 2, 7, 8, 13))
    assert one == (0, 0) and (0, 0) < two == seven < eight == thirteen


@pytest.mark.parametrize(
    ("axes", "spec", "shape", "options", "message"),
    [
        ({"data": 8}, P("data"), (4, 8, 2, 8), {}, "B = 4 is not divisible by the 8 devices"),
        ({"data": 8}, P("rows"), (8, 8, 2, 8), {}, r"no axes \['rows'\]; it has {'data': 8}"),
        ({"tensor": 4}, P(None, None, "tensor"), (1, 8, 12, 8), {"kv_heads": 6}, "6 key heads can't be split over"),
        ({"context": 4}, P(None, "context"), (1, 8, 2, 8), {"keys": 6}, "S = 6 is not divisible by the 4 devices"),
    ],
)  # fmt: skip
def test_what_can_not_be_split_is_refused(axes, spec, shape, options, message):
    rows, length, heads, width = shape
    k = np.zeros((rows, options.get("keys", length), options.get("kv_heads", heads), width), np.float32)
    with jax.set_mesh(mesh_of(**axes)), pytest.raises(ValueError, match=message):
        attention(np.zeros(shape, np.float32), k, k, spec=spec)


def test_a_mesh_of_one_device_splits_nothing():
    (q, k, v), _ = inputs(4)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])):
        jaxpr = jax.make_jaxpr(functools.partial(attention, spec=P("data")))(q, k, v)
    assert "shard_map" not in str(jaxpr)
