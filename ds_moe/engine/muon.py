"""Muon for the matrices of hidden layers, each expert's by themselves, and AdamW for the rest, under ZeRO 1, 2 and 3.

DeepSpeed's own Muon (0.19, `runtime/zero/muon`) takes an expert's gate and up rows for one matrix, clips finished
updates, keeps its momentum in the dtype of gradients and moves experts that got no token. This one is an optimizer like
any other to DeepSpeed: it gets averaged and clipped fp32 gradients in flat partitions. Ranks exchange what they have of
the matrices that are cut, and each orthogonalises its share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe.engine.flat_matrices import Block, FlatMatrices, Piece, flat_matrices
from ds_moe.engine.orthogonal import orthogonal, scale
from ds_moe.models.matrices import Stack


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but a group with a `momentum` is trained by Muon.

    A step of Muon, of gradient G, weight W and state `exp_avg` M (fp32, as Adam's first moment):

        M <- momentum M + (1 - momentum) G
        U  = orthogonal((1 - momentum) G + momentum M)
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) U

    A matrix whose gradient is all zero, as that of an expert without tokens, stays where it is: an orthogonal update
    has one length however old its momentum. The momentum decays all the same, so that what the expert is told next
    counts more than what it was told long ago.

    Args:
        groups: of parameters, as AdamW's.
        precision: that Newton-Schulz computes in.
    """

    def __init__(self, groups: list[dict[str, Any]], precision: torch.dtype, **adam: Any) -> None:
        super().__init__(groups, fused=True, **adam)
        self.precision = precision
        self._matrices: dict[Tensor, FlatMatrices] = {}

    def find_matrices(self, engine: deepspeed.DeepSpeedEngine, stacks: dict[nn.Parameter, Stack]) -> None:
        """Learn where the partitions of an engine, which has this optimizer, hold the matrices; before the first
        step."""
        self._matrices = flat_matrices(engine, stacks)
        for trained in (*stacks, *self._matrices):
            trained.by_muon = True  # for `masters.moments`

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step of the groups that are in `param_groups` now: DeepSpeed steps one at a time."""
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if "momentum" in group else ():
                self._step_matrices(flat, group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        if self.param_groups:
            super().step(closure)
        self.param_groups = groups

    def _step_matrices(self, flat: Tensor, group: dict[str, Any]) -> None:
        state, where = self.state[flat], self._matrices[flat]
        if not state:
            state["step"], state["exp_avg"] = torch.zeros((), dtype=torch.float32), torch.zeros_like(flat)
        state["step"] += 1
        grad = cast(Tensor, flat.grad)
        state["exp_avg"].lerp_(grad, 1 - group["momentum"])
        moves = _moving(where, grad)
        if group["weight_decay"]:
            kept_M1 = 1 - group["lr"] * group["weight_decay"] * moves.to(flat.dtype).unsqueeze(1)
            for matrices, view in _own(where, flat):
                view.mul_(kept_M1[matrices])
        for bucket in where.buckets:
            self._step_bucket(bucket, where, flat, moves, group)

    def _step_bucket(
        self, bucket: list[Block], where: FlatMatrices, flat: Tensor, moves: Tensor, group: dict[str, Any]
    ) -> None:
        """Step the matrices of one bucket; `moves` tells of all matrices whether they do."""
        mine = [(block, piece) for block in bucket if (piece := block.piece_of(where.rank))]
        mine.sort(key=lambda one: one[0].owner)  # stable, so that the owner knows the order
        owned = [block for block in bucket if block.owner == where.rank]
        give = _splits(where.world, ((block.owner, piece) for block, piece in mine))
        take = _splits(where.world, ((piece.rank, piece) for block in owned for piece in block.pieces))
        average, grad = self.state[flat]["exp_avg"], cast(Tensor, flat.grad)
        sent = flat.new_empty(sum(give))
        for (_, piece), part in zip(mine, sent.split([piece.size for _, piece in mine]), strict=True):
            ours = slice(piece.start, piece.start + piece.size)
            torch.lerp(grad[ours], average[ours], group["momentum"], out=part)
        received = _exchanged(sent, take, give, where)
        self._orthogonalise(owned, received, where.world, moves)
        back = _exchanged(received, give, take, where)
        for (_, piece), part in zip(mine, back.split([piece.size for _, piece in mine]), strict=True):
            flat[piece.start : piece.start + piece.size].add_(part, alpha=-group["lr"])

    def _orthogonalise(self, owned: list[Block], received: Tensor, world: int, moves: Tensor) -> None:
        """Turn the pieces of this rank's matrices, which came rank by rank, into those of their updates."""
        order = [(block, piece) for rank in range(world) for block in owned if (piece := block.piece_of(rank))]
        sizes = [piece.size for _, piece in order]
        parts = {(block.number, piece): part for (block, piece), part in zip(order, received.split(sizes), strict=True)}
        for block in owned:
            full = torch.cat([parts[block.number, piece] for piece in block.pieces])
            stack = block.stack
            full_nRC = full.view(stack.count, stack.rows, stack.columns)
            moves_n11 = moves[block.number : block.number + stack.count].view(-1, 1, 1)
            for part_nrc in stack.split(full_nRC):
                update_nrc = orthogonal(part_nrc, self.precision).to(full.dtype)
                part_nrc.copy_(update_nrc.mul_(moves_n11 * scale(*part_nrc.shape[1:])))
            for piece in block.pieces:
                parts[block.number, piece].copy_(full[piece.first : piece.first + piece.size])


def _own(where: FlatMatrices, flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(matrices, (k, elements) view) of all that this rank has of the matrices in its partition."""
    for block in itertools.chain.from_iterable(where.buckets):
        if piece := block.piece_of(where.rank):
            yield from block.by_matrix(piece, flat)


def _moving(where: FlatMatrices, grad: Tensor) -> Tensor:
    """(matrices,) 1 where any rank's part of the gradient has an entry that is not zero."""
    moves = torch.zeros(where.count, dtype=torch.uint8, device=grad.device)
    for matrices, view in _own(where, grad):
        moves[matrices] = view.any(dim=1)
    if where.world > 1:
        dist.all_reduce(moves, op=dist.ReduceOp.MAX, group=where.group)
    return moves


def _splits(world: int, pieces: Iterator[tuple[int, Piece]]) -> list[int]:
    """Elements by rank."""
    sizes = [0] * world
    for rank, piece in pieces:
        sizes[rank] += piece.size
    return sizes


def _exchanged(sent: Tensor, take: list[int], give: list[int], where: FlatMatrices) -> Tensor:
    if where.world == 1:
        return sent
    received = sent.new_empty(sum(take))
    dist.all_to_all_single(received, sent, take, give, group=where.group)
    return received
