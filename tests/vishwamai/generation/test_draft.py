"""Speculative decoding: the same tokens as without a draft, whatever it proposes."""

import jax
import numpy as np
import pytest
from cases import quick_and_slow
from flax import nnx

from vishwamai.generation import Draft, Generation, Sampling, generate, left_padded
from vishwamai.models.config import LayerType, MixtureConfig, TextConfig
from vishwamai.models.transformer import Transformer

CONFIG = TextConfig(
    vocab_size=97, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
PROMPTS = [[5, 9, 11, 2, 40, 41, 42, 7, 7, 3, 12], [3], [8, 1, 60, 61, 62]]
KINDS = {
    "full": {},
    "windows": dict(sliding_window=3, layer_types=(LayerType.SLIDING, LayerType.FULL), num_hidden_layers=3),
    "window of 1": dict(sliding_window=1),
    "mixture": dict(
        sliding_window=6,
        mixture=MixtureConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, capacity_factor=1.0),
    ),
}
COUNT = 21  # a first token and four turns of five


def split(seed=1, **changes):
    model = Transformer(CONFIG.model_copy(update=changes), rngs=nnx.Rngs(seed))
    model.embed_tokens.embedding[...] *= 0.1  # or a tied output repeats what came in
    return nnx.split(model)


def equal(parameters):
    return parameters


def similar(parameters):
    """Right now and then."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(parameters))))
    return jax.tree.map(lambda x: x + 0.07 * x.std() * jax.random.normal(next(keys), x.shape), parameters)


def opposite(parameters):
    """Proposes what the model finds the least likely."""
    changed = jax.tree.map(lambda x: x, parameters)
    changed["norm"]["scale"].set_value(-parameters["norm"]["scale"].get_value())
    return changed


def run(model, draft=None, prompts=PROMPTS, count=COUNT, steps=(), **options):
    """A generation that has gone on to its end, by way of `steps`."""
    draft = draft and Draft(model[0], draft(model[1]), options.pop("draft_tokens", 4))
    options = dict(end_ids=[], pad_id=0) | options
    generation = Generation(*model, left_padded(prompts, 0), max_new_tokens=count, draft=draft, **options)
    for step in (*steps, count):
        generation.advance(step)
        assert generation.lengths.max() <= step
    assert generation.done
    return generation


@pytest.fixture(scope="module")
def small():
    return split()


@pytest.mark.parametrize("kind", quick_and_slow(KINDS, ["full", "window of 1"]))
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_greedy_tokens_are_those_without_a_draft(kind, seed):
    model = split(seed, **kind)
    expected = run(model).tokens
    assert len(set(expected.ravel().tolist())) > 10
    accepted = {}
    for draft in (equal, similar, opposite):
        got = run(model, draft)
        np.testing.assert_array_equal(got.tokens, expected)
        accepted[draft] = got.accepted / got.proposed
        assert got.accepted <= got.proposed
    assert accepted[equal] == 1 and accepted[opposite] < 0.05 < accepted[similar] < 0.95


def test_a_draft_that_is_right_saves_four_steps_of_five(small):
    got = run(small, equal)
    assert got.proposed == got.accepted == 3 * 16  # four turns; the fifth token of each is the model's own
    assert run(small, equal, draft_tokens=1, count=9).accepted == 3 * 4
    assert run(small).proposed == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0, top_p=0.9, seed=3),
        dict(repetition_penalty=1.8),
        dict(temperature=0.7, repetition_penalty=1.3),
    ],
    ids=["sampled", "penalty", "both"],
)
def test_draws_and_penalties_are_those_without_a_draft(small, options):
    """A penalty looks at what was accepted, and draws do not depend on how tokens were proposed."""
    options = dict(sampling=Sampling(**options), samples=2)
    expected = run(small, **options).tokens
    assert len({tuple(row) for row in expected.tolist()}) == (6 if options["sampling"].temperature else 3)
    for draft in (equal, similar):
        got = run(small, draft, **options)
        np.testing.assert_array_equal(got.tokens, expected)
        assert 0.05 * got.proposed < got.accepted
    assert run(small, equal, **options).accepted == 6 * 16


def test_rows_go_on_by_what_they_accept_alone(small):
    together = run(small, similar)
    alone = [run(small, similar, [prompt]) for prompt in PROMPTS]
    assert len({one.proposed for one in alone}) > 1
    assert together.proposed == sum(one.proposed for one in alone)
    assert together.accepted == sum(one.accepted for one in alone)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [equal, similar])
def test_rows_end_within_an_accepted_run(small, draft):
    free = run(small).tokens
    for places in ([(0, 2), (2, 6)], [(1, 5), (0, 1)], [(0, 0)]):
        ends = [int(free[place]) for place in places]
        plain, got = (run(small, which, end_ids=ends, pad_id=96) for which in (None, draft))
        np.testing.assert_array_equal(got.tokens, plain.tokens)
        np.testing.assert_array_equal(got.lengths, plain.lengths)
        assert got.lengths.min() < COUNT


@pytest.mark.parametrize("draft", [equal, similar])
def test_the_loop_stops_where_it_is_told_and_goes_on(small, draft):
    expected = run(small).tokens
    np.testing.assert_array_equal(run(small, draft, steps=(1, 3, 4, 11, 17)).tokens, expected)
    for count in (17, 18, 20):  # of one bucket: no room behind the last
        np.testing.assert_array_equal(run(small, draft, count=count).tokens, expected[:, :count])


@pytest.mark.slow
def test_shapes_and_the_context_can_be_filled_to_the_last_token(small):
    for length, count in [(8, 8), (40, 24)]:
        prompt = np.random.default_rng(length).integers(1, 97, length).tolist()
        expected = run(small, prompts=[prompt], count=count).tokens
        for draft in (equal, opposite):
            np.testing.assert_array_equal(run(small, draft, [prompt], count).tokens, expected)


def test_rows_that_were_cut_stay_so(small):
    generation = Generation(
        *small, left_padded(PROMPTS, 0), max_new_tokens=COUNT, end_ids=[], pad_id=0, draft=Draft(*small)
    )
    generation.advance(8)
    generation.cut({1: 3})
    generation.advance(COUNT)
    expected = run(small).tokens.copy()
    expected[1, 3:] = 0
    np.testing.assert_array_equal(generation.tokens, expected)


def test_another_shape_of_draft(small):
    draft = split(4, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, sliding_window=2)
    got = generate(*small, left_padded(PROMPTS, 0), max_new_tokens=COUNT, end_ids=[], pad_id=0, draft=Draft(*draft))
    np.testing.assert_array_equal(got, run(small).tokens)


def test_drafts_that_can_not_propose(small):
    with pytest.raises(ValueError, match="the draft has a vocabulary of 98 tokens, the model of 97"):
        generate(
            *small, left_padded([[3]], 0), max_new_tokens=2, end_ids=[], pad_id=0, draft=Draft(*split(vocab_size=98))
        )
    with pytest.raises(ValueError, match="draft_tokens=0: expected at least 1"):
        run(small, equal, draft_tokens=0)
