"""A micro-batch: what the model's forward takes, and which sample each token belongs to.

Shapes: B samples lie in R rows of S tokens. Padded rows hold one sample each, so R is B; a packed row holds them all,
one behind the other, so R is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ds_moe.data.patches import PixelTable

NO_LOSS = -100  # the label of a token on which no loss is taken
BY_VALUE = 2**18  # bytes of a tensor that is handed to another process by value
# Inputs that say how large images are. They stay on the host, where transformers reads them: on an accelerator, every
# reading would wait for all that it has been given to do.
SIZES = ("image_grid_thw", "image_cu_seqlens", "image_cu_window_seqlens")


@dataclass(kw_only=True)
class Batch:
    """The samples that one rank's forward takes. A task that needs more of them adds tensors in a subclass.

    Attributes:
        inputs: arguments of the model's forward: input_ids (R, S) int64 and, as the model has it, mm_token_type_ids
            (R, S), routing (R, S, L, K) and, with images, pixel_values (P, D), image_grid_thw (I, 3) and what
            `Processor.tower_inputs` gives. Padded rows have an attention_mask (R, S) and, with images, position_ids
            (3, R, S); a packed row has position_ids (1, S), or (4, 1, S) with a rotation in three dimensions, and what
            `sample_bounds` gives.
        labels: (R, S) int64, NO_LOSS where no loss is taken. In a packed row the first token of every sample has none,
            because the token before it, which would predict it, is another sample's.
        sequence_of_token: (R, S) int64, the sample that each token belongs to, -1 for padding.
        real_B: (B,) bool, false for samples that only fill up the batch.
        kind_B: (B,) int64, index of the record's kind, -1 for a record without one; None: kinds are not told apart.
        next_label: (R,) int64, the label of the token behind each row, where the rows are parts of longer ones (see
            `row_part.py`); None: nothing is behind.
        whole: true where every token is real, as the loading process has seen it; false: not known. Reading it from the
            tensors would wait for an accelerator.
        pixel_table: the floats of the bytes that `pixel_values` still are; `to` makes them. None: they are floats.
    """

    inputs: dict[str, Any]
    labels: Tensor
    sequence_of_token: Tensor
    real_B: Tensor
    kind_B: Tensor | None = None
    next_label: Tensor | None = None
    whole: bool = False
    pixel_table: PixelTable | None = None

    @classmethod
    def of_rows(cls, inputs: dict[str, Tensor], labels: Tensor, real_B: Tensor | None = None) -> Self:
        """One sample a row, padded where `attention_mask` is 0. `real_B` None: every sample is real."""
        row_B1 = torch.arange(len(labels), device=labels.device).unsqueeze(1)
        sequence_BS = torch.where(inputs["attention_mask"].bool(), row_B1, -1)
        if real_B is None:
            real_B = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        whole = bool(inputs["attention_mask"].all() and real_B.all())
        return cls(inputs=inputs, labels=labels, sequence_of_token=sequence_BS, real_B=real_B, whole=whole)

    @classmethod
    def of_packed(cls, inputs: dict[str, Any], labels: Tensor, lengths: Sequence[int], real_B: Tensor) -> Self:
        """One row of samples of these lengths, in their order. `labels` is (1, S), of each sample as it is alone."""
        lengths_B = torch.tensor(lengths)
        labels = labels.clone()
        labels[0, lengths_B.cumsum(0) - lengths_B] = NO_LOSS
        return cls(
            inputs={**inputs, **sample_bounds(lengths)},
            labels=labels,
            sequence_of_token=torch.arange(len(lengths)).repeat_interleave(lengths_B).unsqueeze(0),
            real_B=real_B,
            whole=bool(real_B.all()),
        )

    def __getstate__(self) -> dict[str, object]:
        """Between processes small tensors go by value: a segment of shared memory for each would take longer."""
        inputs = {name: _by_value(value) for name, value in self.inputs.items()}
        return {name: _by_value(value) for name, value in vars(self).items()} | {"inputs": inputs}

    def __setstate__(self, state: dict[str, dict[str, object]]) -> None:
        inputs = {name: _as_tensor(value) for name, value in state["inputs"].items()}
        vars(self).update({name: _as_tensor(value) for name, value in state.items()} | {"inputs": inputs})

    @property
    def packed(self) -> bool:
        """Whether one row holds all samples, without padding."""
        return "sample_lengths" in self.inputs

    @property
    def samples(self) -> int:
        """B, with those that only fill up the batch."""
        return len(self.real_B)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: the tokens of each sample, padding left out."""
        found = self.sequence_of_token[self.sequence_of_token >= 0]
        return torch.bincount(found, minlength=self.samples)

    @property
    def with_labels(self) -> dict[str, Any]:
        """The arguments of a forward that returns the loss."""
        if self.pixel_table is not None:
            raise TypeError("pixel_values are bytes until the batch is moved to a device: batch.to(device)")
        return {**self.inputs, "labels": self.labels}

    @property
    def real_of_token(self) -> Tensor:
        """(R, S) bool: false at padding and at the tokens of samples that only fill up the batch."""
        return (self.sequence_of_token >= 0) & self.real_B[self.sequence_of_token.clamp(min=0)]

    @property
    def kind_of_token(self) -> Tensor | None:
        """(R, S) int64: the kind of each token's sample, -1 for none and at padding; None: as for `kind_B`."""
        if self.kind_B is None:
            return None
        return torch.where(self.sequence_of_token >= 0, self.kind_B[self.sequence_of_token.clamp(min=0)], -1)

    @property
    def tokens(self) -> Tensor:
        """Integer scalar: the number of real tokens."""
        return self.real_of_token.sum()

    @property
    def label_tokens(self) -> Tensor:
        """Integer scalar: the number of tokens with a loss. Nothing predicts the first token of a sample."""
        within = (self.labels[:, 1:] != NO_LOSS).sum()
        return within if self.next_label is None else within + (self.next_label != NO_LOSS).sum()

    def to(self, device: torch.device) -> Self:
        """The batch on `device`, its images as floats. Copies to CUDA start from pinned memory and run beside the
        computation."""
        inputs = {
            name: _copy(value, device) if isinstance(value, Tensor) and name not in SIZES else value
            for name, value in self.inputs.items()
        }
        others = {name: _copy(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.pixel_table is not None and "pixel_values" in inputs:  # parts of rows may have no image
            inputs["pixel_values"] = self.pixel_table.floats(inputs["pixel_values"])
        return replace(self, inputs=inputs, pixel_table=None, **others)


def sample_bounds(lengths: Sequence[int]) -> dict[str, Any]:
    """The arguments that tell attention where the samples of a packed row lie.

    cu_seq_lens_q and cu_seq_lens_k (B + 1,) int32, max_length_q and max_length_k are those of transformers'
    `FlashAttentionKwargs`. `sample_lengths`, a tuple, says the same to `ds_moe.models.attention` on the host, where
    reading a tensor of the accelerator would wait for all that it has been given to do.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "sample_lengths": tuple(lengths),
    }


def _by_value(value: object) -> object:
    if not isinstance(value, Tensor) or value.nbytes > BY_VALUE or value.device.type != "cpu":
        return value
    return value if value.dtype == torch.bfloat16 else value.numpy()


def _as_tensor(value: object) -> object:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
