"""`vishwamai convert to-hf SRC DST`: a run as a folder that Transformers opens."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vishwamai import experiment
from vishwamai.config import Config, ConfigError, differences, read_yaml
from vishwamai.convert.folder import CARRIED, NAMES, beside_weights, fresh_folder
from vishwamai.convert.mixture_keys import TRAINING
from vishwamai.convert.parameters import Tensors
from vishwamai.convert.source import Published, Run, open_source
from vishwamai.convert.weights import SHARD_BYTES, ShardWriter
from vishwamai.tokenizer import VishwamAITokenizer


def to_hf(source: str | Path, destination: str | Path, shard_bytes: int = SHARD_BYTES) -> Run:
    """Writes a run (or one of its checkpoints) as safetensors with everything that Transformers wants beside them.

    One layer's array, or some small ones, are in memory at a time.

    Of a run that came from Hugging Face the source's own files and names are kept; what the run changed is updated in
    its config.json. Returns what was read.

    Raises:
        ConfigError: a config with parts that no Transformers class computes, `destination` is not empty, or the
            source can't be read (see `open_source`).
    """
    opened = open_source(source)
    if not isinstance(opened, Run):
        raise ConfigError(f"{opened.folder} is a Hugging Face folder already, expected a run (config.yaml)")
    export(opened, opened.tensors, destination, shard_bytes)
    return opened


def export(opened: Published | Run, tensors: Tensors, destination: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `tensors` (of the model in `opened`, under today's names) with what lies beside its weights.

    Raises ConfigError as `to_hf`.
    """
    layout = opened.family.layout
    if parts := layout.unsupported(opened.config, _data(opened.folder)):
        raise ConfigError(f"{opened.folder}: {layout.architectures[0]} does not compute\n  " + "\n  ".join(parts))
    if isinstance(opened, Published):
        beside, naming, repeated = opened.folder, opened.naming, opened.repeated
    else:
        beside = opened.folder / CARRIED
        names = _read_json(beside / NAMES) or {"naming": layout.namings[0].name, "repeated": {}}
        naming, repeated = layout.naming(names["naming"]), names["repeated"]
    companions = {} if beside.is_dir() else _companions(opened)
    with fresh_folder(destination) as folder:
        for place in (beside, opened.folder / "tokenizer"):
            if place.is_dir():
                _copy_files(place, folder)
        copies = {original: copy for copy, original in repeated.items()}
        spelled = [naming.spell(name) for name in tensors]
        writer = ShardWriter(folder, [*spelled, *copies.values()], shard_bytes)
        dtypes = set()
        for name, tensor in tensors.items():
            dtypes.add(str(tensor.dtype))
            writer.write(naming.spell(name), tensor)
            if naming.spell(name) in copies:
                writer.write(copies[naming.spell(name)], tensor)
        writer.close()
        _write_json(folder / "config.json", _config(opened, _read_json(beside / "config.json"), dtypes))
        for name, content in companions.items():
            _write_json(folder / name, content)


def _data(folder: Path):
    """A run's data section; None in a folder that was not trained here."""
    path = folder / "config.yaml"
    return experiment.load(path).data if path.is_file() and "data" in read_yaml(path) else None


def _config(opened: Published | Run, source: dict[str, Any] | None, dtypes: set[str]) -> dict[str, Any]:
    """The source's config.json, changed only where the run's model or types differ from it."""
    layout = opened.family.layout
    written = layout.write_config(opened.config)
    if source is None or source["architectures"] != written["architectures"]:
        source = {}
    config = source if source and _same(layout.read_config(source), opened.config) else _merged(source, written)
    return _with_dtype(config, dtypes.pop()) if len(dtypes) == 1 else config


def _same(one: Config, other: Config) -> bool:
    """Whether two configs are of the same model, however it is trained."""
    keys = differences(one.model_dump(mode="json"), other.model_dump(mode="json"))
    return all(key.split(".")[-1] in TRAINING for key in keys)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Transformers casts weights to the type that a config names, so it must be the one they have."""
    named = {"dtype", "torch_dtype"} & set(config) or {"dtype"}
    config = config | dict.fromkeys(sorted(named), dtype)
    inner = {
        key: _with_dtype(value, dtype)
        for key, value in config.items()
        if isinstance(value, Mapping) and {"dtype", "torch_dtype"} & set(value)
    }
    return config | inner


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inner = {key: _merged(base[key], value) for key, value in changes.items() if _both_nested(base.get(key), value)}
    return {**base, **changes, **inner}


def _both_nested(a: Any, b: Any) -> bool:
    return isinstance(a, Mapping) and isinstance(b, Mapping)


def _companions(opened: Published | Run) -> dict[str, dict[str, Any]]:
    """Files that a run without a Hugging Face source needs beside its tokenizer's."""
    try:
        tokenizer = VishwamAITokenizer.from_pretrained(opened.folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{opened.folder}: Transformers needs the tokenizer beside the weights: {error}") from error
    ids = {
        "eos_token_id": list(tokenizer.eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    known = {key: value for key, value in ids.items() if value not in (None, [])}
    return {"generation_config.json": known} | opened.family.layout.companions(opened.config, tokenizer)


def _copy_files(source: Path, folder: Path) -> None:
    for path in beside_weights(source):
        if path.name != NAMES:
            shutil.copyfile(path, folder / path.name)


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes content; a file that says the same already stays as it is, byte for byte."""
    if _read_json(path) != content:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
