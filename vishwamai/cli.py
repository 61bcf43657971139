"""`vishwamai convert from-hf SRC DST`, `vishwamai convert to-hf SRC DST`."""

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
    from_hf.add_argument("source", metavar="SRC", help="folder with config.json and safetensors, or owner/name")
    to_hf = directions.add_parser("to-hf", help="a run -> a folder that Transformers opens")
    to_hf.add_argument("source", metavar="SRC", help="run, or one of its checkpoints/STEP")
    for direction in (from_hf, to_hf):
        direction.add_argument("destination", metavar="DST", help="folder to write; must not exist, or be empty")
    return _convert(parser.parse_args(arguments))


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


if __name__ == "__main__":
    sys.exit(main())
