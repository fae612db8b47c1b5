"""Our kernels as an `experts_implementation` of transformers, for plain models without DeepSpeed or conversion."""

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ds_moe.moe.backends import backend_for
from ds_moe.moe.permute import permute, sort_by_expert, sum_per_token, to_experts

NAME = "ds_moe"


def is_silu(activation: nn.Module) -> bool:
    """Whether an activation of experts is the one that the kernels compute."""
    return isinstance(activation, nn.SiLU | SiLUActivation)


def register() -> None:
    """Let transformers' models be built or loaded with `experts_implementation="ds_moe"`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts; transformers calls this in place of the forward of their module.

    Args:
        experts: has `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F).
        hidden_states: (T, D); the other two are (T, K).

    Raises:
        ValueError: experts that are not SiLU-gated, that have biases, or whose gate rows do not lie above the up rows.
    """
    plain = experts.has_gate and experts.is_concatenated and is_silu(experts.act_fn)
    other = experts.has_bias, experts.is_transposed, experts.has_post_expert_norm, experts._is_expert_parallel
    if not plain or any(other):
        raise ValueError(
            f"experts_implementation {NAME!r} computes SiLU-gated experts only, not {type(experts).__name__}"
        )
    with torch.autocast(hidden_states.device.type, enabled=False):  # autocast does not know grouped products
        rows_TD = hidden_states.to(experts.gate_up_proj.dtype)
        return _experts(experts, rows_TD, top_k_index, top_k_weights).to(hidden_states.dtype)


def _experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    backend = backend_for("auto", hidden_states)
    tokens, top_k = top_k_index.shape
    token_N = torch.arange(tokens, device=top_k_index.device).repeat_interleave(top_k)
    permutation = sort_by_expert(backend, token_N, top_k_index.flatten(), tokens, experts.num_experts, top_k)
    rows_ND = to_experts(backend, hidden_states, permutation)
    weight_N = permute(top_k_weights.flatten(), permutation.order_N)
    weights = experts.gate_up_proj, experts.down_proj
    rows_ND = backend.swiglu(rows_ND, *weights, permutation.counts_E, weight_N, "act")
    return sum_per_token(backend, rows_ND, permutation)
