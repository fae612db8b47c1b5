"""Which parameters Muon trains: the matrices of hidden layers. What it leaves to AdamW are embeddings, the output
layer, routers, gates of one output, convolutions, and whatever is no matrix.
"""

import re
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.models.families import expert_state, family_of
from ds_moe.models.lora import update_of

FUSED = {"qkv": 3, "gate_up_proj": 2}  # name of a linear layer -> matrices that lie in its weight, one below the other
GATE_UP = re.compile(r"(gate_up_proj|gate_up_B)$")  # of experts: two matrices each
# Moments that a checkpoint holds of a trained parameter, as torch's AdamW calls them. Muon's momentum is Adam's first.
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("exp_avg",)


@dataclass(frozen=True)
class Stack:
    """How the matrices of a parameter lie: `count` of (R, C), each of `parts` matrices that are orthogonalised apart.

    Attributes:
        dim: along which the parts lie, -2 (rows) or -1 (columns).
        interleaved: whether part i is every `parts`-th row or column from the i-th; otherwise parts follow each other.
    """

    count: int
    rows: int
    columns: int
    parts: int = 1
    dim: int = -2
    interleaved: bool = False

    def split(self, full_nRC: Tensor) -> list[Tensor]:
        """Views of the parts, (n, r, c) each, of any number n of the `count` members."""
        if not self.interleaved:
            return list(full_nRC.chunk(self.parts, self.dim))
        if self.dim == -1:
            return [full_nRC[..., part :: self.parts] for part in range(self.parts)]
        return [full_nRC[:, part :: self.parts] for part in range(self.parts)]


def hidden_matrices(model: PreTrainedModel) -> dict[str, Stack]:
    """The trained parameters that Muon is for, by name; `model` may be an outline, converted, or sharded by ZeRO-3.

    Expert parameters of one rank are stacks of its experts.
    """
    parts = family_of(model).parts
    others = re.compile(f"{parts['router']}|{parts['embeddings']}")
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or others.search(name):
            continue
        owner, _, last = name.rpartition(".")
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if expert_state(name):
            stack = _of_experts(model.get_submodule(owner.removesuffix(".lora")), last, shape)
        elif isinstance(model.get_submodule(owner), nn.Linear) and last == "weight":
            stack = Stack(1, *shape, parts=FUSED.get(_rows_of(name, owner).rpartition(".")[2], 1))
        else:
            continue
        if stack is not None and min(stack.rows, stack.columns) > 1:
            found[name] = stack
    return found


def _rows_of(name: str, owner: str) -> str:
    """The layer whose outputs are the rows of a linear layer's weight. B of a low-rank update has those of the layer
    that it updates, and A has those of none."""
    update = update_of(name)
    if update is None:
        return owner
    return update.weight.removesuffix(".weight") if update.half == "B" else ""


def by_muon(model: PreTrainedModel, config: RunConfig) -> dict[str, Stack]:
    """`hidden_matrices` of a run that trains them by Muon; nothing of another."""
    return hidden_matrices(model) if config.train.optimizer == "muon" else {}


def _of_experts(experts: nn.Module, name: str, shape: tuple[int, ...]) -> Stack | None:
    """The matrices of one parameter of experts; None for a bias of each."""
    if len(shape) != 3:
        return None
    if not (GATE_UP.search(name) and getattr(experts, "has_gate", True)):
        return Stack(*shape)
    across = name == "gate_up_proj" and getattr(experts, "is_transposed", False)
    interleaved = not getattr(experts, "is_concatenated", True)
    return Stack(*shape, parts=2, dim=-1 if across else -2, interleaved=interleaved)
