"""Turns an engine's trace into the experts that each input token replays: (T, L, K), -1 where the router decides.

Row i of a trace routes input token `start + i`, whose output predicts token `start + i + 1`. The last token of a
sequence predicts nothing and has no row. An aligned tensor has one entry for each input token: whoever truncates a
sequence slices its aligned tensor in the same way (`aligned[:512]`, `aligned[-512:]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from ds_moe.errors import UserError
from ds_moe.models.families import FAMILIES, family_of, moe_layers_of
from ds_moe.replay.traces import RoutingTrace

LIVE = -1  # stands for an expert id where the router decides
PLAUSIBLE_ROWS = 8  # with top-1, so many rows of nothing but expert 0 are taken for an engine that recorded nothing
EXTRA_ROW, SHORT = ("refuse", "drop"), ("refuse", "live")  # what a rollout record may say of its rows, see `align`


@dataclass(frozen=True)
class RoutingShape:
    """What a trace must have in common with a model."""

    layers: int  # all decoder layers
    moe_layers: tuple[int, ...]  # decoder indices of the layers with experts
    experts: int
    top_k: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> RoutingShape:
        """Of a model's config. Raises `UserError` for a model without experts."""
        text = config.get_text_config()
        if config.model_type in FAMILIES and not family_of(config).measured:
            raise UserError(f"routing replay: it has not been held against {config.model_type} models; leave it out")
        moe = moe_layers_of(text)
        if not moe:
            raise UserError(f"routing replay: a {text.model_type} model without MoE layers (leave its routing out)")
        return cls(text.num_hidden_layers, moe, text.num_experts, text.num_experts_per_tok)


def align(
    trace: RoutingTrace,
    shape: RoutingShape,
    tokens: int,
    *,
    extra_row: Literal["refuse", "drop"] = "refuse",
    short: Literal["refuse", "live"] = "refuse",
) -> Tensor:
    """The experts that one sequence of `tokens` input tokens replays: int16 (tokens, L MoE layers, K).

    The router decides, marked by -1, for the last token, for tokens before `trace.start` and where the trace has a row
    of -1. The trace may have all decoder layers, with zeros in the dense ones, or only the layers with experts.

    Args:
        extra_row: "drop" ignores a row for the last token. Rows of nothing but 0 or -1 at the end are filler, and are
            always ignored.
        short: "live" lets the router decide for tokens at the end that have no row.

    Raises:
        UserError: a trace that cannot be of this sequence and model; the line names row, layer, value and fix.
    """
    name = trace.name
    layers = _layers(trace, shape, name)
    rows = _rows(trace, tokens, name, extra_row, short)
    _check_dense(trace.ids[:rows], layers, shape, name)
    ids_TLK = trace.ids[:rows, [layers.index(layer) for layer in shape.moe_layers]]
    _check_experts(ids_TLK, shape, name)
    aligned_TLK = torch.full((tokens, *ids_TLK.shape[1:]), LIVE, dtype=torch.int16)
    aligned_TLK[trace.start : trace.start + rows] = torch.from_numpy(ids_TLK)
    return aligned_TLK


def _layers(trace: RoutingTrace, shape: RoutingShape, name: str) -> Sequence[int]:
    """The decoder index of each layer of the trace."""
    found, top_k = trace.ids.shape[1:]
    if found not in (shape.layers, len(shape.moe_layers)):
        model = f"the model has {shape.layers}, {len(shape.moe_layers)} of them with experts"
        raise UserError(f"{name}: {found} layers, but {model} (replay the routing of the same model)")
    if top_k != shape.top_k:
        fix = "replay with the engine's num_experts_per_tok"
        raise UserError(f"{name}: top-{top_k}, but the model routes to top-{shape.top_k} ({fix})")
    if trace.largest < shape.experts - 1:
        fix = "its larger ids have wrapped around: have the engine write 16 bits"
        raise UserError(f"{name}: ids of at most {trace.largest}, but the model has {shape.experts} experts ({fix})")
    return range(shape.layers) if found == shape.layers else shape.moe_layers


