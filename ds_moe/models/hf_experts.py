"""Our kernels as an `experts_implementation` of transformers, for plain models without DeepSpeed or conversion."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from ds_moe.moe.backends import backend_for
from ds_moe.moe.permute import permute, sort_by_expert, sum_per_token, to_experts

NAME = "ds_moe"


def unlike_swiglu(experts: nn.Module, transposed: bool = False) -> str | None:
    """What transformers' experts compute, or how their weights lie, otherwise than the fused kernels take for granted.

    None: they are `(SiLU(x Wg.T) * (x Wu.T)) Wd.T`, stacked as `Backend.swiglu` wants them. The activation alone does
    not tell: DeepSeek-V4's is SiLU, and its gate clamps what SiLU is given. With `transposed`, such weights will do.
    """
    activation = getattr(experts, "act_fn", None)
    silu = isinstance(activation, nn.SiLU | SiLUActivation) or activation is F.silu
    default_gate = getattr(type(experts), "_apply_gate", None) is _default_apply_gate
    reasons = {
        "they do not say how they compute": not hasattr(experts, "has_gate"),
        "they have no gate": not getattr(experts, "has_gate", True),
        "they have biases": getattr(experts, "has_bias", False),
        "their weights are transposed": getattr(experts, "is_transposed", False) and not transposed,
        "their gate and up rows are interleaved": not getattr(experts, "is_concatenated", True),
        "a norm follows each of them": getattr(experts, "has_post_expert_norm", False),
        "their gate is a function of the family's own": not default_gate,
        f"their activation is {getattr(activation, '__name__', type(activation).__name__)}": not silu,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def register() -> None:
    """Let transformers' models be built or loaded with `experts_implementation="ds_moe"`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts; transformers calls this in place of the forward of their module.

    Args:
        experts: has `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F).
        hidden_states: (T, D); the other two are (T, K).

    Raises:
        ValueError: experts that compute anything else than the kernels do, see `unlike_swiglu`, or that transformers
            has sharded over ranks itself.
    """
    reason = "transformers has sharded them" if experts._is_expert_parallel else unlike_swiglu(experts)
    if reason is not None:
        raise ValueError(
            f"experts_implementation {NAME!r} computes plain SiLU-gated experts, not {type(experts).__name__}: "
            f"{reason}; take grouped_mm for this model"
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
