"""The keys of the sections that one task reads, and what those who know no task must be told of a run's."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ds_moe.config.rollout import EngineConfig, RewardConfig
from ds_moe.config.sections import Section


class TaskSection(Section):
    """The section that a task has its name from."""

    habits: ClassVar[Mapping[str, str]] = {}  # rows of `habits.py`: another trainer's keys, and what to write for them

    def answers_nothing(self) -> str | None:
        """Why an evaluation generates no answers, where that is because of the task."""
        return None

    def needs_more_than_a_model(self) -> str | None:
        """What a model, as an export is one, lacks for an evaluation of this task."""
        return None


class GateConfig(TaskSection):
    """Used with `task: gate`: a learned gate over LoRA adapters of one model."""

    adapters: dict[str, str] = {}  # name: folder of a PEFT adapter
    adapters_in: str | None = None  # a folder: each subfolder with an adapter_config.json is an adapter
    stage: Literal["supervised", "end_to_end", "joint"] = "supervised"
    start: str | None = None  # output folder, checkpoint or exported gate of the stage before
    text: Literal["embeddings", "layer", "last", "first"] = "embeddings"  # what the gate reads of the request
    text_layer: int | None = Field(default=None, gt=0)  # text layer: the decoder layer whose output that is, from 1
    vision: Literal["mean", "mean_std"] = "mean_std"  # what it reads of the screen: statistics of vision tokens
    modalities: Literal["both", "text", "vision"] = "both"
    width: int = Field(default=128, gt=0)  # of the gate's hidden layer
    select: Literal["soft", "top_k", "hard"] = "soft"
    top_k: int | None = Field(default=None, gt=0)  # adapters of a request
    temperature: float = Field(default=1.0, gt=0)
    per: Literal["example", "layer", "token"] = "example"
    class_weights: Literal["none", "balanced"] = "none"  # balanced: rare adapters count more in the supervised loss
    entropy_weight: float = 0.0  # above 0 sharpens the gate, below 0 spreads it
    kl_weight: float = Field(default=0.0, ge=0)  # pulls the gate towards the supervised one
    adapter_lr: float | None = Field(default=None, gt=0)  # learning rate of the adapters; default: train.lr

    def answers_nothing(self) -> str | None:
        supervised = self.stage == "supervised"
        return "gate.stage supervised learns which adapter, and answers nothing" if supervised else None


class RLConfig(TaskSection):
    """Used with `task: rl`; `replay/objective.py` has the formulas, and the defaults of each objective."""

    engine: EngineConfig | None = None  # samples the rollouts during the run; absent: data.train is a rollout file
    reward: RewardConfig = RewardConfig()  # what a completion is worth, with an engine
    objective: Literal["grpo", "dapo", "gspo", "cispo"] = "grpo"
    clip_low: float | None = Field(default=None, ge=0)  # ratios are clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float | None = Field(default=None, ge=0)
    aggregate: Literal["token_mean", "sequence_mean"] | None = None  # default: the objective's
    normalize_std: bool = True  # rewards become advantages divided by the standard deviation of their group
    updates_per_batch: int = Field(default=1, gt=0)  # optimizer steps whose ratios refer to the same old policy
    temperature: float = Field(default=1.0, gt=0)  # at which the completions were sampled
    router: Literal["none", "router_shift", "joint"] = "none"  # how the routers' own ratios take part
    gamma_floor: float = Field(default=0.8, gt=0, le=1)  # router_shift: lower bound of gamma
    gamma_place: Literal["before", "after"] = "before"  # router_shift: gamma scales the ratio before or after clipping
    joint_lambda: float = Field(default=0.1, gt=0)  # joint: weight of the mean log-ratio of the experts
    correction: Literal["none", "tis", "mis", "icepop"] = "none"  # weights for tokens sampled by another engine
    correction_low: float | None = Field(default=None, ge=0)
    correction_high: float | None = Field(default=None, gt=0)
    correction_level: Literal["token", "sequence"] = "token"
    kl_weight: float = Field(default=0.0, ge=0)  # of the KL to the start; in files to their reference_logprobs
    kl_kind: Literal["k1", "k2", "k3"] = "k3"

    habits: ClassVar[Mapping[str, str]] = {
        "epsilon cliprange": "rl.clip_low and rl.clip_high bound the ratios",
        "epsilon_high": "rl.clip_high",
        "kl_coef": "rl.kl_weight",
    }


class DPOConfig(TaskSection):
    """Used with `task: dpo`; `tasks/dpo/objective.py` has the formulas."""

    loss: Literal["dpo", "ipo", "hinge", "robust", "simpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)  # of the implicit rewards: the larger, the nearer the reference
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)  # share of pairs that are taken to be swapped
    margin: float = Field(default=0.5, ge=0)  # simpo: by which the preferred answer's reward must be larger
    rpo_alpha: float = Field(default=0.0, ge=0)  # weight of the preferred answer's mean cross entropy
    # The model without its low-rank updates, or log-probs stored before the first step; default: base where that is
    # the model that the run started from.
    reference: Literal["base", "stored"] | None = None
    reference_dir: str | None = None  # folder of stored log-probs; default: data_cache of train.output_dir
    replay_reference: bool = False  # the policy uses the experts that the reference used for the same tokens

    habits: ClassVar[Mapping[str, str]] = {
        "rlhf_type loss_type": "write task: dpo and dpo.loss, or task: rl and rl.objective",
        "pref_beta dpo_beta": "dpo.beta",
        "pref_loss": "dpo.loss",
        "pref_ftx cpo_alpha": "dpo.rpo_alpha",
        "simpo_gamma": "dpo.margin",
        "ref_model ref_model_name_or_path ref_model_id_or_path": "leave it out: the reference is the model that the "
        "run starts from, see dpo.reference",
        "precompute_ref_log_probs": "write dpo.reference: stored",
    }

    def answers_nothing(self) -> str | None:
        return "task dpo compares the answers of pairs and generates none"

    def needs_more_than_a_model(self) -> str | None:
        return None if self.loss == "simpo" else "comes without the reference that task dpo compares it with"


TASK_SECTIONS: dict[str, type[TaskSection]] = {"rl": RLConfig, "gate": GateConfig, "dpo": DPOConfig}
LEARNS_PAIRS = "dpo"  # the task whose records are pairs of answers, for those whose records are not


CORRECTION_BOUNDS: dict[str, tuple[float, float]] = {"tis": (0.0, 2.0), "mis": (0.0, 2.0), "icepop": (0.5, 5.0)}
