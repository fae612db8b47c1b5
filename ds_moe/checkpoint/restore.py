"""Chooses a checkpoint that is complete and undamaged, and loads it into an engine of any topology."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from ds_moe.checkpoint.files import MAPPED, STATE, Reader, damaged, find_checkpoint, incomplete, step_folders
from ds_moe.checkpoint.fit import chosen, model_misfits, persistent_buffers, saved_parameters
from ds_moe.distributed import Topology, over_ranks, together
from ds_moe.engine import masters as zero_state
from ds_moe.errors import UserError, all_in_one, one_line
from ds_moe.models.families import expert_state
from ds_moe.weights.files import MappedFiles


def choose(resume: str, folder: Path, topology: Topology, note: Callable[[str], None] = print) -> Path | None:
    """`fit.chosen`, with checksums that the ranks verify together, each a share of the files (collective)."""
    [existing, *_] = together(topology, "list checkpoints", lambda: step_folders(folder))

    def problem(path: Path) -> str | None:
        return next(filter(None, together(topology, f"check {path}", lambda: _problem(path, topology))), None)

    return chosen(resume, folder, existing, problem, note)


def find_together(source: Path, topology: Topology, note: Callable[[str], None] = print) -> Path:
    """`files.find_checkpoint`, where each rank checks a share of the files (collective)."""

    def problem_of(path: Path) -> str | None:
        return next(filter(None, over_ranks(_problem(path, topology))), None)

    return find_checkpoint(source, problem_of, note)


def _problem(path: Path, topology: Topology) -> str | None:
    return incomplete(path) or damaged(path, topology.rank, topology.world_size)


def load(engine: deepspeed.DeepSpeedEngine, topology: Topology, path: Path, with_frozen: bool) -> dict[str, Any]:
    """Load weights, Adam, schedule and random states from a checkpoint of any topology; its `state` (collective).

    The checkpoint must fit, see `fit.misfits`; `with_frozen`: it holds parameters that are not trained, too.
    """
    state, reader = _open(path)
    parameters = saved_parameters(engine.module, with_frozen)
    zero_state.start_adam(engine, state["adam_step"])
    for name, parameter in parameters.items():
        rows = _own_rows(name, parameter, topology)
        zero_state.write(parameter, zero_state.WEIGHT, reader.read(f"weight/{name}", rows))
        if parameter.requires_grad and state["adam_step"]:
            for moment in zero_state.moments(parameter):
                zero_state.write(parameter, moment, reader.read(f"{moment}/{name}", rows))
    _load_buffers(engine.module, reader)
    _restore_progress(engine, state)
    _restore_rng(path, state, topology)
    dist.barrier()
    return state


def load_weights(
    model: nn.Module, topology: Topology, path: Path, base: dict[str, object] | None = None
) -> dict[str, Any]:
    """Load the weights of a checkpoint, and nothing else, into a model whose engine has no optimizer; its `state`.

    Raises:
        UserError: the checkpoint does not fit the model, or the `base` (see `Saving`) that it is evaluated upon.
    """
    if problems := model_misfits(path, model, topology.ep_size, base):
        raise all_in_one(problems)
    state, reader = _open(path)
    for name, parameter in saved_parameters(model, with_frozen=base is None).items():
        rows = _own_rows(name, parameter, topology)
        zero_state.write_weight(parameter, reader.read(f"weight/{name}", rows))
    _load_buffers(model, reader)
    return state


def _open(path: Path) -> tuple[dict[str, Any], Reader]:
    return json.loads((path / STATE).read_text()), Reader(path)


def _load_buffers(model: nn.Module, reader: Reader) -> None:
    for name, buffer in persistent_buffers(model):
        buffer.copy_(reader.read(f"buffer/{name}"))


def _own_rows(name: str, parameter: Tensor, topology: Topology) -> tuple[int, int] | None:
    if not expert_state(name):
        return None
    rows = getattr(parameter, "ds_shape", parameter.shape)[0]
    return topology.ep_rank * rows, (topology.ep_rank + 1) * rows


def _restore_progress(engine: deepspeed.DeepSpeedEngine, state: dict[str, Any]) -> None:
    step = state["step"]
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.lr_scheduler.last_epoch = step - 1
    with warnings.catch_warnings():  # torch warns of a schedule that steps before the optimizer
        warnings.simplefilter("ignore", UserWarning)
        engine.lr_scheduler.step()  # computes the learning rate of the step, so a schedule needs no saved state


def _restore_rng(path: Path, state: dict[str, Any], topology: Topology) -> None:
    """Restore the random states if the world size is the same; otherwise set a new, reproducible one."""
    if state["world_size"] != topology.world_size:
        torch.manual_seed(state["step"] * topology.world_size + topology.rank)
        return
    source = path / f"rng-{topology.rank:05d}.safetensors"
    try:
        files = MappedFiles(MAPPED)
        torch.set_rng_state(files.read(source, "cpu"))
        if "cuda" in files.names(source) and topology.device.type == "cuda":
            torch.cuda.set_rng_state(files.read(source, "cuda"), topology.device)
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise UserError(f"{source} holds no random state of this machine: {one_line(error)}") from error
