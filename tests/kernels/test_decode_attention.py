"""`decode_attention` against plain maths in float64, over shapes, masks, types of cache and backends."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Mask, attention, decode_attention
from kernels.attention.mask import visible
from kernels.decode_attention import tpu
from kernels.decode_attention.quantized import QuantizedVectors, quantize


def inputs(seed, batch, queries, slots, heads, kv_heads, width, v_width=0, dtype=np.float32):
    """q `B T N H`, k `B K S H`, v `B K S V`."""
    draw = np.random.default_rng(seed).standard_normal
    q, k = draw((batch, queries, heads, width)), draw((batch, kv_heads, slots, width))
    return [jnp.asarray(x, dtype) for x in (q, k, draw((batch, kv_heads, slots, v_width or width)))]


def exact(q, k, v, mask=None, sinks=None, **options):
    """From the reference in float64; of what is quantised, the numbers it stands for."""
    wide = lambda x: None if x is None else np.asarray(x).astype(np.float64)  # noqa: E731
    with jax.enable_x64(True):
        k, v = (
            QuantizedVectors(*map(wide, x)).dequantized(np.float64) if isinstance(x, QuantizedVectors) else wide(x)
            for x in (k, v)
        )
        out = decode_attention(wide(q), k, v, mask, sinks=wide(sinks), backend="reference", **options)
        assert out.dtype == np.float64
        return np.asarray(out)


def assert_close(found, expected, tolerance):
    found = np.asarray(found).astype(np.float64)
    error, size = np.abs(found - expected).max(), max(np.abs(expected).max(), 0.1)
    assert error <= tolerance * size, f"off by {error:.2e}, largest value {size:.2e}"


@st.composite
def cases(draw):
    """(q, k, v, mask, options): ragged lengths, windows, segments, prefixes, sinks, quantised or not."""
    batch, (heads, kv_heads) = draw(st.sampled_from([1, 3])), draw(st.sampled_from([(2, 2), (8, 1), (6, 2)]))
    queries, slots = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 37, 300]))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    fields = {"causal": draw(st.booleans())}
    if fields["causal"]:
        fields["q_offset"] = rng.integers(-queries, slots, batch)
        if draw(st.booleans()):
            fields["window"] = draw(st.sampled_from([1, 4, 1000]))
        if draw(st.booleans()):
            fields["prefix_length"] = rng.integers(0, slots + 2, batch)
    if draw(st.booleans()):
        fields["kv_length"] = draw(st.sampled_from([slots // 2, rng.integers(0, slots + 2, batch)]))
    if draw(st.booleans()):
        fields["q_segment_ids"] = rng.integers(0, 3, (batch, queries))
        fields["kv_segment_ids"] = np.sort(rng.integers(0, 3, (batch, slots)), axis=1)
    options = {"logit_softcap": draw(st.sampled_from([None, 2.0])), "scale": draw(st.sampled_from([None, 1.3]))}
    if draw(st.booleans()):
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    q, k, v = inputs(seed, batch, queries, slots, heads, kv_heads, 24, draw(st.sampled_from([24, 5])))
    cache = draw(st.sampled_from([None, jnp.int8, jnp.float8_e4m3fn]))
    return q, *((k, v) if cache is None else (quantize(x, cache) for x in (k, v))), Mask(**fields), options


def run(backend, q, k, v, mask=None, **options):
    """The TPU's kernel is interpreted, with blocks so small that a little text has many."""
    if backend == "tpu":
        known = dict(scale=q.shape[-1] ** -0.5, logit_softcap=None, sinks=None)
        known |= {name: value for name, value in options.items() if value is not None}
        call = partial(tpu.decode_attention, blocks=tpu.Blocks(1, 128), interpret=True, **known)
        return jax.jit(call)(q, k, v, Mask() if mask is None else mask)
    return jax.jit(partial(decode_attention, backend=backend, **options))(q, k, v, mask)


BACKENDS = ["tpu", "xla", "reference"]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(["tpu", "xla"]))
def test_float32_over_the_grid(case, backend):
    q, k, v, mask, options = case
    assert_close(run(backend, q, k, v, mask, **options), exact(q, k, v, mask, **options), 1e-5)


@pytest.mark.parametrize("width", [24, 128])
@pytest.mark.parametrize("dtype, cache", [(np.float32, None), (jnp.bfloat16, None), (jnp.bfloat16, jnp.int8)])
def test_several_heads_and_blocks_at_a_time(width, dtype, cache):
    q, k, v = inputs(9, 2, 3, 700, 8, 4, width, dtype=dtype)
    if cache is not None:
        k, v = quantize(k, cache), quantize(v, cache)
    mask = Mask(causal=True, window=300, q_offset=np.array([650, 3]))
    call = partial(tpu.decode_attention, scale=0.3, logit_softcap=None, sinks=None, interpret=True)
    for blocks in (tpu.Blocks(2, 256), tpu.Blocks(4, 512)):
        found = jax.jit(partial(call, blocks=blocks))(q, k, v, mask)
        assert_close(found, exact(q, k, v, mask, scale=0.3), 1e-5 if dtype == np.float32 else 8e-3)


