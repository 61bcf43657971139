"""`vishwamai convert from-hf | to-hf | inspect`, `upcycle`, `generate`, `tokenizer train`."""

import argparse
import logging
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vishwamai", description="Language and document models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="weights from and to Hugging Face")
    directions = convert.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    from_hf = directions.add_parser("from-hf", help="a Hugging Face folder or id -> a folder for our tools")
    from_hf.add_argument("source", metavar="SRC", help="folder with config.json and weights, or owner/name")
    to_hf = directions.add_parser("to-hf", help="a run -> a folder that Transformers opens")
    to_hf.add_argument("source", metavar="SRC", help="run, or one of its checkpoints/STEP")
    for direction in (from_hf, to_hf):
        direction.add_argument("destination", metavar="DST", help="folder to write; must not exist, or be empty")
        direction.set_defaults(run=_convert)
    inspect = directions.add_parser("inspect", help="a table of every tensor and its place; reads no weights")
    inspect.add_argument("source", metavar="DIR", help="Hugging Face folder, owner/name, run, or checkpoints/STEP")
    inspect.set_defaults(run=_inspect)
    upcycle = commands.add_parser("upcycle", help="a dense checkpoint becomes a mixture of experts")
    upcycle.add_argument("source", metavar="SRC", help="run, checkpoints/STEP, Hugging Face folder, or owner/name")
    upcycle.add_argument("destination", metavar="DST", help="folder to write; must not exist, or be empty")
    upcycle.add_argument("--experts", required=True, type=int, metavar="E", help="experts of each layer")
    upcycle.add_argument("--top-k", required=True, type=int, metavar="K", help="experts that a token goes to")
    upcycle.add_argument("--seed", type=int, default=0, help="of the routers (default: 0)")
    upcycle.set_defaults(run=_upcycle)
    generate = commands.add_parser("generate", help="text that continues a prompt")
    generate.add_argument("--checkpoint", required=True, metavar="DIR", help="run, exported folder, or owner/name")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--chat", action="store_true", help="the prompt is a question: use the chat template")
    generate.add_argument("--stream", action="store_true", help="print the text as it comes")
    generate.add_argument("--max-new-tokens", type=int, help="tokens at most (default: 256)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    generate.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    generate.add_argument("--top-p", type=float, help="draw from tokens that add up to this share")
    generate.add_argument("--min-p", type=float, help="draw from tokens this likely, beside the most likely one")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default: 1)")
    generate.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    generate.add_argument("--stop", action="append", help="text that ends the answer; repeats")
    generate.add_argument("--draft", metavar="DIR", help="a much smaller model that proposes tokens: the same, sooner")
    generate.add_argument("--cache-dtype", help="keep keys and values in 8 bits: int8 or float8_e4m3fn (default: no)")
    generate.set_defaults(run=_generate)
    tokenizer = commands.add_parser("tokenizer", help="tokenizers of one's own")
    train = tokenizer.add_subparsers(required=True, metavar="ACTION").add_parser("train", help="learn one from text")
    train.add_argument("--input", required=True, nargs="+", metavar="PATH", help="files, folders, globs: data.datasets")
    train.add_argument("--vocab-size", required=True, type=int, metavar="N", help="ids in all: symbols, bytes, pieces")
    train.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    train.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help="default: unigram")
    train.add_argument("--format", default="auto", help="text, jsonl, parquet, hf, tfds, python (default: by the path)")
    train.add_argument("--text-field", default="text", metavar="NAME", help="field that holds the text (default: text)")
    train.add_argument("--split", metavar="NAME", help="of a dataset (default: train)")
    train.add_argument("--sampling-strategy", default="all", metavar="PART", help="e.g. first:90%% (default: all)")
    train.set_defaults(run=_train_tokenizer)
    options = parser.parse_args(arguments)
    return options.run(options)


def _convert(options: argparse.Namespace) -> int:
    # Imported here: JAX takes seconds to load, `--help` should not.
    from vishwamai.checkpoint import CheckpointError
    from vishwamai.config import ConfigError
    from vishwamai.convert.from_hf import from_hf
    from vishwamai.convert.to_hf import to_hf

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs there what is reported below
    convert = {"from-hf": from_hf, "to-hf": to_hf}[options.direction]
    try:
        opened = convert(options.source, options.destination)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{opened.folder} ({opened.family.name}) -> {options.destination}: {len(opened.tensors)} tensors")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from vishwamai.checkpoint import CheckpointError
    from vishwamai.config import ConfigError
    from vishwamai.convert.inspect import places, table
    from vishwamai.convert.source import Published, open_source

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        opened = open_source(options.source)
        print(table(places(opened)))
        if isinstance(opened, Published):
            opened.check_names()
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _upcycle(options: argparse.Namespace) -> int:
    from vishwamai.checkpoint import CheckpointError
    from vishwamai.config import ConfigError
    from vishwamai.convert.upcycle import upcycle

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        family = upcycle(options.source, options.destination, options.experts, options.top_k, options.seed)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.destination} ({family.name}): {options.experts} experts, {options.top_k} for each token")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from vishwamai.chat import encode_prompt
    from vishwamai.checkpoint import CheckpointError
    from vishwamai.pretrained import VishwamAI

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "cache_dtype")
    try:
        model = VishwamAI.from_pretrained(options.checkpoint)
        draft = VishwamAI.from_pretrained(options.draft) if options.draft else None
        stop = [*model.end_ids, *options.stop] if options.stop else None
        if options.chat:
            ids = encode_prompt([{"role": "user", "content": options.prompt}], model.tokenizer).tokens
        else:
            ids = model.tokenizer.encode(options.prompt)
        shown, tokens = "", []
        pieces = model.stream([ids], stop=stop, draft=draft, **{name: getattr(options, name) for name in names})
        for piece in pieces:
            tokens.extend(piece.tolist())
            text = model.tokenizer.decode(tokens, skip_special_tokens=True)
            if options.stream and not text.endswith("\ufffd"):  # half of a character
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text[len(shown) :])
    return 0


def _train_tokenizer(options: argparse.Namespace) -> int:
    from vishwamai.config import ConfigError, validate
    from vishwamai.data.documents import DocumentsConfig, open_documents
    from vishwamai.data.sources import DataError
    from vishwamai.tokenizer_training import ModelType, train_tokenizer

    names = ("format", "text_field", "split", "sampling_strategy")
    shared = {name: getattr(options, name) for name in names}
    try:
        entries = [validate(DocumentsConfig, {"path": path, **shared}, "tokenizer train") for path in options.input]
        documents = open_documents(entries, seed=0)
        train_tokenizer(documents, options.vocab_size, options.output, ModelType(options.model_type))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.vocab_size} ids learned from {len(documents)} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
