"""Sequence parallelism: ranks that share a packed row compute a part of its tokens each.

All but attention works on tokens by themselves, and needs nothing of the other parts. In attention an all-to-all gives
each rank the whole row for a share of the heads, and another one brings the outputs back to the tokens (DeepSpeed
Ulysses, Jacobs 2023, arXiv 2309.14509). DeepSpeed's own attention of that name is not used: it wraps the vision tower
as well, and its mask is not that of samples in a row.

Letters of shapes: s tokens of a part, S of the row, P ranks that share it, H heads and G of keys and values, D width of
a head, h heads of a rank.
"""

from __future__ import annotations

from math import lcm
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from ds_moe.data.row_part import ROW_PART, FeatureRoutes
from ds_moe.distributed import SequenceGroup
from ds_moe.models.families import family_of
from ds_moe.models.generation import Arguments, Keywords
from ds_moe.models.vision import encode_blank, has_vision

ROW_GROUP = "row_group"  # the argument by which attention learns that its tokens are a part of a row


def share_rows(model: PreTrainedModel, group: SequenceGroup) -> None:
    """Let the forwards of a model that are given a part of a row (`data/row_part.py`) compute it with the ranks of
    `group`, all of which must run them together. Forwards of whole rows stay what they are."""
    routes: FeatureRoutes | None = None  # of the forward that runs

    def begin(base: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        nonlocal routes
        part = kwargs.pop(ROW_PART, None)
        routes = None if part is None else part.features
        if part is None:
            return args, kwargs
        if (part.rank, part.ranks) != (group.rank, group.size):
            raise ValueError(f"part {part.rank} of {part.ranks} was given to rank {group.rank} of {group.size}")
        if routes is not None and kwargs.get("pixel_values") is None:  # other ranks encode the images of this row
            kwargs["pixel_values"] = torch.empty(0, device=kwargs["input_ids"].device)
        return args, {**kwargs, ROW_GROUP: group}

    base = model.base_model
    base.register_forward_pre_hook(begin, with_kwargs=True)
    if not has_vision(model):
        return
    own_features = base.get_image_features

    # The model calls this between its embedding and its decoder. The tower must run there and nowhere else, because
    # ZeRO-3 gathers weights in the order of calls, and ranks of other rows may have no image.
    def get_image_features(pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> object:
        if routes is None:
            return own_features(pixel_values, image_grid_thw, **kwargs)
        if image_grid_thw is None:
            rows = _no_features(model, pixel_values.device)
        else:
            found = own_features(pixel_values, image_grid_thw, **kwargs)
            rows = torch.cat([torch.cat(level) for level in (found.pooler_output, *found.deepstack_features)], dim=1)
        return _as_output(travelled(rows, routes, group), _levels(model))

    base.get_image_features = get_image_features


def _levels(model: PreTrainedModel) -> int:
    """The tower's output, and inner features of it (DeepStack)."""
    return 1 + len(model.config.vision_config.deepstack_visual_indexes)


def _no_features(model: PreTrainedModel, device: torch.device) -> Tensor:
    """(0, levels x width) of a rank that encodes no image of its row; the tower runs nevertheless, on a blank one."""
    tower = model.get_submodule(str(family_of(model).vision))
    width = _levels(model) * model.config.get_text_config().hidden_size
    rows, zero = torch.empty(0, width, dtype=tower.dtype, device=device), encode_blank(model, device)
    return rows if zero is None else rows + zero.to(rows.dtype)


def _as_output(rows: Tensor, levels: int) -> SimpleNamespace:
    first, *deep = rows.chunk(levels, dim=1)
    return SimpleNamespace(pooler_output=(first,), deepstack_features=[(level,) for level in deep])


def travelled(rows: Tensor, routes: FeatureRoutes, group: SequenceGroup) -> Tensor:
    """The features of this part's image tokens, of those that the ranks of a row have made (collective)."""
    sent = rows[routes.rows_S.to(rows.device, non_blocking=True)]
    received = _Exchange.apply(sent, routes.send, routes.receive, group)
    return received[routes.order_M.to(rows.device, non_blocking=True)]


def to_heads(query: Tensor, key: Tensor, value: Tensor, group: SequenceGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of a part to some heads of the whole row (collective).

    Heads of keys and values are repeated as far as each rank needs one.

    Args:
        query: (1, H, s, D), where P divides H.
        key, value: (1, G, s, D).

    Returns:
        (1, h, S, D) and twice (1, g, S, D), without a copy of what has arrived.
    """
    ranks, times = group.size, lcm(key.shape[1], group.size) // key.shape[1]
    key, value = (tensor.repeat_interleave(times, dim=1) if times > 1 else tensor for tensor in (key, value))
    parts = [tensor[0].unflatten(0, (ranks, -1)).transpose(1, 2) for tensor in (query, key, value)]  # (P, s, h, D)
    one_each = [1] * ranks
    row = _Exchange.apply(torch.cat(parts, dim=2), one_each, one_each, group).flatten(0, 1)  # (S, heads, D)
    query, key, value = row.transpose(0, 1).unsqueeze(0).split([part.shape[2] for part in parts], dim=1)
    return query, key, value


def to_tokens(output: Tensor, group: SequenceGroup) -> Tensor:
    """From some heads of the whole row, (1, S, h, D), to all heads of a part, (1, s, H, D) (collective)."""
    one_each = [1] * group.size
    parts = _Exchange.apply(output[0].unflatten(0, (group.size, -1)), one_each, one_each, group)  # (P, s, h, D)
    return parts.transpose(0, 1).flatten(1, 2).unsqueeze(0)


class _Exchange(torch.autograd.Function):
    """All-to-all of slices of the first dimension: `send[p]` of them to rank p, `receive[p]` from it. In backward the
    gradients travel back."""

    @staticmethod
    def forward(ctx: FunctionCtx, given: Tensor, send: list[int], receive: list[int], group: SequenceGroup) -> Tensor:
        ctx.back = receive, send, group
        return _exchange(given, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.back), None, None, None


def _exchange(given: Tensor, send: list[int], receive: list[int], group: SequenceGroup) -> Tensor:
    arrived = given.new_empty(sum(receive), *given.shape[1:])
    dist.all_to_all_single(arrived, given.contiguous(), receive, send, group=group.group)
    return arrived
