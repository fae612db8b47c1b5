"""The typed tree of one run: every key a run file or an override may hold, with its default.

`ds_moe.runfile` reads YAML and dotted overrides into this tree and turns pydantic's complaints into one-line errors
with file, line and the nearest valid key; `ds_moe.checks` refuses keys that a run would not use. Units stand in the
comment of each key.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator


class Section(BaseModel):
    """A section of the run file: unknown keys are errors, values are checked and never converted ("8" is no 8)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False, protected_namespaces=()
    )


class Located(Section):
    """The root of a file: knows where each of its keys was written."""

    _file: str = PrivateAttr("run file")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def remember_origins(self, file: str, origins: dict[str, str]) -> None:
        """Keep where each dotted key was written ("run.yaml:12", "override train.lr=1"), for error messages."""
        self._file, self._origins = file, origins

    def at(self, key: str) -> str:
        """Where `key` or the closest section around it was written; the file where only its default holds."""
        return origin_of(key, self._origins, self._file)


class ModelConfig(Section):
    path: str | None = None  # local folder or hub id of a qwen3_vl_moe, qwen3_moe or qwen3_vl checkpoint
    preset: str | None = None  # or a tiny model built from config: see ds_moe/models/presets.py
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    freeze: list[str] = []  # "vision", "router", "experts", "embeddings" or a regex on parameter names

    @field_validator("freeze")
    @classmethod
    def _freeze_is_regex(cls, freeze: list[str]) -> list[str]:
        for entry in freeze:
            try:
                re.compile(entry)
            except re.error as error:
                raise ValueError(f"{entry!r} is no regular expression ({error})") from error
        return freeze


class DataConfig(Section):
    train: str  # JSONL or Parquet file, or "digits" (bundled scans rendered as chat samples); task rl: rollouts
    eval: str | None = None  # same forms; "digits" is the held-out split
    root: str | None = None  # images must lie below it; default: the folder of the data file
    max_length: int = Field(default=2048, gt=0)  # tokens a sample, image tokens included
    max_pixels: int = Field(default=16_777_216, gt=0)  # pixels of one image as stored; more is a bad record
    on_bad_record: Literal["stop", "skip"] = "stop"
    shuffle: bool = True
    length_grouping: bool = True  # samples of like length share a micro-batch
    num_workers: int = Field(default=0, ge=0)  # processes a rank
    prefetch_factor: int | None = Field(default=None, gt=0)  # steps a worker prepares ahead (default 2)


class AnyRouter(Section):
    """What every kind of router has; docs/routers.md has their formulas."""

    kind: str
    top_k: int | None = Field(default=None, gt=0)  # default: the model's own
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)  # of assignments, in training; a token keeps at least one


class Jittered(Section):
    jitter_noise: float = Field(default=0.0, ge=0, lt=1)  # in training the router sees x * uniform(1 - j, 1 + j)


class Limited(Section):
    capacity_factor: float | None = Field(default=None, gt=0)  # training: rows an expert takes / its fair share


class TopKRouting(Limited, Jittered, AnyRouter):
    kind: Literal["topk"] = "topk"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    order: Literal["softmax_then_topk", "topk_then_softmax"] | None = None  # default softmax_then_topk
    normalize: bool | None = None  # a token's weights sum to 1; default: as the model family does
    route_scale: float = Field(default=1.0, gt=0)  # factor of all weights
    groups: int | None = Field(default=None, gt=0)  # a token chooses from its best top_groups groups of experts
    top_groups: int | None = Field(default=None, gt=0)
    temperature: float = Field(default=1.0, gt=0)  # logits are divided by it
    drop: Literal["position", "score"] | None = None  # whom a full expert refuses; default position


class NoisyTopKRouting(TopKRouting):
    kind: Literal["noisy_topk"] = "noisy_topk"
    noise_std: float = Field(default=1.0, gt=0)  # factor of the learned noise


class ExpertChoiceRouting(Jittered, AnyRouter):
    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = Field(default=1.0, gt=0)  # rows an expert takes / its fair share
    allow_noncausal: bool = False  # train a causal model although its tokens then depend on later ones


class HashRouting(Limited, AnyRouter):
    kind: Literal["hash"] = "hash"


class BalancedRouting(Limited, AnyRouter):
    kind: Literal["balanced"] = "balanced"


RouterConfig = Annotated[
    TopKRouting | NoisyTopKRouting | ExpertChoiceRouting | HashRouting | BalancedRouting, Field(discriminator="kind")
]


class NoBalance(Section):
    kind: Literal["none"] = "none"


class AuxBalance(Section):
    kind: Literal["aux"] = "aux"
    weight: float = Field(default=1e-3, gt=0)
    scope: Literal["micro_batch", "global_batch", "sequence"] = "micro_batch"
    normalize_by_k: bool = False  # perfectly balanced the loss is weight * top_k, or weight with this


class ZLossBalance(Section):
    kind: Literal["z_loss"] = "z_loss"
    weight: float = Field(default=1e-3, gt=0)


class LossFreeBalance(Section):
    kind: Literal["loss_free"] = "loss_free"
    update_rate: float = Field(default=1e-3, gt=0)  # step of the bias, in units of the router's scores
    rule: Literal["sign", "proportional"] = "sign"
    decay_from: float = Field(default=0.8, ge=0, le=1)  # share of the run after which the step falls to 0; 1: never


