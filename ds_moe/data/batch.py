"""A micro-batch: what the model's forward takes, and which sample each token belongs to.

Shapes: B samples lie in R rows of S tokens; where rows are padded, each holds one sample, and R is B.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

NO_LOSS = -100  # the label of a token on which no loss is taken


@dataclass(kw_only=True)
class Batch:
    """The samples that one rank's forward takes. A task that needs more of them adds tensors in a subclass.

    Attributes:
        inputs: arguments of the model's forward: input_ids, attention_mask (R, S) int64 and, as the model has it,
            mm_token_type_ids (R, S), pixel_values (P, D), image_grid_thw (I, 3), routing (R, S, L, K).
        labels: (R, S) int64, NO_LOSS where no loss is taken.
        sequence_of_token: (R, S) int64, the sample that each token belongs to, -1 for padding.
        real_B: (B,) bool, false for samples that only fill up the batch.
        kind_B: (B,) int64, index of the record's kind, -1 for a record without one; None: kinds are not told apart.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    sequence_of_token: Tensor
    real_B: Tensor
    kind_B: Tensor | None = None

    @classmethod
    def of_rows(cls, inputs: dict[str, Tensor], labels: Tensor, real_B: Tensor | None = None) -> Self:
        """One sample a row, padded where `attention_mask` is 0. `real_B` None: every sample is real."""
        row_B1 = torch.arange(len(labels), device=labels.device).unsqueeze(1)
        sequence_BS = torch.where(inputs["attention_mask"].bool(), row_B1, -1)
        if real_B is None:
            real_B = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return cls(inputs=inputs, labels=labels, sequence_of_token=sequence_BS, real_B=real_B)

    @property
    def with_labels(self) -> dict[str, Tensor]:
        """The arguments of a forward that returns the loss."""
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
        """Integer scalar: the number of tokens with a loss. Nothing predicts the first token of a row."""
        return (self.labels[:, 1:] != NO_LOSS).sum()

    def to(self, device: torch.device) -> Self:
        """The batch on `device`. Copies to CUDA start from pinned memory and run beside the computation."""
        inputs = {name: _copy(tensor, device) for name, tensor in self.inputs.items()}
        others = {name: _copy(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, inputs=inputs, **others)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
