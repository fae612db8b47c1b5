"""One row for each `task` of a run file: its records, what it trains, its loss and its reports.

The only place that asks which task a run has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.checkpoint.base import base_identity
from ds_moe.config.rules.dpo import reference_of
from ds_moe.config.rules.engine import engine_of
from ds_moe.config.run import RunConfig
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind
from ds_moe.data.stream import StepStream
from ds_moe.data.streaming import train_stream
from ds_moe.models.freeze import set_trainable
from ds_moe.models.load import model_config
from ds_moe.replay.align import RoutingShape
from ds_moe.tasks.dpo.pairs import PAIRS
from ds_moe.tasks.dpo.task import REFERENCE_IS, PreferenceOptimization
from ds_moe.tasks.gate.adapters import adapter_files, find_adapters
from ds_moe.tasks.gate.files import start_gate
from ds_moe.tasks.gate.model import install_gate
from ds_moe.tasks.gate.records import Routed
from ds_moe.tasks.gate.task import GateTask
from ds_moe.tasks.rl.online.stream import OnlineStream
from ds_moe.tasks.rl.online.task import OnlinePolicyOptimization, online_summary
from ds_moe.tasks.rl.rewards import reward_spread
from ds_moe.tasks.rl.rollouts import Rollouts
from ds_moe.tasks.rl.task import PolicyOptimization
from ds_moe.tasks.task import Task, TrainingParts


def _freezing_key(config: RunConfig) -> str:
    return "train.stage" if config.train.stage == "router_only" else "lora" if config.lora else "model.freeze"


@dataclass(frozen=True)
class TaskKind:
    """What differs between tasks. The defaults are those of supervised fine-tuning.

    Attributes:
        make: the task of one run.
        train_records: what the records of data.train are, given the config of the model.
        stream: what is trained on, of the arguments of a `TrainStream`.
        eval_records: what those of data.eval are.
        set_trainable: freezes a model and adds what is trained instead; also on the meta device.
        trainable_key: the key of the run file that most likely is to blame where that fails.
        freezing_key: the key that freezes experts, where they are.
        begin: fills what was added from an earlier run, once the model has values.
        fixed_adapters: files of the adapters that the run takes as they are, by name; None: it takes none.
        adapter_lr: their learning rate, where they are trained at one of their own.
        files_follow: whether other data files follow one another in the same run, whose steps are not known.
        runs_vision_itself: whether the task runs the vision tower, on every rank alike.
        summary: lines that the opening summary adds.
        records_summary: the same about the records of data.train, from what was remembered of each; a line may begin
            with "warning: ".
        closing: rows of the closing table: name -> (figure of the task, format).
    """

    name: str
    make: Callable[[TrainingParts], Task] = Task
    train_records: Callable[[RunConfig, PretrainedConfig], RecordKind] = lambda config, model_config: CHAT
    stream: Callable[..., StepStream] = train_stream
    eval_records: Callable[[RunConfig], RecordKind] = lambda config: CHAT
    set_trainable: Callable[[PreTrainedModel, RunConfig], object] = set_trainable
    trainable_key: Callable[[RunConfig], str] = lambda config: "lora" if config.lora else "model.freeze"
    freezing_key: Callable[[RunConfig], str] = _freezing_key
    begin: Callable[[PreTrainedModel, RunConfig], None] = lambda model, config: None
    fixed_adapters: Callable[[RunConfig], Mapping[str, list[Path]] | None] = lambda config: None
    adapter_lr: Callable[[RunConfig], float | None] = lambda config: None
    files_follow: bool = False
    runs_vision_itself: bool = False
    summary: Callable[[PreTrainedModel, RunConfig], list[str]] = lambda model, config: []
    records_summary: Callable[[Sequence[object]], list[str]] = lambda remembered: []
    closing: dict[str, tuple[str, str]] = field(default_factory=dict)

    def base(self, config: RunConfig) -> dict[str, object] | None:
        """Identity of the frozen model that checkpoints leave out; None where they hold the whole model."""
        adapters = self.fixed_adapters(config)
        return base_identity(config, adapters) if config.lora is not None or adapters is not None else None

    def prepare(self, model: PreTrainedModel, config: RunConfig) -> None:
        """`set_trainable`, then `begin`."""
        self.set_trainable(model, config)
        self.begin(model, config)


def task_kind(config: RunConfig) -> TaskKind:
    """The row of a run's task."""
    return ONLINE if engine_of(config) is not None else TASKS[config.task]