Balance = Annotated[NoBalance | AuxBalance | ZLossBalance | LossFreeBalance, Field(discriminator="kind")]


class DispatchConfig(Section):
    kind: Literal["auto", "local", "all_to_all"] = "auto"  # auto: local at ep_size 1, else all_to_all
    chunks: int = Field(default=1, gt=0)  # parts of a rank's experts: rows of one travel while another is computed


class ExpertsConfig(Section):
    backend: Literal["auto", "grouped_mm", "megablocks", "liger", "reference"] = "auto"  # kernels; auto: by device
    recompute: Literal["none", "act", "all"] = "act"  # what backward computes again: nothing, the activation, all
    apply_weight: Literal["before", "after"] = "after"  # combine weights multiply what experts get, or what they give


class ReplayConfig(Section):
    enabled: bool = False  # a forward uses the experts that its batch brings (task: rl), not those its routers choose
    moves_bias: bool = False  # whether replayed tokens count for the loss-free bias


class MoEConfig(Section):
    ep_size: int = Field(default=1, gt=0)  # ranks one copy of the experts is spread over
    router: RouterConfig = TopKRouting()
    balance: list[Balance] = []
    dispatch: DispatchConfig = DispatchConfig()
    experts: ExpertsConfig = ExpertsConfig()
    replay: ReplayConfig = ReplayConfig()

    @field_validator("router", mode="before")
    @classmethod
    def _default_kind(cls, router: Any) -> Any:
        return {"kind": "topk", **router} if isinstance(router, dict) else router


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    output_dir: str = Field(default="runs/default", min_length=1)
    stage: Literal["all", "router_only"] = "all"  # router_only: everything but the routers is frozen
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["fp32", "bf16"] | None = None  # default: bf16 on an accelerator, fp32 on CPU
    steps: int | None = Field(default=None, gt=0)  # optimizer steps; or
    epochs: int | None = Field(default=None, gt=0)  # passes over the data
    micro_batch_size: int = Field(default=1, gt=0)  # samples a rank and forward
    global_batch_size: int = Field(default=8, gt=0)  # samples an optimizer step; accumulation follows from it
    lr: float = Field(default=1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)  # cosine only: floor as a share of lr
    weight_decay: float = Field(default=0.0, ge=0)  # matrices only; norms and biases never decay
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: no clipping
    gradient_checkpointing: bool = False
    resume: str = Field(default="auto", min_length=1)  # newest complete of output_dir | never | a folder
    eval_every: int | None = Field(default=None, gt=0)  # steps; the end is always evaluated if data.eval is set
    eval_batch_size: int | None = Field(default=None, gt=0)  # samples a rank; default micro_batch_size
    eval_samples: int | None = Field(default=None, gt=0)  # of data.eval in periodic evaluations; default all
    eval_generate: bool = True  # also generate answers and count exact matches
    max_new_tokens: int | None = Field(default=None, gt=0)  # of a generated answer (default 16)
    patience: int | None = Field(default=None, gt=0)  # evaluations without a better loss that end the run
    max_skipped: int = Field(default=3, ge=0)  # steps in a row not taken for a NaN or infinity; one more ends the run
    watchdog_s: float = Field(default=600.0, gt=0)  # seconds without progress, of any rank, that end the job
    stop_within_s: float = Field(default=120.0, gt=0)  # seconds from a signal to the end of its step and checkpoint


class LoRAConfig(Section):
    """Freezes the model and trains low-rank updates of its matrices; docs/lora.md."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)  # updates are scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank)
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what an update sees, in training
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]  # linear layers, by the last part of their names
    experts: bool = False  # gate_up and down of every expert too
    train_router: bool = False  # the routers' own weights, in full


class GateConfig(Section):
    """Used with `task: gate`: a learned gate over LoRA adapters of one model; docs/gating.md."""

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
    """Used with `task: rl`; docs/replay.md has the formulas, `replay/objective.py` the defaults of each objective."""

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


class MonitorConfig(Section):
    tensorboard: bool = True
    log_every: int = Field(default=10, gt=0)  # steps
    heatmap_every: int = Field(default=50, gt=0)  # steps between layer x expert load images
    sample_images: int = Field(default=4, ge=0)  # evaluated samples shown as images
    dead_alarm_steps: int = Field(default=100, gt=0)  # steps without a token after which an expert is reported


class CheckpointConfig(Section):
    every: int | None = Field(default=None, gt=0)  # steps; default: only at the end
    keep: int = Field(default=2, gt=0)
    background: bool = False  # training goes on while files are written, from a copy in host memory


class RunConfig(Located):
    """One run, as `ds_moe.train` takes it."""

    task: Literal["sft", "rl", "gate"] = "sft"  # imitate answers, reinforce the completions of rollouts, gate adapters
    model: ModelConfig
    data: DataConfig
    moe: MoEConfig | None = None  # absent for a dense model
    lora: LoRAConfig | None = None  # absent: the model itself is trained
    train: TrainConfig = TrainConfig()
    rl: RLConfig = RLConfig()
    gate: GateConfig = GateConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: str  # a DeepSpeed JSON, beside the run file or below the working directory


def origin_of(key: str, origins: dict[str, str], file: str) -> str:
    """`origins` of a dotted key or of its nearest parent in it, else `file`."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return file
