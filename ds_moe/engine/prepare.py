"""Turns a loaded model into one that DeepSpeed can wrap: sets trainable parts, converts MoE blocks, reads weights."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe.config.deepspeed import zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.distributed import Topology, sequence_group
from ds_moe.engine.activation_offload import ActivationOffload
from ds_moe.engine.moe_binding import BOUND, create_groups, zero3_home
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.convert import convert_for, load_expert_bias
from ds_moe.models.freeze import set_trainable
from ds_moe.models.shared_rows import share_rows
from ds_moe.models.streaming import read_unread
from ds_moe.models.vision import has_vision, keep_vision_in_step
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.tape import checkpoint_contexts
from ds_moe.weights.files import SafetensorsFiles
from ds_moe.weights.unread import is_unread


def prepare_model(
    model: PreTrainedModel,
    config: RunConfig,
    topology: Topology,
    *,
    set_trainable: Callable[[PreTrainedModel, RunConfig], None] = set_trainable,
    keep_ranks_in_step: bool = True,
) -> ForwardContext | None:
    """Freeze what is not trained, choose the attention, convert MoE blocks, and switch on gradient checkpointing.

    Args:
        set_trainable: freezes parts of a loaded model, and adds what the run's task trains instead (LoRA, a gate).
        keep_ranks_in_step: give ranks without images a blank one; False if the task runs the vision tower itself.

    Returns:
        The context that the model's expert layers share; None for a dense model.
    """
    set_trainable(model, config)
    attend_by_sample(model)
    if (row_group := sequence_group(topology)) is not None:
        share_rows(model, row_group)
    if config.moe is not None:
        create_groups(topology.ep_size)
    ep = ExpertParallel(topology.ep_size, topology.ep_rank)
    context = convert_for(model, config, ep, BOUND)
    if context is not None:
        context.row_group = row_group
    if context is not None and config.model.path is not None:
        load_expert_bias(model, config.model.path)
    if has_vision(model) and keep_ranks_in_step:
        keep_vision_in_step(model)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        if config.train.offload_activations:
            ActivationOffload.enable(model)
    return context


def read_weights(model: PreTrainedModel, config: RunConfig, topology: Topology, ds_config: dict[str, object]) -> int:
    """Read the weights that `load_model` left in their files into this rank's memory; returns the bytes read.

    A rank reads its own experts only, and under ZeRO-3 only its shards. A complete model is left as it is.
    """
    if not any(is_unread(parameter) for parameter in model.parameters()):
        return 0
    files = SafetensorsFiles.find(str(config.model.path))
    assert files is not None  # load_model found them here a moment ago
    sharded = zero_plan(ds_config).stage == 3
    home = zero3_home(model, ds_config) if sharded else partial(_whole, topology.device)
    size = read_unread(model, files, ExpertParallel(topology.ep_size, topology.ep_rank), home)
    for buffer in model.buffers():  # DeepSpeed moves no buffers of a model that is sharded already
        buffer.data = buffer.data.to(topology.device)
    return size


def _whole(device: torch.device, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Allocate memory for a parameter that is not sharded; a `streaming.Home`."""
    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return parameter.data.view(-1), 0
