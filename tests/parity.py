"""Tiny random Transformers models, and the measure by which ours must equal them."""

import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install -e .[torch]")
transformers = pytest.importorskip("transformers", reason="parity needs Transformers: pip install -e .[torch]")

LOGITS = 1e-4  # largest absolute difference
GRADIENT, VANISHING = (
    1e-4,
    1e-6,
)  # largest difference, as a share of the tensor's and of the model's largest gradient


DECODERS = {
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=1.5)
OWN = {  # what only these have: constants that are nobody's default
    "gemma2": dict(num_hidden_layers=5, sliding_window=9, query_pre_attn_scalar=20, pad_token_id=None, **CAPS),
    "gemma3": dict(
        num_hidden_layers=8, sliding_window=9, query_pre_attn_scalar=20, rope_parameters=None, pad_token_id=None
    ),
    "mixtral": dict(num_local_experts=6, num_experts_per_tok=2, router_aux_loss_coef=0.03),
    "qwen3_moe": dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=28, router_aux_loss_coef=0.03),
}


def decoder(family="qwen3", seed=0, **changes):
    """A family's model with random weights."""
    model = DECODERS[family][1](text_config(family, **changes))
    if family == "gemma2":
        model.set_attn_implementation("eager")  # the default passes over soft-caps in silence
    return randomised(model, seed)


def stretched(rope_type, **changes):
    """Rotary positions of a model that was trained on 64 tokens first."""
    before = {} if rope_type == "linear" else {"original_max_position_embeddings": 64}
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 8.0, **before, **changes}}


def text_config(family="qwen3", **changes):
    """A decoder with odd sizes and constants that are nobody's default."""
    sizes = dict(vocab_size=199, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=8)
    heads = dict(num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-3, tie_word_embeddings=True)
    rope = dict(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, max_position_embeddings=4096)
    return DECODERS[family][0](**{**sizes, **heads, **rope, **OWN.get(family, {}), **changes})


def vision_config(**changes):
    """A SigLIP tower of 5 x 5 patches whose pixels the patches do not fill (as in so400m-patch14-384)."""
    sizes = dict(hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4)
    return transformers.SiglipVisionConfig(
        **{**sizes, "image_size": 37, "patch_size": 7, "layer_norm_eps": 1e-3, **changes}
    )


def llava_config(text=None, vision=None, **changes):
    """Llava with the two inside; the last token is the image's."""
    text, vision = text or text_config(), vision or vision_config()
    fixed = dict(image_token_index=text.vocab_size - 1, vision_feature_select_strategy="full", vision_feature_layer=-1)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, **{**fixed, **changes})


def randomised(model, seed=0):
    """Every parameter drawn anew, norms and biases too: a default of 0 or 1 would hide a row that is mixed up."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            is_norm = "norm" in name and name.endswith("weight")
            matrix = 0.7 / np.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.2
            ones = 0 if "Gemma" in type(model).__name__ else 1  # whose norms add 1 themselves
            parameter.copy_(ones + 0.2 * noise if is_norm else matrix * noise)
            if "embed_tokens" in name or "position_embedding" in name:
                parameter.copy_(0.3 * noise)
    return model.eval()


def wakeful(model):
    """Sharp attention that outweighs the latest token: greedy text that runs in no circle, which could hide a fault."""
    sandwich = "Gemma" in type(model).__name__  # scales embeddings, and norms what a block gives
    model.get_input_embeddings().weight.data *= 0.02 if sandwich else 0.1
    for layer in getattr(model.model, "language_model", model.model).layers:
        sharp = [layer.self_attn.q_norm] if hasattr(layer.self_attn, "q_norm") else _queries_and_keys(layer)
        for each in sharp:
            each.weight.data *= 5
        if sandwich:
            layer.post_attention_layernorm.weight.data += 3
            layer.post_feedforward_layernorm.weight.data += 3
        layer.self_attn.o_proj.weight.data *= 8
        for name, parameter in layer.mlp.named_parameters():
            if "down_proj" in name:
                parameter.data *= 8
    return model


def _queries_and_keys(layer):
    return layer.self_attn.q_proj, layer.self_attn.k_proj


def saved(model, folder, **options):
    """The folder that `save_pretrained` wrote."""
    model.save_pretrained(folder, **options)
    return folder


def assert_close(ours, theirs, limit=LOGITS):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    difference = np.abs(ours - theirs).max()
    assert difference <= limit, f"largest difference {difference:.2e} (values up to {np.abs(theirs).max():.2f})"


def as_published(model, of):
    """(name, of(parameter)) by the names that checkpoints have: experts are kept together in memory, not in files."""
    mixtral = model.config.model_type == "mixtral"
    for name, parameter in model.named_parameters():
        found = of(parameter)
        name = name.replace("mlp.", "block_sparse_moe.") if mixtral else name
        block, experts, kind = name.partition(".experts.")
        if not experts:
            yield name, found
            continue
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for expert, own in enumerate(found):
            parts = {gate: own[: len(own) // 2], up: own[len(own) // 2 :]} if kind == "gate_up_proj" else {down: own}
            for part, tensor in parts.items():
                yield f"{block}.experts.{expert}.{part}.weight", tensor


def assert_gradients(ours: nnx.State, model, rows, spell=lambda name: name):
    """Every gradient against PyTorch's, by the name table; where PyTorch has none, ours must be zero or absent."""
    flat = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(ours)}
    expected = dict(as_published(model, lambda parameter: parameter.grad))
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    compared = set()
    for row in rows:
        names = [ours.replace(".{layer}", "") for ours in row.ours]
        for layer, expert, theirs in row.pairs():
            grad = expected.pop(spell(theirs))
            if grad is None:
                assert not any(np.any(flat[name]) for name in names if name in flat), (
                    f"{theirs} has a gradient here only"
                )
                continue
            compared.update(names)
            arrays = [np.asarray(flat[name] if layer is None else flat[name][layer]) for name in names]
            arrays = arrays if expert is None else [array[expert] for array in arrays]
            difference = np.abs(row.transform.to_theirs(*arrays) - grad.numpy()).max()
            own = float(grad.abs().max())
            assert difference <= max(GRADIENT * own, VANISHING * largest), (
                f"{theirs}: gradients differ by {difference:.2e}, the largest is {own:.2e} (of the model {largest:.2e})"
            )
    assert not expected, f"no row names {sorted(expected)}"
    assert compared == set(flat), f"not in PyTorch: {sorted(set(flat) - compared)}"
