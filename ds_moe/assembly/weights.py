"""The weights of an assembled model. A weight is planned as its shape and a function that makes it when it is written.

E experts, I width of the dense FFN, F width of an expert, H hidden size.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_moe.assembly.dense import DenseModel
from ds_moe.models.families import family_of

Make = Callable[[], Tensor]


@dataclass(frozen=True)
class PlannedWeight:
    """One weight of the new model: its shape, and how it is made (in any dtype)."""

    shape: tuple[int, ...]
    make: Make


Weights = dict[str, PlannedWeight]  # by name


def moe_weights(model: DenseModel, rest: Callable[[str], Tensor], block: Callable[[str, int], Weights]) -> Weights:
    """All weights of a MoE model, in the order of the dense one.

    Args:
        rest: makes a weight that the dense model has too, from its name.
        block: makes router and experts in the place of an FFN, from the prefix of its names and the layer's index.
    """
    decoder = re.escape(family_of(model.config).decoder)
    ffn = re.compile(rf"({decoder}\.layers\.(\d+)\.mlp\.)(gate|up|down)_proj\.weight")
    weights: Weights = {}
    for name, shape in model.shapes.items():
        found = ffn.fullmatch(name)
        if found is None:
            weights[name] = PlannedWeight(shape, partial(rest, name))
        elif found[3] == "gate":  # the first of an FFN's three weights
            weights |= block(found[1], int(found[2]))
    return weights


def block_weights(prefix: str, shape_EFH: tuple[int, int, int], gate_up: Make, down: Make, router: Make) -> Weights:
    """Router and stacked experts as transformers keeps them in memory: (E, 2F, H) and (E, H, F)."""
    experts, width, hidden = shape_EFH
    return {
        f"{prefix}gate.weight": PlannedWeight((experts, hidden), router),
        f"{prefix}experts.gate_up_proj": PlannedWeight((experts, 2 * width, hidden), gate_up),
        f"{prefix}experts.down_proj": PlannedWeight((experts, hidden, width), down),
    }


def average(models: list[DenseModel], name: str) -> Tensor:
    """The mean of one weight over models, in fp32; only one model's tensor is in memory at a time."""
    total = torch.zeros(models[0].shapes[name])
    for model in models:
        total += model.read(name)
    return total / len(models)


def gate_up(model: DenseModel, prefix: str, split: int = 1) -> Tensor:
    """(split, 2F, H): slice s is rows [s F, (s+1) F) of gate_proj over the same rows of up_proj; F = I / split."""
    halves = [model.read(f"{prefix}{half}_proj.weight").unflatten(0, (split, -1)) for half in ("gate", "up")]
    return torch.cat(halves, dim=1)


def down(model: DenseModel, prefix: str, split: int = 1) -> Tensor:
    """(split, H, F): slice s is columns [s F, (s+1) F) of down_proj, times `split`.

    The units of a SwiGLU are independent of each other, so the dense FFN is the sum of its slices. A router whose
    weights sum to 1 multiplies each of the `split` slices by 1 / split, which the factor `split` makes up for (arXiv
    2410.07524, section 3.3).
    """
    return model.read(f"{prefix}down_proj.weight").unflatten(1, (split, -1)).transpose(0, 1) * split


def copied(slices_SXX: Tensor, copies: int, noise: float, generator: torch.Generator) -> Tensor:
    """(copies * S, X, X): expert c * S + s is copy c of slice s, with noise of `noise` times the RMS of that slice."""
    experts_EXX = slices_SXX.repeat(copies, 1, 1)
    if noise:
        for expert_XX in experts_EXX:
            rms = expert_XX.float().square().mean().sqrt()
            expert_XX += torch.randn(expert_XX.shape, generator=generator) * (noise * rms)
    return experts_EXX


def group_router(groups: int, split: int, hidden: int, std: float, generator: torch.Generator) -> Tensor:
    """(groups * split, H): one random row for each group of `split` experts, the slices of one copy of the FFN.

    All slices of a group have the same logit, so top-k takes whole groups, and the same weight (virtual groups,
    arXiv 2410.07524).
    """
    return (torch.randn(groups, hidden, generator=generator) * std).repeat_interleave(split, dim=0)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator whose numbers depend on seed and name alone, not on which weights were made before."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
