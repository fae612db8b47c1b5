"""The keys of the sections that one task reads: `rl` and `gate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_moe.config.sections import Section


class GateConfig(Section):
    """Used with `task: gate`: a learned gate over LoRA adapters of one model."""

    adapters: dict[str, str] = {}  # name: folder of a PEFT adapter
    adapters_in: str | None = None  # a folder: each subfolder with an adapter_config.json is one, named as it is
    stage: Literal["supervised", "end_to_end", "joint"] = "supervised"
    start: str | None = None  # an output folder, checkpoint or exported gate of the stage before
    text: Literal["embeddings", "layer", "last", "first"] = "embeddings"  # what the request is read from
    text_layer: int | None = Field(default=None, gt=0)  # decoder layer whose output it is, from 1
    vision: Literal["mean", "mean_std"] = "mean_std"  # what the screen is read from: of the vision tower's tokens
    modalities: Literal["both", "text", "vision"] = "both"
    width: int = Field(default=128, gt=0)  # of the hidden layer
    select: Literal["soft", "top_k", "hard"] = "soft"
    top_k: int | None = Field(default=None, gt=0)  # adapters a request
    temperature: float = Field(default=1.0, gt=0)
    per: Literal["example", "layer", "token"] = "example"
    class_weights: Literal["none", "balanced"] = "none"  # balanced: rare adapters weigh more in the supervised loss
    entropy_weight: float = 0.0  # above 0 sharpens the gate, below 0 spreads it
    kl_weight: float = Field(default=0.0, ge=0)  # holds the gate near the supervised one
    adapter_lr: float | None = Field(default=None, gt=0)  # of the adapters (default: train.lr)


class RLConfig(Section):
    """Used with `task: rl`; `replay/objective.py` has the formulas, and the defaults of each objective."""

    objective: Literal["grpo", "dapo", "gspo", "cispo"] = "grpo"
    clip_low: float | None = Field(default=None, ge=0)  # ratios are held in [1 - clip_low, 1 + clip_high]
    clip_high: float | None = Field(default=None, ge=0)
    aggregate: Literal["token_mean", "sequence_mean"] | None = None  # default: the objective's
    normalize_std: bool = True  # advantages from rewards are divided by the standard deviation in their group
    updates_per_batch: int = Field(default=1, gt=0)  # optimizer steps whose ratios refer to the same old policy
    temperature: float = Field(default=1.0, gt=0)  # that the completions were sampled at
    router: Literal["none", "router_shift", "joint"] = "none"  # whether the routers' own ratios take part
    gamma_floor: float = Field(default=0.8, gt=0, le=1)  # of router_shift
    gamma_place: Literal["before", "after"] = "before"  # gamma scales the ratio, or what was clipped
    joint_lambda: float = Field(default=0.1, gt=0)  # of the mean expert log-ratio in joint
    correction: Literal["none", "tis", "mis", "icepop"] = "none"  # weights for tokens sampled by another engine
    correction_low: float | None = Field(default=None, ge=0)
    correction_high: float | None = Field(default=None, gt=0)
    correction_level: Literal["token", "sequence"] = "token"
    kl_weight: float = Field(default=0.0, ge=0)  # of the KL term; the rollouts must bring reference_logprobs
    kl_kind: Literal["k1", "k2", "k3"] = "k3"


CORRECTION_BOUNDS: dict[str, tuple[float, float]] = {"tis": (0.0, 2.0), "mis": (0.0, 2.0), "icepop": (0.5, 5.0)}
