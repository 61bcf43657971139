"""Log-probabilities of tokens: against a float64 softmax of whole logits, and whatever a row is batched with."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import array_sizes

from vishwamai.checkpoint import CheckpointError
from vishwamai.data.batch import text_batch
from vishwamai.evaluation.scoring import NOT_SCORED, Row, Score, score, token_log_probabilities

VOCAB = 389


def random_rows(count: int, longest: int = 49, seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest + 1, count)
    return [Row(draw.integers(0, VOCAB, length), int(draw.integers(0, length))) for length in lengths]


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected(model, row: Row) -> Score:
    """From the logits of the row alone."""
    if not row.scored:
        return Score(0.0, True)
    probabilities = log_softmax(model(row.tokens[None, :-1]))[0, -row.scored :]
    asked = row.tokens[-row.scored :]
    picked = probabilities[np.arange(row.scored), asked]
    return Score(picked.sum(), bool((probabilities.argmax(axis=-1) == asked).all()))


def assert_same(found: list[Score], wanted: list[Score]) -> None:
    sums = [[each.log_probability for each in scores] for scores in (found, wanted)]
    np.testing.assert_allclose(*sums, rtol=0, atol=2e-4)
    assert [each.is_greedy for each in found] == [each.is_greedy for each in wanted]


def test_scores_equal_a_float64_softmax_whatever_shares_the_batch(model):
    rows = random_rows(11)
    rows.append(Row(rows[0].tokens[:1], 0))
    wanted = [expected(model, row) for row in rows]
    for batch_size in (1, 3, 16):
        assert_same(score(model, rows, batch_size), wanted)
    assert_same(score(model, rows[::-1], 4), wanted[::-1])


def test_progress_counts_the_rows_that_have_something_to_score(model):
    seen = []
    rows = [Row([3, 4, 5], 1), Row([3], 0), Row([5, 6], 1), Row([7, 8], 1)]
    score(model, rows, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_change_nothing_and_never_hold_the_logits_of_a_row(model, chunk):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 33))
    there = np.ones_like(tokens)
    there[1, 20:] = 0
    targets = np.random.default_rng(2).integers(0, VOCAB, (3, 33)).astype(np.int32)
    targets[1, 20:] = targets[0, :9] = targets[2, 4:30] = NOT_SCORED

    def run(targets):
        batch = text_batch(tokens, there)
        return token_log_probabilities(model.graph, model.parameters, batch, targets, chunk=chunk)

    log_probabilities, most_likely = run(targets)
    probabilities = log_softmax(model(tokens, there))
    picked = np.take_along_axis(probabilities, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    asked = targets != NOT_SCORED
    np.testing.assert_allclose(log_probabilities, np.where(asked, picked, 0), atol=2e-5)
    np.testing.assert_array_equal(most_likely, (probabilities.argmax(axis=-1) == targets) | ~asked)

    sizes = set(array_sizes(jax.make_jaxpr(run)(targets).jaxpr))
    logits, weights = 3 * min(chunk, 17) * VOCAB, model.parameters["lm_head"]["kernel"].get_value().size
    assert logits in sizes and max(size for size in sizes if size % VOCAB == 0) <= max(logits, weights)


def test_a_greedy_continuation_is_greedy_and_no_other(model):
    prompt = [40, 41, 42]
    tokens = model.generate([prompt], max_new_tokens=20, stop=[])[0]
    other = tokens.copy()
    other[-1] = (other[-1] + 1) % VOCAB
    unlikely = tokens.copy()  # what is not asked about need not be likely
    unlikely[1] = 7
    rows = [Row(tokens, 20), Row(tokens, 1), Row(other, 20), Row(other, 1), Row(tokens, 22), Row(other[:-1], 19)]
    assert [found.is_greedy for found in score(model, rows)] == [True, True, False, False, False, True]
    assert score(model, [Row(unlikely, 1)])[0] == pytest.approx(expected(model, Row(unlikely, 1)), abs=2e-4)


def test_of_equally_likely_tokens_the_lowest_id_is_greedy(uniform):
    found = score(uniform, [Row([5, 0], 1), Row([5, 1], 1), Row([5, 0, 0, 1], 3), Row([5, VOCAB - 1], 1)])
    assert [each.is_greedy for each in found] == [True, False, False, False]
    wanted = np.array([1, 1, 3, 1]) * -np.log(VOCAB)
    np.testing.assert_allclose([each.log_probability for each in found], wanted, rtol=1e-6)
    assert uniform.generate([[5]], max_new_tokens=1, stop=[])[0, 1] == 0  # as generation has it


def test_nothing_to_score_is_certain(model):
    assert score(model, []) == []
    assert score(model, [Row([], 0), Row([3, 4], 0)]) == [Score(0.0, True)] * 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(-2, 8))
def test_something_stands_before_the_scored_tokens(length, scored):
    if 0 <= scored < max(length, 1):
        Row(range(length), scored)
    else:
        with pytest.raises(ValueError, match=f"{scored} of {length} tokens are to be scored"):
            Row(range(length), scored)


def test_a_row_may_be_one_token_longer_than_the_context(model):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 50)
    assert_same(score(model, [Row(tokens[:49], 48)]), [expected(model, Row(tokens[:49], 48))])
    with pytest.raises(ValueError, match="a row of 50 tokens is to be scored, the context holds 48"):
        score(model, [Row(tokens, 1)])


@pytest.mark.parametrize("tokens", [[3, 389], [-1, 3], [389, 3]])
def test_ids_outside_the_vocabulary_are_errors(model, tokens):
    with pytest.raises(ValueError, match="the vocabulary's ids are 0 to 388"):
        score(model, [Row(tokens, 1)])


def test_a_model_that_gives_no_numbers_is_an_error(uniform):
    kernel = uniform.parameters["lm_head"]["kernel"]
    uniform.parameters["lm_head"]["kernel"] = kernel.replace(kernel.get_value() * np.nan)
    with pytest.raises(CheckpointError, match="no numbers"):
        score(uniform, [Row([3, 4], 1)])