def test_only_blocks_that_somebody_sees_are_visited():
    mask = Mask(causal=True, window=100, q_offset=np.array([0, 300, 130, -9]), kv_length=np.array([512, 310, 512, 512]))
    work = tpu._work(tpu._bits(visible(mask, 0, 2, 0, 512), 4, 2, 512), 2, 128)
    codes = work.codes[: work.count]
    rows, blocks, whole = work.row(codes), work.block(codes), codes & 1
    assert list(zip(rows.tolist(), blocks.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]
    assert not whole.any()  # no window holds a whole block of 128
    everything = tpu._work(tpu._bits(jnp.ones((), bool), 1, 2, 256), 2, 128)
    assert everything.count == 2 and (everything.codes[:2] & 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_attention_with_heads_before_slots(backend):
    q, k, v = inputs(0, 2, 3, 40, 6, 2, 16)
    mask = Mask(causal=True, window=9, q_offset=np.array([37, 11]), kv_length=np.array([39, 40]))
    expected = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    np.testing.assert_allclose(run(backend, q, k, v, mask), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", [None, jnp.int8])
def test_what_nobody_sees_reaches_nothing(backend, cache):
    q, k, v = inputs(1, 3, 2, 50, 4, 2, 8)
    segments = np.repeat([[0, 1, 2]], [10, 30, 10], axis=1).repeat(3, axis=0)
    mask = Mask(
        causal=True,
        q_offset=np.array([20, 48, 30]),
        kv_length=np.array([50, 49, 25]),
        q_segment_ids=np.array([[1, 1], [2, 0], [1, 1]]),
        kv_segment_ids=segments,
    )
    seen = np.zeros((3, 50), bool)
    seen[0, 10:22], seen[1, 40:49], seen[2, 10:25] = True, True, True
    spoil = lambda x: jnp.where(seen[:, None, :, None], x, np.nan)  # noqa: E731
    spoiled, clean = (spoil(k), spoil(v)), (k, v)
    if cache is not None:
        spoiled, clean = ([quantize(x, cache) for x in pair] for pair in (spoiled, clean))
        assert jnp.isnan(spoiled[0].scales).any()
    expected = run(backend, q, *clean, mask)
    np.testing.assert_array_equal(run(backend, q, *spoiled, mask), expected)
    assert np.isfinite(expected).all()  # else NaN equals NaN
    assert np.asarray(expected != 0).any(axis=(2, 3)).tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [None, np.array([3.0, -2.0], np.float32)])
def test_rows_without_keys_give_zero(backend, sinks):
    q, k, v = (jnp.full_like(x, np.nan) if i else x for i, x in enumerate(inputs(2, 2, 2, 30, 2, 2, 8)))
    for mask in (Mask(kv_length=0), Mask(causal=True, q_offset=np.array([-2, -9])), Mask(kv_length=np.array([0, 0]))):
        assert not np.asarray(run(backend, q, k, v, mask, sinks=sinks)).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand(backend):
    # Whole numbers: float32 holds these logits exactly, so that all that differs is the softmax.
    q, k, v = inputs(3, 1, 2, 300, 4, 2, 4)
    q, k = jnp.round(q * 20), jnp.round(k * 20)
    q, k = q.at[0, 0].set(50), k.at[0, :, :150].set(50).at[0, :, 150:].set(-50)
    assert_close(run(backend, q, k, v, scale=1.0), exact(q, k, v, scale=1.0), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
def test_bfloat16_keeps_float32_sums(backend, heads):
    q, k, v = inputs(4, 2, 2, 700, *heads, 64, dtype=jnp.bfloat16)
    mask = Mask(causal=True, q_offset=np.array([650, 3]))
    found = run(backend, q, k, v, mask)
    assert found.dtype == jnp.bfloat16
    assert_close(found, exact(q, k, v, mask), 6e-3)


@pytest.mark.parametrize("dtype, largest, share", [(jnp.int8, 1 / 254, 0), (jnp.float8_e4m3fn, 1 / 458_752, 1 / 16)])
def test_quantised_within_the_bounds_that_it_states(dtype, largest, share):
    x = np.random.default_rng(5).standard_normal((4, 3, 50, 16)).astype(np.float32)
    x *= np.logspace(-30, 30, 50)[:, None]  # each vector has its own scale
    x[0, 0, 0] = 0
    found = quantize(jnp.asarray(x), dtype)
    assert found.values.dtype == dtype and found.scales.dtype == jnp.float32
    bound = np.maximum(np.abs(x) * share, np.abs(x).max(-1, keepdims=True) * largest)
    assert (np.abs(found.dequantized() - x) <= bound * 1.001).all()


@pytest.mark.parametrize("dtype, tolerance", [(jnp.int8, 0.015), (jnp.float8_e4m3fn, 0.08)])
def test_a_quantised_cache_is_close_to_the_one_it_was_made_of(dtype, tolerance):
    q, k, v = inputs(6, 2, 2, 500, 8, 2, 64)
    k = k * jnp.logspace(-1, 1, 500)[:, None] / 3  # vectors of very different sizes
    mask = Mask(causal=True, q_offset=np.array([400, 30]))
    expected = exact(q, k, v, mask)
    found = run("auto", q, quantize(k, dtype), quantize(v, dtype), mask)
    assert_close(found, expected, tolerance)
    assert np.abs(np.asarray(found) - expected).max() > 1e-4  # it was quantised


def test_it_says_that_it_has_no_gradient():
    q, k, v = inputs(7, 1, 1, 8, 2, 2, 8)
    with pytest.raises(NotImplementedError, match="has no gradient: differentiate kernels.attention"):
        jax.grad(lambda q: decode_attention(q, k, v).sum())(q)


def test_split_over_batch_and_heads_nothing_is_gathered():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    q, k, v = inputs(8, 4, 2, 40, 4, 2, 8)
    mask = Mask(causal=True, q_offset=np.array([3, 9, 38, 20]))
    split = (place(q, "data", None, "tensor"), place(k, "data", "tensor"), place(v, "data", "tensor"))
    compiled = jax.jit(decode_attention).lower(*split, mask).compile()
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "permute") if word in compiled.as_text()]
    np.testing.assert_allclose(compiled(*split, mask), run("xla", q, k, v, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "tpu"}, ValueError, "can't do this: it is for tpu, and this is compiled for cpu"),
        ({"backend": "flash"}, ValueError, "no backend 'flash'; there are: auto, "),
        ({"q": (1, 2, 5, 8)}, ValueError, "multiple of the key heads"),
        ({"k": (1, 2, 30, 9)}, ValueError, "q and k also H"),
        ({"v": (1, 2, 31, 8)}, ValueError, "k and v also S and K"),
        ({"q": (2, 4, 8)}, ValueError, "must be B T N H, B K S H"),
        ({"k": (1, 2, 0, 8), "v": (1, 2, 0, 8)}, ValueError, "must not be empty"),
        ({"logit_softcap": 0.0}, ValueError, "must be positive, found 0.0"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"shape \(4,\)"),
        ({"mask": Mask(kv_length=np.zeros(2, int))}, ValueError, "Mask.kv_length must have shape"),
        ({"q_dtype": np.float16}, TypeError, "q must be one of bfloat16, float32, float64, found float16"),
        ({"q_dtype": jnp.bfloat16}, TypeError, "k must be bfloat16 as q is, or QuantizedVectors, found float32"),
        (
            {"v": QuantizedVectors(np.zeros((1, 2, 30, 8), np.int16), np.zeros((1, 2, 30)))},
            TypeError,
            "int8 or float8_e4m3fn",
        ),
        (
            {"v": QuantizedVectors(np.zeros((1, 2, 30, 8), np.int8), np.zeros((1, 2)))},
            ValueError,
            r"shape \(1, 2, 30\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    given = {"q": (1, 2, 4, 8), "k": (1, 2, 30, 8), "v": (1, 2, 30, 8)} | change
    given = {name: np.zeros(x, np.float32) if type(x) is tuple else x for name, x in given.items()}
    given["q"] = given["q"].astype(given.pop("q_dtype", np.float32))
    with pytest.raises(error, match=message):
        decode_attention(**given)


def test_the_kernel_refuses_what_it_cannot():
    def reason(devices, queries=1, dtype=np.float32):
        q, k, v = (np.zeros((1, n, 2, 8), dtype) for n in (queries, 2, 2))
        kind = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("x",), abstract_device=kind)):
            return tpu.refusal(q, k, v, Mask(), 1.0, None, None)

    assert reason(1) is None
    assert "can't split a kernel over a mesh" in reason(4)
    assert "at most 31 new tokens, found 32" in reason(1, queries=32)
    assert "no float64" in reason(1, dtype=np.float64)


def test_other_types_are_not_quantised_to():
    with pytest.raises(TypeError, match="quantised to int8 or float8_e4m3fn, found int16"):
        quantize(jnp.zeros((2, 3)), jnp.int16)
