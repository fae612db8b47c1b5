"""Routers of transformers' families that ours repeats exactly, by their class: what they compute, read off the module.

A router is repeated if ours gives every token the same experts in fp32 and bf16, and the same weights in fp32. Then a
run may use all that ours can do: replay, loss-free balancing, capacity, noise. Others stay as they are in their block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ds_moe.config.moe import PLAIN
from ds_moe.models.blocks import moe_blocks


@dataclass(frozen=True)
class RouterForm:
    """What a family's router computes.

    Attributes:
        settings: arguments of `TopKRouter` from the router, where they differ from `PLAIN`.
        bias: path, from the block, of the bias that takes part in the selection; None: it has none.
        fp32: whether the product with the router matrix is in fp32, whatever the dtype of the model.
    """

    settings: Callable[[nn.Module], dict[str, object]]
    bias: str | None = None
    fp32: bool = False

    def native(self, router: nn.Module) -> dict[str, object]:
        """Arguments of `TopKRouter` that repeat this router."""
        return {**PLAIN, **self.settings(router), "fp32_logits": self.fp32, "top_k": router.top_k}


def _softmax(router: nn.Module) -> dict[str, object]:
    return {"normalize": getattr(router, "norm_topk_prob", True)}


def _never_normalizes(router: nn.Module) -> dict[str, object]:
    return {"normalize": False}


def _sigmoid(router: nn.Module) -> dict[str, object]:
    scale = next((getattr(router, key) for key in SCALES if hasattr(router, key)), 1.0)
    return {"scores": "sigmoid", "normalize": getattr(router, "norm_topk_prob", True), "route_scale": scale}


SCALES = ("routed_scaling_factor", "router_scaling_factor")  # attributes that may hold the factor of all weights


def _grouped_sigmoid(router: nn.Module) -> dict[str, object]:
    """DeepSeek-V3's."""
    return {**_sigmoid(router), "groups": router.num_group, "top_groups": router.topk_group}


def _groups_filled_with_zero(router: nn.Module) -> dict[str, object]:
    groups = router.topk_group if router.num_group is not None else None
    return {**_grouped_sigmoid(router), "top_groups": groups, "group_fill": 0.0}


def _grouped_softmax(router: nn.Module) -> dict[str, object]:
    """DeepSeek-V2's: a group is as good as its best expert, and weights are never normalised."""
    found = {"normalize": False, "route_scale": router.routed_scaling_factor}
    if router.topk_method != "group_limited_greedy":
        return found
    groups = {"groups": router.num_group, "top_groups": router.topk_group}
    return {**found, **groups, "group_score": "max", "group_fill": 0.0}


def _sigmoid_of_biased_logits(router: nn.Module) -> dict[str, object]:
    return {**_sigmoid(router), "bias_on": "logits"}


BIAS = "e_score_correction_bias"
OF_ROUTER, OF_BLOCK = f"gate.{BIAS}", BIAS
SOFTMAX = RouterForm(_softmax)
DEEPSEEK_V3 = RouterForm(_grouped_sigmoid, OF_ROUTER, fp32=True)

ROUTER_FORMS = {
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "MiniMaxTopKRouter",
            "MixtralTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3OmniMoeThinkerTextTopKRouter",
            "Qwen3VLMoeTextTopKRouter",
            "Qwen3_5MoeTopKRouter",
            "Qwen4ExpTextTopKRouter",
        ),
        SOFTMAX,
    ),
    **dict.fromkeys(
        (
            "AXK1TopkRouter",
            "BailingHybridTopkRouter",
            "BeamTopKRouter",
            "DeepseekV32TopkRouter",
            "DeepseekV3TopkRouter",
            "Dots1TopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "HYV4TopkRouter",
            "KimiLinearTopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        DEEPSEEK_V3,
    ),
    "AXK2TopkRouter": RouterForm(_groups_filled_with_zero, OF_ROUTER, fp32=True),
    "DeepseekV2TopkRouter": RouterForm(_grouped_softmax, fp32=True),
    "Ernie4_5_MoeTopKRouter": RouterForm(_softmax, f"gate.moe_statics.{BIAS}", fp32=True),
    "FlintTopKRouter": RouterForm(_sigmoid, fp32=True),
    "HYV3TopKRouter": RouterForm(_sigmoid, OF_BLOCK, fp32=True),
    "JambaTopKRouter": RouterForm(_never_normalizes),
    "Kolibri1TopKRouter": RouterForm(_sigmoid_of_biased_logits, OF_ROUTER, fp32=True),
    "MiniMaxM2TopKRouter": RouterForm(_sigmoid, OF_BLOCK),
    "MiniMaxM3VLTopKRouter": RouterForm(_sigmoid, OF_ROUTER),
    "Step3p7TopKRouter": RouterForm(_sigmoid, OF_ROUTER),
    **dict.fromkeys(
        (
            "GraniteMoeHybridTopKRouter",
            "GraniteMoeSWATopKRouter",
            "GraniteMoeSharedTopKRouter",
            "GraniteMoeTopKRouter",
        ),
        SOFTMAX,  # of the chosen logits, which is the softmax of all, normalised over the chosen
    ),
}


def form_of(router: nn.Module) -> RouterForm | None:
    """What is known of a family's router, which may be ours already; None: ours cannot repeat it."""
    names = [kind.__name__ for kind in type(router).__mro__]
    return next((ROUTER_FORMS[name] for name in names if name in ROUTER_FORMS), None)


def selection_biases(model: nn.Module) -> list[str]:
    """Names of the biases, parameters or buffers, that `hold_bias` takes from a model's blocks."""
    forms = [(block.path, form_of(block.router)) for block in moe_blocks(model)]
    return [f"{path}.{form.bias}" for path, form in forms if form is not None and form.bias is not None]


def hold_bias(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a selection bias, and its name there; the bias becomes an fp32 buffer, as `SelectionBias`
    needs it. Some families have a frozen parameter or a buffer of the model's dtype, which would lose small steps."""
    parent, _, name = path.rpartition(".")
    holder = block.get_submodule(parent)
    bias = getattr(holder, name).detach().to(torch.float32)
    holder._parameters.pop(name, None)
    holder._buffers.pop(name, None)
    holder.register_buffer(name, bias)
    return holder, name
