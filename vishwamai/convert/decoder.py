"""What decoder families share at Hugging Face: names of tensors, keys of config.json. A family adds what is its own."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from vishwamai.config import Config, ConfigError
from vishwamai.convert.hf_config import Reader, build
from vishwamai.convert.layout import EXPERT, LAYER, TRANSPOSE, Layout, Row, inside, linear, norm
from vishwamai.convert.rope_keys import read_rope, write_rope
from vishwamai.data.text import TextData, batch_source
from vishwamai.families import Family
from vishwamai.models.config import Activation, AttentionBias, LayerType, TextConfig
from vishwamai.models.pattern import find_pattern, parts_of
from vishwamai.models.transformer import Transformer

SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps tie_word_embeddings initializer_range"
).split()


class SparseNames(NamedTuple):
    """What a family calls the parts of a mixture layer."""

    block: str = "mlp"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"


# What a Transformers class computes unless its family says otherwise: {field of TextConfig: its values}.
PLAIN: dict[str, tuple] = {
    "qk_norm": (False,),
    "attention_bias": (AttentionBias.NONE,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "layer_types": (None,),
    "rope_local_base_freq": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "zero_centered_norms": (False,),
    "sandwich_norms": (False,),
    "scale_embeddings": (False,),
    "mixture": (None,),
}
ANY = None  # a family's class computes every value


def rows(config: TextConfig, sparse: SparseNames = SparseNames()) -> list[Row]:
    """The name table."""
    layers = []
    for ours, stack in parts_of(find_pattern(config.kinds)):
        numbers = stack.numbers if stack.stacked else None
        theirs = LAYER if stack.stacked else stack.name
        own = _attention(config)
        own += _experts(config, sparse) if config.kinds[stack.numbers[0]].sparse else _gated("mlp", config.mlp_bias)
        layers += inside(own, f"{ours}.", f"model.layers.{theirs}.", layers=numbers)
    return [
        Row(("embed_tokens.embedding",), "model.embed_tokens.weight"),
        *layers,
        *norm("norm", "model.norm"),
        *([] if config.tie_word_embeddings else linear("lm_head", "lm_head")),
    ]


def _attention(config: TextConfig) -> list[Row]:
    """Of a layer: its attention, and all its norms."""
    on_inputs, on_output = config.attention_bias.of_layers
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.sandwich_norms else []
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
    table = [row for name in norms for row in norm(name, name)]
    for name in "qkv":
        table += linear(f"self_attn.{name}_proj", f"self_attn.{name}_proj", on_inputs)
    return table + linear("self_attn.o_proj", "self_attn.o_proj", on_output)


def _gated(block: str, bias: bool) -> list[Row]:
    names = [f"{block}.{name}_proj" for name in ("gate", "up", "down")]
    return [row for name in names for row in linear(name, name, bias)]


def _experts(config: TextConfig, sparse: SparseNames) -> list[Row]:
    mixture, block = config.mixture, sparse.block
    table = linear("mlp.gate", f"{block}.gate")
    for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), sparse[1:], strict=True):
        name = f"{block}.experts.{EXPERT}.{theirs}.weight"
        table.append(Row((f"mlp.experts.{ours}",), name, TRANSPOSE, experts=mixture.num_experts))
    if mixture.biased:
        table.append(Row(("mlp.e_score_correction_bias",), f"{block}.gate.e_score_correction_bias"))
    return table + (_gated("mlp.shared_experts", False) if mixture.n_shared_experts else [])


def duplicates(config: TextConfig) -> dict[str, str]:
    """Some published files (Qwen3-0.6B) hold the tied output matrix a second time."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def read_decoder(reader: Reader, defaults: Mapping[str, Any], **own: Any) -> TextConfig:
    """A TextConfig from a config.json; `defaults` are Transformers' for keys left out, `own` what the family adds.

    Raises ConfigError for what no family of ours computes.
    """
    for key in ("hidden_act", "hidden_activation"):
        reader.insist(key, Activation, "the feed-forward block is SwiGLU or GeGLU")
    reader.insist("attention_dropout", [0], "there is no dropout")
    sizes = {name: reader.get(name, defaults[name]) for name in SIZES if name in defaults}
    heads = sizes["num_attention_heads"]
    # An explicit null means as many as query heads, an absent key Transformers' default.
    kv_heads = heads if "num_key_value_heads" in reader.section else defaults.get("num_key_value_heads", heads)
    sizes["num_key_value_heads"] = reader.get("num_key_value_heads", kv_heads)
    sizes.setdefault("head_dim", reader.get("head_dim", sizes["hidden_size"] // heads))
    sizes["hidden_act"] = reader.get("hidden_activation", reader.get("hidden_act", defaults.get("hidden_act", "silu")))
    if "rope_theta" not in own:
        longest, theta = sizes["max_position_embeddings"], defaults.get("rope_theta", 10_000.0)
        own["rope_theta"], own["rope_scaling"] = read_rope(reader, longest, theta)
    return build(TextConfig, reader.where, **sizes, **own)


def read_window(reader: Reader, layers: int) -> dict[str, Any]:
    """The windows of Qwen's models, which have one key to switch them on and two that say for which layers."""
    on, first = reader.get("use_sliding_window", False), reader.get("max_window_layers", 28)
    by_number = ["sliding_attention" if on and layer >= first else "full_attention" for layer in range(layers)]
    found = windows(reader, reader.get("layer_types", by_number), reader.get("sliding_window", 4096))
    if found["sliding_window"] is not None and not on:
        raise ConfigError(
            f"{reader.where}: use_sliding_window=False with layers of sliding_attention can't be computed: set it to "
            "true, or make these full_attention"
        )
    return found


def windows(reader: Reader, types: Sequence[str], window: int | None) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a TextConfig, from the type of each layer."""
    if unknown := sorted(set(types) - set(LayerType)):
        raise ConfigError(
            f"{reader.where}: layer_types names {', '.join(unknown)}, which can't be computed here; expected "
            f"{' or '.join(LayerType)}"
        )
    if LayerType.SLIDING not in types:
        return {"sliding_window": None, "layer_types": None}
    if LayerType.FULL not in types:
        return {"sliding_window": window, "layer_types": None}
    period = next(p for p in range(1, len(types) + 1) if all(kind == types[i % p] for i, kind in enumerate(types)))
    return {"sliding_window": window, "layer_types": tuple(types[:period])}


def write_window(config: TextConfig) -> dict[str, Any]:
    """The keys that `read_window` reads."""
    types = write_layer_types(config)
    if config.sliding_window is None:
        return {"use_sliding_window": False, "layer_types": types}
    first = types.index(LayerType.SLIDING)
    keys = {"sliding_window": config.sliding_window, "max_window_layers": first}
    return {"use_sliding_window": True, "layer_types": types, **keys}


def write_layer_types(config: TextConfig) -> list[str]:
    """The type of each layer."""
    return [kind.attention.value for kind in config.kinds]


def write_decoder(config: TextConfig, architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    """A config.json that Transformers opens as `architecture`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{key: getattr(config, key) for key in SIZES},
        "rope_parameters": write_rope(config.rope_theta, config.rope_scaling),
        "hidden_act": config.hidden_act.value,
        "attention_dropout": 0.0,
        "use_cache": True,
        **own,
    }


def decoder_family(
    name: str,
    architecture: str,
    read_config: Callable[[Mapping[str, Any], str], TextConfig],
    write_config: Callable[[TextConfig], dict[str, Any]],
    computes: Mapping[str, tuple | None],
    sparse: SparseNames = SparseNames(),
    further: Callable[[TextConfig], list[str]] = lambda config: [],
) -> Family:
    """A text family.

    Args:
        computes: {field of TextConfig: the values that its Transformers class can have, or ANY} where not PLAIN.
        sparse: what the class calls the parts of a mixture layer.
        further: config -> what else the class doesn't compute, each in a line.
    """
    known = PLAIN | dict(computes)

    def unsupported(config: TextConfig, data: TextData | None = None) -> list[str]:
        found = ((field, getattr(config, field), values) for field, values in known.items())
        return [
            f"model.{field}={_brief(value)}: {architecture} has {' or '.join(map(str, values))}"
            for field, value, values in found
            if values is not ANY and value not in values
        ] + further(config)

    return Family(
        name=name,
        model_config=TextConfig,
        data_config=TextData,
        build=Transformer,
        text_config=lambda config: config,
        batch_source=batch_source,
        layout=Layout(
            architectures=(architecture,),
            rows=partial(rows, sparse=sparse),
            read_config=read_config,
            write_config=write_config,
            left_out=("*.rotary_emb.inv_freq",),
            duplicates=duplicates,
            unsupported=unsupported,
        ),
    )


def _brief(value: Any) -> str:
    """As a config says it; of a section, that there is one."""
    return "{...}" if isinstance(value, Config) else str(value)
