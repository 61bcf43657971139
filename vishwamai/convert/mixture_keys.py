"""Which parts of a mixture a Transformers class computes."""

from collections.abc import Callable, Collection

from vishwamai.models.config import MixtureConfig, TextConfig

# Fields that Qwen3-MoE has in its config.json, under the same names.
CONSTANTS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers", "router_aux_loss_coef",
)  # fmt: skip
# Fields that speak of training only and that no config.json has: the same model whatever they are.
TRAINING = ("aux_loss_scope", "router_z_loss_coef", "capacity_factor", "router_bias_update_rate")


def unsupported_mixture(architecture: str, fields: Collection[str]) -> Callable[[TextConfig], list[str]]:
    """config -> a line for each part of its mixture that the class doesn't compute; `fields` may have any value."""

    def find(config: TextConfig) -> list[str]:
        mixture = config.mixture
        if mixture is None:
            return [f"model.mixture=None: {architecture} has mixtures of experts"]
        plain = MixtureConfig(num_experts=1, num_experts_per_tok=1, moe_intermediate_size=1)
        return [
            f"model.mixture.{name}={getattr(mixture, name)}: {architecture} has {getattr(plain, name)}"
            for name in MixtureConfig.model_fields
            if name not in (*fields, *TRAINING) and getattr(mixture, name) != getattr(plain, name)
        ]

    return find