def _rows(trace: RoutingTrace, tokens: int, name: str, extra_row: str, short: str) -> int:
    """How many rows of the trace to use."""
    found, expected = len(trace.ids), tokens - 1 - trace.start
    if expected < 0:
        fix = "start counts input tokens from the first of the sequence"
        raise UserError(f"{name}: starts at token {trace.start} of {tokens} input tokens ({fix})")
    counted = f"{name}: {found} rows, but {expected} of {tokens} input tokens from {trace.start} on have one"
    if found > expected and np.isin(trace.ids[expected:], (0, LIVE)).all():
        return expected
    if found == expected + 1:
        if extra_row == "drop":
            return expected
        fix = "extra_row: drop, if the engine also routed the last one; else its rows are those of other tokens"
        raise UserError(f"{counted}: the last token has none ({fix})")
    if found > expected:
        raise UserError(f"{counted} (give the input tokens that the engine saw, and where its rows start)")
    if found < expected and short != "live":
        fix = "give the input tokens that the engine saw, and where its rows start; short: live leaves the rest to "
        fix += "the router"
        raise UserError(f"{counted} ({fix})")
    return found


def _check_dense(ids: np.ndarray, layers: Sequence[int], shape: RoutingShape, name: str) -> None:
    """Refuse a trace whose layers without experts hold anything but zeros, or -1 in rows of padding."""
    dense = [column for column, layer in enumerate(layers) if layer not in shape.moe_layers]
    wrong = (ids[:, dense] != 0) & (ids[:, dense] != LIVE)
    if wrong.any():
        row, at, k = np.argwhere(wrong)[0]
        cell = f"row {row}, layer {layers[dense[at]]}: expert {ids[row, dense[at], k]}"
        fix = "mlp_only_layers and decoder_sparse_step must be those of the engine's model"
        raise UserError(f"{name}: {cell} in a dense layer ({fix})")


def _check_experts(ids_TLK: np.ndarray, shape: RoutingShape, name: str) -> None:
    """Refuse ids that this model's routers cannot have chosen, and layers that the engine did not record."""

    def refuse(wrong: np.ndarray, problem: str) -> None:
        """Raise for the first (row, layer, ...) at which the mask is true."""
        if wrong.any():
            row, at, *_ = np.argwhere(wrong)[0]
            experts = ids_TLK[row, at].tolist()
            raise UserError(f"{name}: row {row}, layer {shape.moe_layers[at]}: experts {experts}: {problem}")

    live_TLK = ids_TLK == LIVE
    refuse(ids_TLK < LIVE, "an id below -1 (ids start at 0, and -1 in all of them leaves a token to the live router)")
    refuse(ids_TLK >= shape.experts, f"the model has {shape.experts} (replay the routing of the same model)")
    refuse(live_TLK.any(-1) & ~live_TLK.all(-1), "-1 beside experts (give all of a token's experts, or only -1)")
    recorded_L = (~live_TLK[..., 0]).sum(0)
    empty_L = ((ids_TLK == 0) | live_TLK).all((0, 2)) & (recorded_L >= (PLAUSIBLE_ROWS if shape.top_k == 1 else 1))
    if empty_L.any():  # before the check for duplicates, which zeros are too: this message says the cause
        layer, count = shape.moe_layers[empty_L.argmax()], recorded_L[empty_L.argmax()]
        fix = "the engine recorded nothing in a layer that has experts: update it, or leave the routing out"
        raise UserError(f"{name}: layer {layer} is all zero in {count} rows ({fix})")
    zero_T = (ids_TLK == 0).all((1, 2))  # with top-1 a few tokens may go to expert 0 in all layers
    if zero_T.any() and (shape.top_k > 1 or (zero_T.sum() >= PLAUSIBLE_ROWS and len(shape.moe_layers) > 1)):
        fix = "the engine recorded nothing for this token: write -1 in place of the zeros, and the router decides"
        raise UserError(f"{name}: row {zero_T.argmax()} is all zero in every layer, one of {zero_T.sum()} ({fix})")
    sorted_TLK = np.sort(ids_TLK, axis=-1)
    twice_TLK = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]) & (sorted_TLK[..., 1:] != LIVE)
    refuse(twice_TLK, "one of them twice (a token takes K different experts; is this the engine's ids, unchanged?)")
