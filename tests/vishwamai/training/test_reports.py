"""What a person sees: progress, tables, the dry run, the batch; and how speed is counted."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vishwamai import experiment, families
from vishwamai.config import describe
from vishwamai.models.qwen3 import FAMILY
from vishwamai.tiny_tokenizer import ALPHABET, build_tiny_tokenizer
from vishwamai.tokenizer import VishwamAITokenizer
from vishwamai.training import progress
from vishwamai.training.progress import ProgressReport, duration
from vishwamai.training.show import assemble, show_batch
from vishwamai.training.summary import columns, dry_run, field_table, trainable_table
from vishwamai.training.throughput import flops_per_step, memory_gb, peak_flops


def line(step):
    return {"step": step, "loss": 2.5, "tokens_per_second": 12345.6}


def report(steps, terminal, seen, monkeypatch, seconds_per_step=4.0):
    clock = iter(np.arange(100) * seconds_per_step)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with ProgressReport(0, steps, Console(file=out, force_terminal=terminal, width=90)) as shown:
        for step in seen:
            shown.update(line(step))
    return out.getvalue()


def test_lines_now_and_then_where_there_is_no_terminal(monkeypatch):
    lines = report(9, False, range(1, 10), monkeypatch).splitlines()
    assert [text.split()[1] for text in lines] == ["1/9", "4/9", "7/9", "9/9"]  # 4 s a step, 10 s between lines
    assert lines[0] == "step 1/9  loss 2.5000  12,346 tokens/s"
    assert lines[1] == "step 4/9  loss 2.5000  12,346 tokens/s  0:00:20 left"


def test_a_bar_on_a_terminal(monkeypatch):
    out = io.StringIO()
    with ProgressReport(5, 9, Console(file=out, force_terminal=True, width=90)) as shown:
        shown.update(line(8))
    assert "8/9" in out.getvalue() and "loss 2.5000  12,346 tokens/s" in out.getvalue()


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3600, 36061)] == ["0:00:00", "0:01:00", "1:00:00", "10:01:01"]


def test_columns_align():
    assert columns([("a", "n"), ("longer", "1,000")]) == "  a       n\n  longer  1,000"


def test_trainable_table_is_exact(trainer_for):
    table = trainable_table(trainer_for(training={"trainable": ["layers.mlp.*", "norm.scale"]}))
    rows = {row[0]: row[1:] for row in (line.split() for line in table.splitlines())}
    mlp, layer = 3 * 32 * 64, 4 * 32 * 32 + 2 * 32 + 2 * 4
    assert rows["layers"] == [f"{3 * mlp:,}", f"{3 * layer:,}", "0"]
    assert rows["embed_tokens"] == ["0", "2,048", "0"]
    assert rows["total"] == [f"{3 * mlp + 32:,}", f"{3 * layer + 2048:,}", "0"]


def test_dry_run_of_a_pod_touches_no_device(tiny, monkeypatch):
    monkeypatch.setattr("jax.devices", lambda *_: pytest.fail("asked for devices"))
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 151936}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    text = dry_run(
        tiny(model=big | heads, mesh={"fsdp": 64, "tensor": 8, "data": -1}, training={"batch_size": 1024}), FAMILY
    )
    assert "layers.mlp.up_proj.kernel              [80, 8192, 28672]  float32  (-, fsdp, tensor)" in text
    layer = 8192 * 128 * (64 + 8 + 8 + 64) + 3 * 8192 * 28672 + 2 * 8192 + 2 * 128
    assert f"total         {80 * layer + 151936 * 8192 + 8192:,}       0        0" in text
    assert "data=1, fsdp=64, tensor=8 (the axis of -1 takes what is left at start" in text
    assert "No Transformers class" not in text


def test_dry_run_names_what_cannot_be_exported(tiny):
    layout = replace(FAMILY.layout, unsupported=lambda model, data: ["model.pooling=average_2x2: not there"])
    text = dry_run(tiny(), replace(FAMILY, layout=layout))
    assert "No Transformers class computes this config (it trains, but can't be exported):\n  model.pooling" in text


def test_help_lists_every_field():
    text = field_table()
    for family in families.names():
        assert f"Fields of `family: {family}`" in text
        for key, _, default, meaning in describe(experiment.schema(family)):
            (line,) = [line for line in field_table(family).splitlines() if line.split()[:1] == [key]]
            assert meaning and meaning in line and f"[{default}]" in line
    assert "optimizer.learning_rate " in text and "[0.0003]" in text and "peak learning rate" in text
    one = field_table("qwen3")
    assert "model.rope_theta" in one and "data.max_length" in one and "family: siglip" not in one


def test_images_come_back_from_their_patches():
    page = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    patches = page.reshape(2, 4, 3, 4, 3).transpose(0, 2, 4, 1, 3).reshape(6, 48)
    positions = np.stack(np.meshgrid(range(2), range(3), indexing="ij"), -1).reshape(6, 2)
    order = np.random.default_rng(1).permutation(6)
    assert (assemble(patches[order], positions[order]) == page).all()
    assert (assemble((patches / np.float32(127.5) - 1)[order], positions[order]) == page).all()


@pytest.fixture
def tokenizer(tmp_path):
    build_tiny_tokenizer(ALPHABET, (), "", tmp_path / "tokenizer")
    return VishwamAITokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_batch_is_shown_as_text_masks_and_images(source, tokenizer, tmp_path):
    batch = source.batch(0)
    text = [tokenizer.token_to_id(letter) for letter in "what?4_ab"]
    index = np.full(batch.tokens.shape, -1, np.int32)
    index[0, 2:4] = [0, 1]
    batch.tokens[0, : len(text)] = text
    batch.segment_ids[0] = [1] * 7 + [2] * 2 + [0] * 12
    batch.loss_weights[0] = [0] * 5 + [1] * 2 + [0, 1] + [0] * 12
    patches = np.full((8, 2, 48), 200, np.uint8)
    owner = np.zeros((8, 2), np.int32)
    owner[0] = 1
    positions = np.broadcast_to(np.array([[0, 0], [0, 1]], np.int32), (8, 2, 2))
    batch = replace(batch, feature_index=index, patches=patches, patch_segment_ids=owner, patch_positions=positions)
    shown = show_batch(batch, tokenizer, tmp_path / "show_batch", colour=False, rows=1)
    assert "== row 0: 2 examples, 9 of 21 tokens, 3 trained on" in shown
    assert "-- example 1\nwh[2 image features]?⟦4_⟧\n-- example 2\na⟦b⟧" in shown
    path = tmp_path / "show_batch" / "row0_image1.png"
    assert str(path) in shown
    with Image.open(path) as image:
        assert image.size == (8, 4) and image.getpixel((0, 0)) == (200, 200, 200)
    assert "\x1b[1;32m" in show_batch(batch, tokenizer, tmp_path, colour=True)


def test_flops_of_a_text_model(trainer_for, source):
    """6 per matrix parameter and token, the tied output matrix once, and causal attention."""
    trainer = trainer_for()
    batch = source.batch(0)
    matrices = 3 * (4 * 32 * 32 + 3 * 32 * 64) + 64 * 32
    attention = 12 * 3 * 32 * 21 / 2
    model = trainer.graph and SimpleNamespace(
        num_hidden_layers=3, num_attention_heads=8, head_dim=4, tie_word_embeddings=True
    )
    assert flops_per_step(trainer.abstract, model, batch) == (6 * matrices + attention) * 8 * 21
    frozen = trainer_for(training={"trainable": ["norm.scale"]})
    assert flops_per_step(frozen.abstract, model, batch) == (4 * matrices + attention) * 8 * 21


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("NVIDIA H200", 989), ("TPU v9", None), ("cpu", None)],
)
def test_peaks(kind, tflops):
    found = peak_flops(SimpleNamespace(device_kind=kind))
    assert found == (tflops and tflops * 1e12)


def test_memory_is_counted():
    assert 0.05 < memory_gb() < 64
