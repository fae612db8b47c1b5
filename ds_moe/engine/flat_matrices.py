"""Where ZeRO's flat partitions hold the matrices that Muon trains, and which rank orthogonalises which.

DeepSpeed (0.19) gives an optimizer flat fp32 partitions, in which a matrix may begin, end or lie over several ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe.engine.masters import is_stage3
from ds_moe.models.matrices import Stack

BUCKET = 2**26  # elements that all ranks of a group exchange at a time: 256 MiB of fp32


@dataclass(frozen=True)
class Piece:
    """What one rank has of a block: `size` elements from `start` in its partition and from `first` in the block."""

    rank: int
    start: int
    first: int
    size: int


@dataclass(frozen=True)
class Block:
    """Matrices of one parameter that lie beside each other: a stack of them, which one rank orthogonalises.

    Attributes:
        number: of its first matrix, among all of the partition's.
        owner: rank in the group.
        pieces: at most one a rank, in the order of the block's elements.
    """

    stack: Stack
    number: int
    pieces: tuple[Piece, ...]
    owner: int = 0

    @property
    def numel(self) -> int:
        return self.stack.count * self._matrix

    @property
    def _matrix(self) -> int:
        return self.stack.rows * self.stack.columns

    @property
    def work(self) -> int:
        """Multiplications of an iteration, up to a factor."""
        return self.numel * min(self.stack.rows, self.stack.columns)

    def piece_of(self, rank: int) -> Piece | None:
        return next((piece for piece in self.pieces if piece.rank == rank), None)

    def by_matrix(self, piece: Piece, flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(matrices, (k, elements) view of `flat`) of a piece: part of a matrix, then whole ones, then part of one."""
        at, end = piece.first, piece.first + piece.size
        while at < end:
            whole = 0 if at % self._matrix else (end - at) // self._matrix
            size = whole * self._matrix or min(end, (at // self._matrix + 1) * self._matrix) - at
            first, count = self.number + at // self._matrix, whole or 1
            start = piece.start + at - piece.first
            yield slice(first, first + count), flat[start : start + size].view(count, -1)
            at += size


@dataclass(frozen=True)
class FlatMatrices:
    """All matrices of one flat partition, the same on every rank of `group` but for what is this rank's."""

    group: dist.ProcessGroup
    buckets: list[list[Block]]
    count: int

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)


Spans = Callable[[int, int], tuple[Piece, ...]]  # of the elements of a parameter from one to another


def flat_matrices(engine: deepspeed.DeepSpeedEngine, stacks: dict[nn.Parameter, Stack]) -> dict[Tensor, FlatMatrices]:
    """For every flat partition that holds parameters of `stacks`, and then nothing else, where they lie in it."""
    found = _stage3(engine) if is_stage3(engine) else _stage1_and_2(engine)
    result = {}
    for flat, group, parameters in found:
        if parameters[0][0] in stacks:
            buckets, count = _buckets([(stacks[one], spans) for one, spans in parameters], dist.get_world_size(group))
            result[flat] = FlatMatrices(group, buckets, count)
    return result


Partition = tuple[Tensor, dist.ProcessGroup, list[tuple[nn.Parameter, Spans]]]


def _stage1_and_2(engine: deepspeed.DeepSpeedEngine) -> Iterator[Partition]:
    """A group's parameters lie one behind the other in a buffer, of which each rank has an equal part."""
    zero = engine.optimizer
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        group, size = cast("dist.ProcessGroup", zero.real_dp_process_group[i]), flat.numel()
        offsets = zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
        yield flat, group, [(one, _cut_by(size, offset)) for one, offset in offsets]


def _cut_by(size: int, offset: int) -> Spans:
    def spans(start: int, end: int) -> tuple[Piece, ...]:
        begin, stop = offset + start, offset + end
        ranks = range(begin // size, (stop - 1) // size + 1)
        cuts = [(rank, max(begin, rank * size), min(stop, (rank + 1) * size)) for rank in ranks]
        return tuple(Piece(rank, low - rank * size, low - begin, high - low) for rank, low, high in cuts)

    return spans


def _stage3(engine: deepspeed.DeepSpeedEngine) -> Iterator[Partition]:
    """Each rank has an equal part of each parameter, all at the same place of its partition."""
    zero = engine.optimizer
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        placed, offset = [], 0
        for parameter in parameters:
            size = parameter.partition_numel()
            placed.append((parameter, _cut_each(size, offset)))
            offset += size
        yield flat, cast("dist.ProcessGroup", zero._get_param_partition_group(parameters[0])), placed


def _cut_each(size: int, offset: int) -> Spans:
    cut = _cut_by(size, 0)
    return lambda start, end: tuple(replace(one, start=one.start + offset) for one in cut(start, end))


def _buckets(parameters: Sequence[tuple[Stack, Spans]], world: int) -> tuple[list[list[Block]], int]:
    """The blocks of a partition, those of a bucket dealt to the ranks by their work; and the number of matrices."""
    buckets: list[list[Block]] = [[]]
    number, filled = 0, 0
    for stack, spans in parameters:
        matrix = stack.rows * stack.columns
        count = max(1, min(math.ceil(stack.count / world), BUCKET // world // matrix))
        for first in range(0, stack.count, count):
            part = replace(stack, count=min(count, stack.count - first))
            block = Block(part, number, spans(first * matrix, (first + part.count) * matrix))
            number += part.count
            if filled and filled + block.numel > BUCKET:
                buckets.append([])
                filled = 0
            buckets[-1].append(block)
            filled += block.numel
    return [_dealt(bucket, world) for bucket in buckets], number


def _dealt(bucket: list[Block], world: int) -> list[Block]:
    loads, owners = [0] * world, {}
    for block in sorted(bucket, key=lambda block: (-block.work, block.number)):
        owners[block.number] = owner = loads.index(min(loads))
        loads[owner] += block.work
    return [replace(block, owner=owners[block.number]) for block in bucket]
