"""What decoder families share at Hugging Face: names of tensors, keys of config.json. A family adds what is its own."""

from collections.abc import Callable, Mapping
from typing import Any

from vishwamai.config import ConfigError
from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.layout import LAYER, Layout, Row, inside, linear, norm
from vishwamai.data.text import TextData, batch_source
from vishwamai.families import Family
from vishwamai.models.config import RopeScaling, RopeType, TextConfig
from vishwamai.models.pattern import find_pattern, parts_of
from vishwamai.models.transformer import Transformer

SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings initializer_range"
).split()
ROPE_KEYS = {  # what each kind of scaling has in config.json, beside rope_type and rope_theta
    RopeType.LINEAR: ("factor",),
    RopeType.LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    RopeType.YARN: (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor",
        "mscale", "mscale_all_dim",
    ),
}  # fmt: skip


def rows(config: TextConfig) -> list[Row]:
    """The name table."""
    layers = []
    for ours, stack in parts_of(find_pattern(config.kinds)):
        numbers = stack.numbers if stack.stacked else None
        theirs = LAYER if stack.stacked else stack.name
        layers += inside(_layer(config), f"{ours}.", f"model.layers.{theirs}.", layers=numbers)
    return [
        Row(("embed_tokens.embedding",), "model.embed_tokens.weight"),
        *layers,
        *norm("norm", "model.norm"),
        *([] if config.tie_word_embeddings else linear("lm_head", "lm_head")),
    ]


def _layer(config: TextConfig) -> list[Row]:
    on_inputs, on_output = config.attention_bias.of_layers
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.sandwich_norms else []
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
    linears = {f"self_attn.{name}_proj": on_inputs for name in "qkv"} | {"self_attn.o_proj": on_output}
    linears |= {f"mlp.{name}_proj": config.mlp_bias for name in ("gate", "up", "down")}
    return [row for name in norms for row in norm(name, name)] + [
        row for name, bias in linears.items() for row in linear(name, name, bias)
    ]


def duplicates(config: TextConfig) -> dict[str, str]:
    """Some published files (Qwen3-0.6B) hold the tied output matrix a second time."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def read_decoder(reader: Reader, defaults: Mapping[str, Any], **own: Any) -> TextConfig:
    """A TextConfig from a config.json; `defaults` are Transformers' for keys left out, `own` what the family adds.

    Raises ConfigError for what no family of ours computes.
    """
    reader.insist("hidden_act", ["silu"], "the feed-forward block is SwiGLU")
    reader.insist("attention_dropout", [0], "there is no dropout")
    sizes = {name: reader.get(name, defaults[name]) for name in SIZES if name in defaults}
    heads = sizes["num_attention_heads"]
    # An explicit null means as many as query heads, an absent key Transformers' default.
    kv_heads = heads if "num_key_value_heads" in reader.section else defaults.get("num_key_value_heads", heads)
    sizes["num_key_value_heads"] = reader.get("num_key_value_heads", kv_heads)
    sizes.setdefault("head_dim", reader.get("head_dim", sizes["hidden_size"] // heads))
    theta, scaling = read_rope(reader, sizes["max_position_embeddings"])
    return build(TextConfig, reader.where, rope_theta=theta, rope_scaling=scaling, **sizes, **own)


def read_rope(reader: Reader, longest: int) -> tuple[float, RopeScaling | None]:
    """The rotary base and scaling from `rope_parameters`, or from `rope_theta` and `rope_scaling` of older files."""
    why = "all of a head is turned"
    reader.insist("partial_rotary_factor", [1], why)
    theta, scaling = reader.get("rope_theta", 10000.0), None
    for key in ("rope_scaling", "rope_parameters"):
        if not reader.get(key, None):
            continue
        rope = reader.inner(key)
        rope.insist("partial_rotary_factor", [1], why)
        theta = rope.get("rope_theta", theta)
        kind = rope.get("rope_type", rope.get("type", "default"))
        name = "rope_type" if "rope_type" in rope.section else "type"
        rope.insist(name, ["default", *RopeType], "other ways to stretch the rotary embedding are not computed")
        scaling = None
        if kind != "default":
            found = {name: rope.get(name, None) for name in ROPE_KEYS[RopeType(kind)]}
            if "original_max_position_embeddings" in found:
                found["original_max_position_embeddings"] = found["original_max_position_embeddings"] or longest
            known = {name: value for name, value in found.items() if value is not None}
            scaling = build(RopeScaling, rope.where, rope_type=kind, **known)
    return theta, scaling


def read_window(reader: Reader, layers: int) -> int | None:
    """The window of Qwen's models, which have one key to switch it on and two that say for which layers."""
    on, first = reader.get("use_sliding_window", False), reader.get("max_window_layers", 28)
    by_number = ["sliding_attention" if on and layer >= first else "full_attention" for layer in range(layers)]
    kinds = sorted(set(reader.get("layer_types", by_number)))
    if kinds == ["full_attention"]:
        return None
    if kinds != ["sliding_attention"] or not on:
        raise ConfigError(
            f"{reader.where}: use_sliding_window={on} with layers of {' and '.join(kinds)} can't be computed here: "
            "either all layers have a window or none"
        )
    return reader.get("sliding_window", 4096)


def write_window(config: TextConfig) -> dict[str, Any]:
    """The keys that `read_window` reads."""
    window = config.sliding_window
    keys = {} if window is None else {"sliding_window": window, "max_window_layers": 0}
    return {"use_sliding_window": window is not None, **keys}


def write_decoder(config: TextConfig, architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    """A config.json that Transformers opens as `architecture`."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling is not None:
        values = {key: getattr(scaling, key) for key in ROPE_KEYS[scaling.rope_type]}
        rope |= {"rope_type": scaling.rope_type.value, **{k: v for k, v in values.items() if v is not None}}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{key: getattr(config, key) for key in SIZES},
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        **own,
    }


def decoder_family(
    name: str,
    architecture: str,
    read_config: Callable[[Mapping[str, Any], str], TextConfig],
    write_config: Callable[[TextConfig], dict[str, Any]],
    computes: Mapping[str, tuple],
) -> Family:
    """A text family. `computes`: {field of TextConfig: the values that its Transformers class can have}."""

    def unsupported(config: TextConfig, data: TextData | None = None) -> list[str]:
        found = ((field, getattr(config, field), values) for field, values in computes.items())
        return [
            f"model.{field}={value}: {architecture} has {' or '.join(map(str, values))}"
            for field, value, values in found
            if value not in values
        ]

    return Family(
        name=name,
        model_config=TextConfig,
        data_config=TextData,
        build=Transformer,
        text_config=lambda config: config,
        batch_source=batch_source,
        layout=Layout(
            architectures=(architecture,),
            rows=rows,
            read_config=read_config,
            write_config=write_config,
            left_out=("*.rotary_emb.inv_freq",),
            duplicates=duplicates,
            unsupported=unsupported,
        ),
    )
