"""The weights of an assembled model, each a recipe that reads what it needs when it is asked for.

E experts, I the dense FFN's width, F an expert's width, H the hidden size.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_moe.assembly.dense import DenseModel

FFN = re.compile(r"(model\.language_model\.layers\.(\d+)\.mlp\.)(gate|up|down)_proj\.weight")


Make = Callable[[], Tensor]


@dataclass(frozen=True)
class Part:
    """One weight of the new model: its shape, and how it is made (in any dtype)."""

    shape: tuple[int, ...]
    make: Make


Parts = dict[str, Part]


def dense_parts(model: DenseModel, make: Callable[[str], Tensor]) -> Parts:
    """All weights of a dense model."""
    return {name: Part(shape, partial(make, name)) for name, shape in model.shapes.items()}


def moe_parts(model: DenseModel, rest: Callable[[str], Tensor], block: Callable[[str, int], Parts]) -> Parts:
    """All weights of a MoE model: `rest` makes what it shares with the dense one, `block` what takes the FFN's place.

    Args:
        block: (prefix of the names, layer) -> router and experts.
    """
    parts: Parts = {}
    for name, shape in model.shapes.items():
        ffn = FFN.fullmatch(name)
        if ffn is None:
            parts[name] = Part(shape, partial(rest, name))
        elif ffn[3] == "gate":  # the first of its three
            parts |= block(ffn[1], int(ffn[2]))
    return parts


def block_parts(prefix: str, shape_EFH: tuple[int, int, int], gate_up: Make, down: Make, router: Make) -> Parts:
    """Router and stacked experts as transformers keeps them in memory: (E, 2F, H) and (E, H, F)."""
    experts, width, hidden = shape_EFH
    return {
        f"{prefix}gate.weight": Part((experts, hidden), router),
        f"{prefix}experts.gate_up_proj": Part((experts, 2 * width, hidden), gate_up),
        f"{prefix}experts.down_proj": Part((experts, hidden, width), down),
    }


def average(models: list[DenseModel], name: str) -> Tensor:
    """The mean of one weight, fp32; one model's tensor is read at a time."""
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

    The dense FFN is the sum of its slices, a SwiGLU's width being independent units. A router whose weights sum to 1
    gives each of the `split` slices 1 / split of it, which the factor makes up for (arXiv 2410.07524, section 3.3).
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
    """Random numbers that depend on seed and name alone, not on what was made before."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
