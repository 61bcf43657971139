"""cuDNN's attention: what is refused, and what the rest is lowered to. There is no GPU here: nothing is run."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import compiling_for

from kernels import Mask, attention, backends
from kernels.attention.gpu.cudnn import refusal

IDS = np.ones((2, 64), np.int32)


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks which cuDNN is installed even to lower for it."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91_000)


def lowered(mask: Mask, gradient: bool, backend: str, **options) -> str:
    q, kv = (jax.ShapeDtypeStruct((2, 64, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def run(q, k, v):
        return attention(q, k, v, mask, backend=backend, **options)

    def loss(*qkv):
        return run(*qkv).astype(jnp.float32).sum()

    with compiling_for():
        traced = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else run).trace(q, kv, kv)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("mask", "kind", "window"),
    [
        (Mask(), "NO_MASK", None),
        (Mask(causal=True), "CAUSAL", None),
        (Mask(causal=True, window=5), "CAUSAL", 5),
        (Mask(kv_length=np.array([5, 0])), "PADDING", None),
        (Mask(causal=True, kv_length=7), "PADDING_CAUSAL", None),
    ],
    ids=["full", "causal", "window", "lengths", "causal, length"],
)
def test_forward_and_backward_are_cudnn_calls(cudnn, mask, kind, window):
    text = lowered(mask, gradient=True, backend="cudnn").replace("\\22", '"')
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert re.findall(r'"mask_type": ?"(\w+)"', text) == [kind] * 2
    windows = [int(size) for size in re.findall(r'"sliding_window_length": ?(\d+)', text)]
    assert windows == [window or 0] * 2
    assert "dot_general" not in text  # a log-sum-exp that nobody reads is not computed


@pytest.mark.parametrize(
    ("capability", "can"), [("9.0", True), ("10.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)]
)
def test_a_gpu_that_is_here_must_be_of_a_kind_that_cudnn_takes(monkeypatch, capability, can):
    device = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind="any")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    reason = refusal(q, q, q, Mask(causal=True), 1.0, None, None)
    assert reason is None if can else "compute capability 8.0 (Ampere) and later, not for 'any'" in reason


def test_auto_takes_it_where_it_compiles_for_a_gpu(cudnn):
    assert "cudnn" in lowered(Mask(causal=True), gradient=False, backend="auto")
    assert "cudnn" not in lowered(Mask(causal=True, q_segment_ids=IDS), gradient=False, backend="auto")


def test_split_over_a_mesh_each_device_asks_cudnn(cudnn):
    q = jnp.zeros((2, 64, 4, 64), jnp.bfloat16)
    with compiling_for(shape=(2, 2), names=("data", "tensor")):
        split = functools.partial(attention, spec=jax.sharding.PartitionSpec("data", None, "tensor"))
        jaxpr = str(jax.make_jaxpr(split)(q, q, q))
        with pytest.raises(ValueError, match="can't do this: .* pass spec="):
            attention(q, q, q, backend="cudnn")
        assert "dot_product_attention" not in str(jax.make_jaxpr(attention)(q, q, q))
    assert "shard_map" in jaxpr and "dot_product_attention" in jaxpr and "bf16[1,64,2,64]" in jaxpr


def test_a_row_without_keys_is_never_asked_of_cudnn(cudnn, monkeypatch):
    """It is given one key, and gives 0: shown with XLA in cuDNN's place."""
    real, lengths = jax.nn.dot_product_attention, []

    def in_xla(*qkv, key_value_seq_lengths, implementation, **options):
        assert implementation == "cudnn"
        jax.debug.callback(lambda found: lengths.append(list(found)), key_value_seq_lengths)
        return real(*qkv, key_value_seq_lengths=key_value_seq_lengths, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    monkeypatch.setattr(backends, "target", lambda: "gpu")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 16, 2, 64)), jnp.bfloat16) for _ in range(3))
    k, v = (x.at[1].set(jnp.nan).at[0, 5:].set(jnp.nan) for x in (k, v))
    mask = Mask(causal=True, kv_length=np.array([5, 0]))

    def everything(backend, *qkv):
        out, pull = jax.vjp(functools.partial(attention, mask=mask, backend=backend), *qkv)
        return out, *pull(jnp.ones_like(out))

    ours, reference = (jax.jit(functools.partial(everything, backend))(q, k, v) for backend in ("cudnn", "reference"))
    jax.effects_barrier()
    assert lengths == [[5, 1]]
    for found, expected in zip(ours, reference, strict=True):
        assert not found[1].any()
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "takes bfloat16, not float32"),
        ({"width": 256}, "at most 128, not 256 and 256"),
        ({"width": 68}, "multiples of 8"),
        ({"v_width": 128}, "must be equal"),
        ({"logit_softcap": 2.0}, "no soft-cap"),
        ({"sinks": np.zeros(4, np.float32)}, "no sinks"),
        ({"mask": Mask(q_segment_ids=IDS)}, "knows no q_segment_ids"),
        ({"mask": Mask(causal=True, prefix_length=3)}, "knows no prefix_length"),
        ({"mask": Mask(causal=True, block_ids=IDS)}, "knows no block_ids"),
        ({"mask": Mask(causal=True), "keys": 32}, "as many keys as queries"),
        ({"mask": Mask(causal=True, q_offset=np.array([1, 2]))}, "q_offset=0"),
        ({"mask": Mask(causal=True, window=3, kv_length=9)}, "cuDNN promises nothing"),
    ],
)
def test_what_cudnn_can_not_do_is_refused(change, reason):
    width, dtype, keys = change.get("width", 64), change.get("dtype", jnp.bfloat16), change.get("keys", 64)
    q, k = jnp.zeros((2, 64, 4, width), dtype), jnp.zeros((2, keys, 2, width), dtype)
    v = jnp.zeros((2, keys, 2, change.get("v_width", width)), dtype)
    options = {name: change[name] for name in ("mask", "logit_softcap", "sinks") if name in change}
    with compiling_for(), pytest.raises(ValueError, match=f"attention's backend 'cudnn' can't do this: .*{reason}"):
        attention(q, k, v, backend="cudnn", **options)


def test_what_is_not_refused():
    q = jnp.zeros((2, 64, 4, 72), jnp.bfloat16)
    assert refusal(q, q, q, Mask(), 1.0, None, None) is None
