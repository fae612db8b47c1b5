"""The part of a packed row that one of several ranks computes, where ranks share rows (`train.sequence_parallel`).

A row is padded to a multiple of the ranks and cut into equal parts, wherever samples and images begin and end. What
speaks of the whole row stays whole: the bounds of its samples, by which attention runs over all parts. Images are
dealt out whole, balanced by their patches: each is encoded by one rank, and its features travel to where its tokens
lie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe.data.batch import NO_LOSS, Batch, sample_bounds
from ds_moe.data.processor import Processor

ROW_PART = "row_part"  # the input of a forward that says which part it has
BY_TOKEN = {"position_ids": 0, "mm_token_type_ids": 0}  # inputs with a value for each token -> that of padding


@dataclass(frozen=True)
class FeatureRoutes:
    """How the features of a row's images, a vector for each image token, travel between the P ranks that share it.

    Attributes:
        rows_S: int64, which of the features of this rank's images it sends: first those to rank 0.
        send: how many it sends to each rank.
        receive: how many it receives from each.
        order_M: int64, the M received ones in the order of this part's image tokens.
    """

    rows_S: Tensor
    send: list[int]
    receive: list[int]
    order_M: Tensor


@dataclass(frozen=True)
class RowPart:
    """Which part of a row a forward has; `features` is None where the whole row has no image."""

    rank: int
    ranks: int
    features: FeatureRoutes | None = None


def part_of_row(batch: Batch, rank: int, ranks: int, processor: Processor) -> Batch:
    """Part `rank` of the `ranks` equal ones of a packed row, ceil(S / ranks) tokens. Every rank is given the same row.

    Its `sequence_of_token` counts the samples of the whole row, and so do `real_B` and `kind_B`.

    Raises:
        ValueError: rows that are not packed, or inputs that nobody knows how to cut.
    """
    if not batch.packed:
        raise ValueError("only packed rows have parts")
    tokens = batch.labels.shape[1]
    size = -(-tokens // ranks)
    padding, own = size * ranks - tokens, slice(rank * size, (rank + 1) * size)

    def cut(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, padding), value=fill)[..., own].contiguous()

    lengths = [*batch.inputs["sample_lengths"], *([padding] if padding else [])]
    inputs: dict[str, Any] = {"input_ids": cut(batch.inputs["input_ids"], processor.tokenizer.pad_token_id)}
    inputs |= {name: cut(batch.inputs[name], fill) for name, fill in BY_TOKEN.items() if name in batch.inputs}
    inputs |= sample_bounds(lengths)
    of_images, routes = _images(batch.inputs, rank, ranks, size, processor)
    inputs |= {**of_images, ROW_PART: RowPart(rank, ranks, routes)}
    strange = [name for name in batch.inputs if name not in inputs and not _of_images(name)]
    if strange:
        raise ValueError(f"no part of the input {strange[0]!r} can be cut")
    behind = F.pad(batch.labels, (0, padding + 1), value=NO_LOSS)[:, own.stop]
    return replace(
        batch,
        inputs=inputs,
        labels=cut(batch.labels, NO_LOSS),
        sequence_of_token=cut(batch.sequence_of_token, -1),
        next_label=behind,
        whole=batch.whole and own.stop <= tokens,
    )


def _of_images(name: str) -> bool:
    return name == "pixel_values" or name.startswith("image_")


def _images(
    inputs: dict[str, Any], rank: int, ranks: int, size: int, processor: Processor
) -> tuple[dict[str, Any], FeatureRoutes | None]:
    """The inputs of the tower for this rank's images, {} where it has none, and how features travel."""
    if "pixel_values" not in inputs:
        return {}, None
    grid, prepare = inputs["image_grid_thw"], processor.image_processor
    assert prepare is not None  # it has made the pixels
    patches_I = grid.prod(-1)
    owner_I = dealt(patches_I.tolist(), ranks)
    owner_N = owner_I.repeat_interleave(patches_I // prepare.merge_size**2)  # of each image token, as they follow
    home_N = (inputs["input_ids"][0] == processor.image_token_id).nonzero().squeeze(1) // size
    place_N = torch.arange(len(owner_N))
    own_N = place_N[owner_N == rank]
    to_P = [(home_N[own_N] == other).nonzero().squeeze(1) for other in range(ranks)]
    from_P = [place_N[(owner_N == other) & (home_N == rank)] for other in range(ranks)]
    routes = FeatureRoutes(
        torch.cat(to_P), [len(one) for one in to_P], [len(one) for one in from_P], torch.cat(from_P).argsort()
    )
    if not (owner_I == rank).any():
        return {}, routes
    pixels = inputs["pixel_values"][owner_I.repeat_interleave(patches_I) == rank]
    kept = grid[owner_I == rank]
    return {"pixel_values": pixels, "image_grid_thw": kept, **processor.tower_inputs(kept)}, routes


def dealt(cost_I: list[int], ranks: int) -> Tensor:
    """(I,) int64, the rank of each image: the largest of those left goes to the rank that has least."""
    load, owner_I = [0] * ranks, torch.empty(len(cost_I), dtype=torch.int64)
    for image in sorted(range(len(cost_I)), key=lambda one: -cost_I[one]):
        owner_I[image] = rank = min(range(ranks), key=lambda one: load[one])
        load[rank] += cost_I[image]
    return owner_I
