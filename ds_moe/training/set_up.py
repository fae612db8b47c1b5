"""Everything a run needs."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ds_moe.checkpoint.files import step_folders
from ds_moe.checkpoint.progress import Progress
from ds_moe.checkpoint.room import checkpoint_bytes, no_room, unwritable
from ds_moe.config.check import attention_problem, check_model, warmup_problem
from ds_moe.config.deepspeed import moves_nothing, precision, resolve_deepspeed, summed_in_bf16, zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BAD_RECORDS
from ds_moe.data.chat_template import end_token
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.position import check_same_data
from ds_moe.data.processor import Processor
from ds_moe.data.stream import StepStream
from ds_moe.distributed import Topology, raise_together
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model, read_weights
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.errors import UserError
from ds_moe.faults.signals import Stopped, StopRequest, agreed
from ds_moe.faults.watchdog import watch_job
from ds_moe.memory.predict import predict
from ds_moe.models.attention import check_packable
from ds_moe.models.convert import moe_layers
from ds_moe.models.generation import stop_at
from ds_moe.models.load import build_outline, experts_of, load_model, model_config, processor_of
from ds_moe.models.matrices import by_muon
from ds_moe.models.routing import routing_note
from ds_moe.models.stored_names import Carried
from ds_moe.moe.context import ForwardContext
from ds_moe.monitor.flops import active_flops_per_token, patch_cost, peak_flops
from ds_moe.monitor.monitor import make_monitor
from ds_moe.tasks.registry import TaskKind, task_kind
from ds_moe.tasks.task import TrainingParts
from ds_moe.training.expert_load import watch as count_load
from ds_moe.training.run import EarlyStopping, Run
from ds_moe.weights.files import SafetensorsFiles


def set_up(config: RunConfig) -> Run:
    """Data, model, engine and monitor, in the order in which mistakes are cheapest to find (collective)."""
    ep_size = config.moe.ep_size if config.moe else 1
    sharing = config.train.sequence_parallel
    topology = start_distributed(ep_size, lambda: experts_of(config.model), config.train.watchdog_s, sharing)
    watch = watch_job(topology.rank, topology.world_size, config.train.watchdog_s)
    stop = StopRequest(topology.rank, config.train.stop_within_s, lambda: str(watch.place))
    raise_together(unwritable(Path(config.train.output_dir), "train.output_dir"))
    seed_everything(config.train.seed)
    if topology.rank == 0:
        forget_earlier_run(config)
    processor, kind = processor_of(config.model, config.data.video), task_kind(config)
    outline = build_outline(model_config(config.model))
    check_model(config, outline.config, topology.world_size)
    if problem := attention_problem(config, on_cpu()):
        raise UserError(problem)
    check_packable(config, outline.config)
    kind.set_trainable(outline, config)
    stream, eval_set = _data(config, topology, processor, kind, patch_cost(outline))
    progress = Progress(config.train.steps or (config.train.epochs or 1) * (stream.steps_per_epoch or 0))
    steps_are_known = not (kind.files_follow and config.train.epochs is not None)
    if steps_are_known and (problem := warmup_problem(config, progress.total_steps)):
        raise UserError(problem)
    hidden_size = outline.config.get_text_config().hidden_size
    ds_config = resolve_deepspeed(config, topology.world_size, on_cpu(), hidden_size)
    zero = zero_plan(ds_config)
    base = kind.base(config)  # an export reads what is carried from it, as it does its weights
    from_files = base is None and config.model.path is not None
    carried = Carried(outline, SafetensorsFiles.find(str(config.model.path)) if from_files else None)
    size = checkpoint_bytes(outline, 1, base is None, zero.width, by_muon(outline, config)) + carried.nbytes
    raise_together(_no_room(config, size) if topology.rank == 0 else None)
    memory = predict(outline, config, zero, topology.world_size, on_cpu())
    model, context = load_prepared(config, topology, processor, ds_config)
    engine = build_engine(model, config, ds_config, progress.total_steps, kind.adapter_lr(config))
    engine.train()
    seed_everything(config.train.seed + topology.rank)  # from here on ranks draw apart
    monitor = make_monitor(
        config,
        rank=topology.rank,
        total_steps=progress.total_steps,
        flops_per_token=active_flops_per_token(outline),
        peak_flops=peak_flops(topology),
        run_dir=Path(config.train.output_dir),
    )
    if config.monitor.tensorboard:
        count_load(moe_layers(engine.module), len(stream.kinds))
    if warning := summed_in_bf16(config, zero, topology.world_size):
        monitor.note(f"warning: {warning}")
    if note := moves_nothing(config, on_cpu()):
        monitor.note(f"note: {note}")
    if note := routing_note(config.moe, outline.config):
        monitor.note(f"note: {note}")

    def turn(phase: str) -> None:
        watch.at(phase)
        votes = torch.tensor(stop.votes(), device=topology.device)
        dist.all_reduce(votes)
        if (number := agreed(votes.tolist())) is not None:
            raise Stopped(number)

    parts = TrainingParts(
        config, topology, engine, context, processor, stream, eval_set, monitor.note, at=watch.at, turn=turn
    )
    patience = EarlyStopping(config.train.patience) if config.train.patience else None
    return Run(parts, kind.make(parts), progress, monitor, memory, carried, watch, stop, patience)


def load_prepared(
    config: RunConfig, topology: Topology, processor: Processor, ds_config: dict[str, object]
) -> tuple[PreTrainedModel, ForwardContext | None]:
    """The run's model as engines take it, its weights read, and what its expert layers share (collective)."""
    kind = task_kind(config)
    dtype = torch.bfloat16 if precision(config, on_cpu()) == "bf16" else torch.float32
    model = load_model(config.model, dtype, config.train.seed, unread=True)
    if (end := end_token(processor)) is not None:
        stop_at(model, end)
    context = prepare_model(
        model, config, topology, set_trainable=kind.prepare, keep_ranks_in_step=not kind.runs_vision_itself
    )
    read_weights(model, config, topology, ds_config)
    return model, context


def _data(
    config: RunConfig, topology: Topology, processor: Processor, kind: TaskKind, patch_cost: float
) -> tuple[StepStream, EvalSet | None]:
    """What is trained on and what is held out. Bad records are kept for the first step, where ranks compare them."""
    stream = kind.stream(
        config,
        processor,
        rank=topology.data_rank,
        world_size=topology.data_ranks,
        part=(topology.part, topology.sequence_parallel),
        raise_errors=False,
        record_kind=kind.train_records(config, model_config(config.model)),
        patch_cost=patch_cost,
    )
    check_same_data(stream.order)
    if config.data.eval is None:
        return stream, None
    ranks = {"rank": topology.rank, "world_size": topology.world_size, "raise_errors": False}  # of whole rows
    eval_set = EvalSet(config, processor, **ranks, record_kind=kind.eval_records(config))
    check_same_data({"its sha256": eval_set.sha256, "its records": len(eval_set)}, "data.eval")
    return stream, eval_set


def _no_room(config: RunConfig, size: int) -> str | None:
    """That the disk has no room for the checkpoint that every run writes at its end, at the least."""
    problem = no_room(Path(config.train.output_dir, "checkpoints"), size)
    return None if problem is None else f"{config.at('train.output_dir')}: train.output_dir {problem}"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def forget_earlier_run(config: RunConfig) -> None:
    """Remove another run's BAD_RECORDS, on rank 0 before any rank loads samples; with a checkpoint they are our own."""
    folder = Path(config.train.output_dir)
    if not step_folders(folder / "checkpoints"):
        (folder / BAD_RECORDS).unlink(missing_ok=True)
