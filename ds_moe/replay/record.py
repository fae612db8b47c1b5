"""Records which experts a model's own forwards use, as an inference engine would report them.

The model may be converted, or a plain one of transformers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_moe.models.blocks import moe_blocks
from ds_moe.models.convert import moe_layers
from ds_moe.moe.decision import RoutingDecision, count_experts
from ds_moe.moe.in_block import decision_in
from ds_moe.moe.tape import current_tape

# What a router returns: our decision, or transformers' (logits, weights, ids).
RouterOutput = RoutingDecision | tuple[Tensor, Tensor, Tensor]


class RoutingRecorder:
    """Records the experts of every forward inside its `with` block, but not of recomputes by gradient checkpointing.

        with RoutingRecorder(model) as recorder:
            model(**batch)
        [ids_TLK] = recorder.take()

    Recomputes of a plain model are recorded too. Raises ValueError for a model without MoE layers of a known family,
    and for a router that does not give each token K experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gates = [layer.gate for layer in moe_layers(model)] or [block.router for block in moe_blocks(model)]
        if not self._gates:
            raise ValueError(f"{type(model).__name__} has no MoE layer to record")
        self._ids: list[list[Tensor]] = [[] for _ in self._gates]  # by layer, then by forward
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> RoutingRecorder:
        self._hooks = [gate.register_forward_hook(partial(self._record, i)) for i, gate in enumerate(self._gates)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> list[Tensor]:
        """Return and forget one int16 tensor (T, L, K) for each forward, with -1 for tokens that were not routed."""
        forwards = [torch.stack(layers, dim=1) for layers in zip(*self._ids, strict=True)]
        self._ids = [[] for _ in self._gates]
        return forwards

    def _record(self, layer: int, gate: nn.Module, args: tuple[Tensor, ...], output: RouterOutput) -> None:
        tape = current_tape()
        if tape is None or not tape.replaying:
            self._ids[layer].append(chosen_experts(output))


def chosen_experts(output: RouterOutput) -> Tensor:
    """The experts, int16 (T, K), in what a router returned."""
    output = decision_in(output)
    if not isinstance(output, RoutingDecision):
        return output[2].to(torch.int16)
    counts_T = count_experts(output.token_N, output.logits_TE.shape[0])
    top_k = int(counts_T.max())
    if ((counts_T != 0) & (counts_T != top_k)).any():
        raise ValueError("tokens have different numbers of experts: only dropless top-k routing can be recorded")
    return ids_by_token(output, max(top_k, 1))


def ids_by_token(decision: RoutingDecision, top_k: int) -> Tensor:
    """The experts, int16 (T, K), of a decision that gives each routed token K; -1 for the other tokens."""
    tokens = decision.logits_TE.shape[0]
    ids_TK = torch.full((tokens, top_k), -1, dtype=torch.int16, device=decision.token_N.device)
    ids_TK[decision.token_N[::top_k]] = decision.expert_N.view(-1, top_k).to(torch.int16)
    return ids_TK


def joined(forwards: list[Tensor], batch: int) -> Tensor:
    """Join the forwards of one generation with a KV cache, (T, L, K) each, along the sequence: (B, S, L, K)."""
    return torch.cat([ids_TLK.unflatten(0, (batch, -1)) for ids_TLK in forwards], dim=1)
