"""Rotary positions in a config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""

from typing import Any

from vishwamai.convert.hf_config import Reader, build
from vishwamai.models.config import RopeScaling, RopeType

_KEYS = {  # what each kind of scaling has, beside rope_type and rope_theta
    RopeType.LINEAR: ("factor",),
    RopeType.LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeType.YARN: (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    ),
}  # fmt: skip
_WHY = "all of a head is turned"


def read_rope(reader: Reader, longest: int, default_theta: float) -> tuple[float, RopeScaling | None]:
    """The rotary base and scaling of a config whose context is `longest`. Raises ConfigError for other scalings."""
    reader.insist("partial_rotary_factor", [1], _WHY)
    theta, scaling = reader.get("rope_theta", default_theta), None
    for key in ("rope_scaling", "rope_parameters"):
        if reader.get(key, None):
            theta, scaling = read_rope_section(reader.inner(key), longest, theta)
    return theta, scaling


def read_rope_section(rope: Reader, longest: int, theta: float) -> tuple[float, RopeScaling | None]:
    """What one section says; `theta` where it names no base."""
    rope.insist("partial_rotary_factor", [1], _WHY)
    theta = rope.get("rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    name = "rope_type" if "rope_type" in rope.section else "type"
    rope.insist(name, ["default", *RopeType], "other ways to stretch the rotary embedding are not computed")
    if kind == "default":
        return theta, None
    found = {name: rope.get(name, None) for name in _KEYS[RopeType(kind)]}
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = found["original_max_position_embeddings"] or longest
    known = {name: value for name, value in found.items() if value is not None}
    return theta, build(RopeScaling, rope.where, rope_type=kind, **known)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The section that `read_rope_section` reads."""
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if scaling is None:
        return rope
    values = {key: getattr(scaling, key) for key in _KEYS[scaling.rope_type]}
    return rope | {"rope_type": scaling.rope_type.value, **{k: v for k, v in values.items() if v is not None}}
