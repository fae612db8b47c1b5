"""FLOPs of a token, and the peak of a device, for the share of the peak that a run reaches."""

import re

import torch
from transformers import PreTrainedModel

from ds_moe.config.rules.model import expert_count, experts_per_token
from ds_moe.distributed import Topology
from ds_moe.models.families import expert_state, family_of
from ds_moe.models.vision import merged_side

# Dense bf16 peak of one device, FLOP/s, from the vendors' data sheets.
PEAK_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(topology: Topology) -> float | None:
    """FLOP/s of all ranks together, or None for a device that is not in the table (a CPU, say)."""
    if topology.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(topology.device)
    peak = next((flops for known, flops in PEAK_BF16.items() if known in name), None)
    return None if peak is None else peak * topology.world_size


def active_flops_per_token(model: PreTrainedModel) -> float:
    """Forward and backward FLOPs of one text token: 6 for each parameter it is multiplied by, K of E experts.

    Left out are attention scores, the vision tower, the embedding, which is looked up, and the output layer, which few
    tokens meet: those that a label follows.
    """
    experts = expert_count(model.config)
    share = experts_per_token(model.config) / experts if experts else 1.0
    family, met = family_of(model), 0.0
    for name, parameter in model.named_parameters():
        if not family.is_vision(name) and not re.search(family.parts["embeddings"], name):
            met += parameter.numel() * (share if expert_state(name) else 1.0)
    return 6.0 * met


def patch_cost(model: PreTrainedModel) -> float:
    """FLOPs of one patch of an image in those of one text token, forward and backward; 0 for a model without vision.

    Parameters in the layers of the vision tower meet every patch, the others tokens, which merge_size^2 patches become.
    A tower that is frozen runs forward alone, which is a third.
    """
    family, met, trained = family_of(model), 0.0, False
    for name, parameter in model.named_parameters():
        if family.is_vision(name):
            in_layer = any(f".{layers}." in name for layers in family.layers)
            merged = 1 if in_layer else merged_side(model.config) ** 2
            met, trained = met + parameter.numel() / merged, trained or parameter.requires_grad
    return met * (6.0 if trained else 2.0) / active_flops_per_token(model)
