"""VishwamAI in EleutherAI's `lm_eval`: any of its tasks on our checkpoints (`pip install vishwamai[lm_eval]`).

    python -m vishwamai.evaluation.harness --model vishwamai --model_args pretrained=DIR,dtype=bfloat16 --tasks NAME

is `lm_eval`'s own command line, knowing our model: lm_eval looks for no models of other packages by itself. In Python:

    lm_eval.simple_evaluate(model=HarnessModel("runs/vishwamai_tiny"), tasks=["hellaswag"])

Answers are those of lm_eval's `hf` model on the same weights, up to rounding.
"""

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from vishwamai.chat_template import ConversationError, render
from vishwamai.config import ConfigError
from vishwamai.data.conversations import check_vocabulary
from vishwamai.evaluation.perplexity import prefix_token, windows
from vishwamai.evaluation.scoring import Row, Score, score
from vishwamai.generation.engine import check_cache_dtype
from vishwamai.pretrained import VishwamAI

logger = logging.getLogger(__name__)

SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")  # what a task may ask for besides a temperature
MAX_GEN_TOKS = 256  # where neither the task nor the caller says


@register_model("vishwamai")
class HarnessModel(TemplateLM):
    """A text model as lm_eval sees one.

    Args:
        pretrained: a run, one of its checkpoints, an exported folder, or a Hugging Face id.
        dtype: float32 or bfloat16.
        batch_size: rows at a time; a number.
        max_length: tokens of the context; default: the model's.
        cache_dtype: int8 or float8_e4m3fn keeps past keys and values in 8 bits where text is generated; log-likelihoods
            have no cache. Default: not quantised.
        chat_template_args: for the chat template, such as {"enable_thinking": False}.
        device: what lm_eval's command line says; not looked at, since JAX is told by JAX_PLATFORMS.

    Raises:
        ConfigError: as `VishwamAI.from_pretrained`; a tokenizer that is larger than the model's vocabulary, or has
            neither a token that begins nor one that ends a text.
        ValueError: a batch_size that is no number, a max_length that the context does not hold, another cache_dtype.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_length: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        device: str | None = None,
        cache_dtype: str | None = None,
    ):
        super().__init__()
        check_cache_dtype(cache_dtype)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: expected a number from 1; JAX can't try how many rows fit")
        self.model = VishwamAI.from_pretrained(pretrained, dtype)
        self.tokenizer = self.model.tokenizer
        check_vocabulary(self.tokenizer, self.model.config)
        if prefix_token(self.tokenizer) is None:
            raise ConfigError(
                f"the tokenizer in {self.tokenizer.folder} has neither bos_token nor eos_token, and lm_eval predicts "
                "a text's first token from one of them: name one in tokenizer_config.json"
            )
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        if not 1 < self.max_length <= context:
            raise ValueError(f"max_length={max_length}: expected 2 to the model's context, {context}")
        self.batch_size = int(batch_size)
        self.chat_template_args = chat_template_args or {}
        self.cache_dtype = cache_dtype

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose context is empty."""
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; None adds what the tokenizer puts around a text, unless the text begins with it already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt it ends inside the last message, to be gone on with.

        Raises ConversationError where there is no template, or it refuses the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise ConversationError(f"the tokenizer in {self.tokenizer.folder} has no chat template")
        options = {**self.tokenizer.special_tokens, **self.chat_template_args}
        options["add_generation_prompt"] = add_generation_prompt
        text = render(chat_history, self.tokenizer.chat_template, **options)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        begin = text.rindex(last.strip())
        # Some templates trim what is said.
        return text[:begin] + (last.lstrip() if text.startswith(last.lstrip(), begin) else last.strip())

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for (context, continuation), context_ids, continuation_ids in requests:
            if continuation and not continuation_ids:
                raise ValueError(
                    f"the tokenizer folds {continuation!r:.80} into what stands before it, {context[-80:]!r}: no token "
                    "of its own is left to score"
                )
            if len(continuation_ids) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation_ids)} tokens, the context holds {self.max_length}: "
                    f"{continuation!r:.80}"
                )
            ids = (context_ids or [self.prefix_token_id]) + continuation_ids
            # The last token is only looked for: it takes no room.
            if (excess := len(ids) - self.max_length - 1) > 0:
                logger.warning("%s tokens of a context are left out on the left: it holds %s", excess, self.max_length)
            rows.append(Row(ids[-(self.max_length + 1) :], len(continuation_ids)))
        scores = [tuple(found) for found in self._scores(rows, disable_tqdm)]
        for (texts, _, _), found in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, found)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        rows, ends = [], [0]
        for text in texts:
            ids = [self.prefix_token_id, *self.tok_encode(text)]
            spans = windows(len(ids), self.max_length, stride=self.max_length)
            rows += [Row(ids[start:end], scored) for start, end, scored in spans]
            ends.append(len(rows))
        found = [each.log_probability for each in self._scores(rows, disable_tqdm)]
        sums = [math.fsum(found[start:end]) for start, end in pairwise(ends)]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        in_order = Collator(
            [request.args for request in requests],
            sort_fn=lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        answers = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as progress:
            for number, chunk in enumerate(in_order.get_batched(n=self.batch_size)):
                contexts, options = [context for context, _ in chunk], chunk[0][1]
                for context, answer in zip(contexts, self._answers(contexts, options, number), strict=True):
                    self.cache_hook.add_partial("generate_until", (context, options), answer)
                    answers.append(answer)
                progress.update(len(chunk))
        return in_order.get_original(answers)

    def _answers(self, contexts: Sequence[str], options: dict[str, Any], number: int) -> list[str]:
        """One answer for each context; `number` is the batch's, so that no two batches draw the same."""
        options = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until = [text for text in handle_stop_sequences(options.pop("until"), end) if text]
        count, draws = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = options.pop("temperature", 1.0)
        seed = options.pop("seed", 0) + number
        if unknown := set(options) - set(SAMPLING):
            raise ValueError(
                f"the task asks for {', '.join(sorted(unknown))}; what can be asked for: until, max_gen_toks, "
                f"do_sample, temperature, seed, {', '.join(SAMPLING)}"
            )
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"max_gen_toks={count} leaves no room for a prompt, the context holds {self.max_length}: lower it"
            )
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        longest = max(map(len, prompts))
        if longest > room:
            logger.warning("of a prompt of %s tokens only the last %s are read, for want of room", longest, room)
        prompts = [prompt[-room:] for prompt in prompts]
        stop = [*self.model.end_ids, *until]
        options |= {"temperature": temperature if draws else 0.0, "seed": seed, "cache_dtype": self.cache_dtype}
        rows = self.model.generate(prompts, max_new_tokens=count, stop=stop, **options)[:, min(longest, room) :]
        return [self._text(row, until) for row in rows]

    def _text(self, row: np.ndarray, until: list[str]) -> str:
        ends = np.flatnonzero(np.isin(row, self.model.end_ids))  # padding stands behind the first
        text = self.tokenizer.decode(row[: ends[0] + 1] if len(ends) else row, skip_special_tokens=True)
        return postprocess_generated_text(text, until, think_end_token=None)

    def _scores(self, rows: Sequence[Row], quiet: bool) -> list[Score]:
        with tqdm(total=len(rows), disable=quiet, desc="Running loglikelihood requests") as progress:
            return score(self.model, rows, self.batch_size, lambda done, _: progress.update(done - progress.n))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
