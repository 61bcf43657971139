"""Greedy tokens against Transformers' `generate`."""

import numpy as np
import pytest
from cases import quick_and_slow
from parity import assert_close, decoder, saved, stretched, torch, wakeful

from vishwamai import VishwamAI
from vishwamai.data.batch import text_batch
from vishwamai.generation import generate

KINDS = {
    "qwen3, tied 4:1": {},
    "qwen3, untied 8:1": dict(tie_word_embeddings=False, num_key_value_heads=1),
    "qwen2": dict(family="qwen2"),
    "llama": dict(family="llama", seed=5, **stretched("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "mistral": dict(family="mistral", sliding_window=7),
    "gemma2": dict(family="gemma2", sliding_window=7),
    "gemma3": dict(family="gemma3", sliding_window=7, num_hidden_layers=4),
    "mixtral": dict(family="mixtral"),
    "qwen3_moe": dict(family="qwen3_moe", mlp_only_layers=[1]),
}


@pytest.mark.parametrize("kind", quick_and_slow(KINDS, ["qwen3, tied 4:1", "mistral", "gemma3", "qwen3_moe"]))
def test_greedy_tokens_equal_transformers(kind, tmp_path):
    theirs = wakeful(decoder(**{"seed": 4, **kind}))
    ours = VishwamAI.from_pretrained(saved(theirs, tmp_path))
    ids = np.random.default_rng(0).integers(1, 199, (4, 19))
    mask = np.ones_like(ids)
    mask[1, :7] = mask[3, :18] = 0  # unequal prompts, on the right

    def both(end):
        options = dict(max_new_tokens=24, do_sample=False, eos_token_id=end or None, pad_token_id=0)
        expected = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)[:, 19:].numpy()
        got = generate(ours.graph, ours.parameters, text_batch(ids, mask), max_new_tokens=24, end_ids=end, pad_id=0)
        return expected, got[:, : expected.shape[1]]

    expected, got = both([])
    np.testing.assert_array_equal(got, expected)
    assert min(len(set(row)) for row in got.tolist()) > 10
    end = [int(expected[0, 9]), int(expected[2, 4])]
    np.testing.assert_array_equal(*both(end))


def test_log_probabilities_equal_transformers(tmp_path):
    theirs = wakeful(decoder(seed=4))
    ours = VishwamAI.from_pretrained(saved(theirs, tmp_path))
    ids = np.random.default_rng(0).integers(1, 199, (3, 19))
    mask = np.arange(19) >= np.array([[0], [7], [18]])
    options = dict(max_new_tokens=24, repetition_penalty=1.3)
    given = dict(attention_mask=torch.tensor(mask), do_sample=False, eos_token_id=None, pad_token_id=0)
    out = theirs.generate(torch.tensor(ids), **options, **given, output_logits=True, return_dict_in_generate=True)
    got = ours.generate(ids, mask, stop=[], return_log_probabilities=True, **options)
    np.testing.assert_array_equal(got.tokens[:, 19:], out.sequences[:, 19:])
    expected = torch.stack(out.logits, dim=1).log_softmax(dim=-1).gather(2, out.sequences[:, 19:, None])[..., 0]
    assert_close(got.log_probabilities, expected)
