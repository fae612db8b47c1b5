"""What the training loop gives the monitor: plain data, already reduced over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class StepReport:
    """One optimizer step."""

    step: int  # optimizer steps done, including this one: 1 ... total_steps
    loss: float  # mean over the step's labelled tokens, without auxiliary terms
    lr: float
    grad_norm: float  # global, before clipping
    tokens: int  # non-padding tokens of the step, over all ranks
    samples: int  # samples of the step, over all ranks
    step_s: float  # wall seconds of the whole step, waiting for its data included
    data_wait_s: float  # of these, seconds spent waiting for data
    sent_bytes: float = 0.0  # counts, rows and weights that one rank sent to others by all-to-all, mean over ranks
    task: dict[str, float] = field(default_factory=dict)  # the task's own metrics, by name
    task_name: str = ""  # their tags begin with it
    fill: float | None = None  # share of real tokens in the room of the step's packed rows; None: rows are padded
    taken: bool = True  # False: there was a NaN or infinity, so the step was skipped and no weight has moved


@dataclass
class RoutingReport:
    """Expert load of the steps since the previous routing report. L MoE layers, E experts."""

    counts_LE: np.ndarray  # int64, assignments of all valid tokens to each expert
    image_counts_LE: np.ndarray  # int64, of these, assignments of image tokens
    entropy_L: float  # routing entropy in nats: mean over tokens and layers
    aux_loss: float | None  # sum of the balancers' loss terms; None when no balancer adds one
    last_step_LE: np.ndarray | None = None  # int64, the part of counts_LE that belongs to the last optimizer step
    drop_rate: float = 0.0  # share of the assignments that the experts' capacity refused
    uncovered: float = 0.0  # share of the tokens that no expert took, over all layers
    bias_norm: float | None = None  # L2 norm of the loss-free bias, mean over layers; None without one
    kind_counts_LE: dict[str, np.ndarray] = field(default_factory=dict)  # int64, counts_LE by kind of record
    pairs_EE: np.ndarray | None = None  # int64, of the first layer: tokens that use both experts; diagonal: counts

    def __post_init__(self) -> None:
        """Raise ValueError if the two counts contradict each other."""
        if self.counts_LE.ndim != 2 or self.counts_LE.shape != self.image_counts_LE.shape:
            raise ValueError(
                f"counts_LE {self.counts_LE.shape} and image_counts_LE {self.image_counts_LE.shape} "
                "must both be (MoE layers, experts)"
            )
        if (self.image_counts_LE > self.counts_LE).any():
            raise ValueError("image_counts_LE exceeds counts_LE: image tokens are counted among all tokens")


@dataclass
class ShownSample:
    """One evaluated sample, as the gallery shows it."""

    image: Image | None  # None: a text-only sample
    question: str
    answer: str  # the expected one
    prediction: str  # the generated one


@dataclass
class EvalReport:
    """One evaluation on held-out data."""

    step: int
    loss: float
    accuracy: dict[str, float]  # share of exact matches by kind of question, and "mean"; empty without generation
    samples: list[ShownSample]
    scalars: dict[str, float] = field(default_factory=dict)  # further measurements, by TensorBoard tag
    pictures: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)  # by tag; drawn in the background