def _rollouts(config: RunConfig, model: PretrainedConfig) -> Rollouts:
    shape = None
    if config.moe is not None and config.moe.replay.enabled:
        shape = RoutingShape.of(model)
        shape = replace(shape, top_k=config.moe.router.top_k or shape.top_k)
    return Rollouts(shape, config.rl.normalize_std, need_reference=config.rl.kl_weight > 0)


def _rounds(config: RunConfig, processor: Processor, *, rank: int, world_size: int, patch_cost: float, **_: object):
    rollouts = replace(_rollouts(config, model_config(config.model)), need_reference=False)
    ranks = {"rank": rank, "world_size": world_size}
    return OnlineStream(config, processor, rollouts=rollouts, patch_cost=patch_cost, **ranks)


def _pairs(config: RunConfig, model_config: PretrainedConfig) -> RecordKind:
    if config.dpo.replay_reference:
        RoutingShape.of(model_config)  # refuses families that replay has not been held against
    return PAIRS


def _labelled_chats(config: RunConfig) -> RecordKind:
    names = list(find_adapters(config.gate.adapters, config.gate.adapters_in))
    return Routed(names, labelled=config.gate.stage == "supervised")


def _gate_summary(model: PreTrainedModel, config: RunConfig) -> list[str]:
    bank, gate = model.adapter_bank, config.gate
    return [
        f"gate      stage {gate.stage} over {', '.join(bank.names)}: {len(bank.layers)} layers with adapters, "
        f"reads {gate.modalities} ({gate.text}, {gate.vision}), {gate.select} per {gate.per}"
    ]


TASKS = {
    kind.name: kind
    for kind in (
        TaskKind("sft"),
        TaskKind(
            "rl",
            make=PolicyOptimization,
            train_records=_rollouts,
            files_follow=True,
            records_summary=lambda remembered: reward_spread(remembered).lines(),
            closing={"reward": ("reward", "{:.3f}"), "mismatch k3, engine to trainer": ("mismatch_k3", "{:.2e}")},
        ),
        TaskKind(
            "gate",
            make=GateTask,
            train_records=lambda config, model_config: _labelled_chats(config),
            eval_records=_labelled_chats,
            set_trainable=lambda model, config: install_gate(model, config.gate),
            freezing_key=lambda config: "task",
            trainable_key=lambda config: "gate.adapters" if config.gate.adapters else "gate.adapters_in",
            begin=lambda model, config: start_gate(model, config.gate),
            fixed_adapters=lambda config: adapter_files(config.gate),
            adapter_lr=lambda config: config.gate.adapter_lr,
            runs_vision_itself=True,
            summary=_gate_summary,
        ),
        TaskKind(
            "dpo",
            make=PreferenceOptimization,
            train_records=_pairs,
            eval_records=lambda config: PAIRS,
            summary=lambda model, config: [f"pairs     loss {config.dpo.loss}, {REFERENCE_IS[reference_of(config)]}"],
            closing={
                "reward margin, mean over steps": ("margin", "{:.3f}"),
                "pairs whose preferred answer is rewarded more": ("accuracy", "{:.3f}"),
            },
        ),
    )
}

# `task: rl` whose rollouts are sampled during the run: data.train are conversations, the same ones in every resumption.
ONLINE = replace(
    TASKS["rl"],
    make=OnlinePolicyOptimization,
    train_records=lambda config, model: CHAT,
    stream=_rounds,
    files_follow=False,
    records_summary=lambda remembered: [],
    summary=lambda model, config: online_summary(config),
    closing={
        **TASKS["rl"].closing,
        "completions dropped, a round": ("dropped_completions", "{:.1f}"),
        "completions cut off": ("truncated", "{:.1%}"),
        "lag, rounds": ("lag", "{:.2f}"),
        "seconds of a round: sampling": ("sample_s", "{:.1f}"),
        "seconds of a round: rewards behind it": ("score_s", "{:.1f}"),
        "seconds of a round: training": ("train_s", "{:.1f}"),
        "seconds of a round: weights written": ("weights_s", "{:.2f}"),
        "seconds of a round: weights read by the engine": ("load_s", "{:.2f}"),
    },
)
