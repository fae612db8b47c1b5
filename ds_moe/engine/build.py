"""Builds a DeepSpeed engine from a model and a run's settings, and checks what must hold before the first step."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import set_z3_leaf_module, z3_leaf_parameter
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_moe.config.deepspeed import zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.config.sections import TrainConfig
from ds_moe.engine.moe_binding import BoundInBlock, BoundMoELayer
from ds_moe.engine.muon import MuonAdamW
from ds_moe.engine.start import share_patience
from ds_moe.engine.unshared import spare_copies
from ds_moe.errors import UserError
from ds_moe.models.convert import moe_layers
from ds_moe.models.matrices import Stack, by_muon

NO_MATRICES: Mapping[str, Stack] = MappingProxyType({})


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    adapter_lr: float | None = None,
    matrices: Mapping[str, Stack] = NO_MATRICES,
    **muon: float,
) -> list[dict[str, Any]]:
    """The optimizer's groups, as DeepSpeed wants them.

    Matrices have weight decay, vectors have none, and experts have groups of their own. So do the adapters of a gated
    model, with an `adapter_lr`, their learning rate, and the `matrices` that Muon trains, with the keys of `muon`.

    Experts come first: ZeRO-3 lays all it trains into one buffer, in this order and without gaps, and a grouped product
    on a GPU takes matrices that begin at a multiple of 16 bytes, which what lies before them must not spoil.
    """
    banked = {id(one) for one in model.adapter_bank.parameters()} if adapter_lr is not None else set()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = [parameter for parameter in trained.values() if id(parameter) in banked]
    others = [one for name, one in trained.items() if id(one) not in banked and name not in matrices]
    groups = [
        {"name": "adapters", "params": adapters, "weight_decay": weight_decay, "lr": adapter_lr},
        {"name": "muon", "params": [trained[name] for name in matrices], "weight_decay": weight_decay, **muon},
        {"name": "matrices", "params": [one for one in others if _dimensions(one) > 1], "weight_decay": weight_decay},
        {"name": "vectors", "params": [one for one in others if _dimensions(one) <= 1], "weight_decay": 0.0},
    ]
    split = split_params_into_different_moe_groups_for_optimizer(groups)
    split.sort(key=lambda group: not group.get("moe", False))
    return [group for group in split if group["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3's shard of a parameter is flat


def scheduler_factory(config: TrainConfig, total_steps: int) -> Callable[[Optimizer], LRScheduler]:
    """The schedule: warm-up, then cosine (down to `min_lr_ratio`), linear or constant, over `total_steps` steps."""
    kind, specific = config.schedule, {}
    if kind == "cosine" and config.min_lr_ratio > 0:
        kind, specific = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
    elif kind == "constant":
        kind = "constant_with_warmup"
    steps = {"num_warmup_steps": config.warmup_steps, "num_training_steps": total_steps}
    return lambda optimizer: get_scheduler(kind, optimizer, **steps, scheduler_specific_kwargs=specific)


def build_engine(
    model: PreTrainedModel,
    config: RunConfig,
    ds_config: dict[str, object],
    total_steps: int,
    adapter_lr: float | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Call `deepspeed.initialize` on a prepared model and check our invariants afterwards.

    Raises:
        UserError: a combination that DeepSpeed cannot train.
        RuntimeError: an invariant does not hold, because of a bug here or a DeepSpeed version that works differently.
    """
    stage, layers = zero_plan(ds_config).stage, _mark_leaves(model, ds_config)
    experts = [parameter for layer in layers for parameter in layer.experts.parameters()]
    if layers and stage < 3 and not any(parameter.requires_grad for parameter in experts):
        raise UserError(
            "frozen experts (model.freeze, train.stage router_only, or lora without lora.experts, or task gate) need "
            "ZeRO stage 3: choose a DeepSpeed JSON of ZeRO stage 3, or train the experts"
        )
    train, matrices = config.train, by_muon(model, config)
    muon = {"lr": train.muon_lr or train.lr, "momentum": train.muon_momentum} if matrices else {}
    groups = parameter_groups(model, train.weight_decay, adapter_lr, matrices, **muon)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    schedule = scheduler_factory(train, total_steps)
    stepped = _by_muon(groups, ds_config) if matrices else {"model_parameters": groups, "config": ds_config}
    named = dict(model.named_parameters())
    engine, *_ = deepspeed.initialize(model=model, lr_scheduler=schedule, **stepped)
    if matrices:
        engine.basic_optimizer.find_matrices(engine, {named[name]: stack for name, stack in matrices.items()})
    share_patience()
    _check_invariants(engine, grouped, stage)
    _check_layers(layers, stage)
    spare_copies(engine)
    return engine


def _by_muon(groups: list[dict[str, Any]], ds_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `deepspeed.initialize` for an optimizer that DeepSpeed does not know."""
    rest = {**ds_config, "zero_allow_untested_optimizer": True}
    adam = rest.pop("optimizer")["params"]
    precision = torch.bfloat16 if zero_plan(ds_config).bf16 else torch.float32
    return {"optimizer": MuonAdamW(groups, precision, **adam), "config": rest}


def build_without_optimizer(model: PreTrainedModel, ds_config: dict[str, object]) -> deepspeed.DeepSpeedEngine:
    """An engine for evaluations alone, of a dictionary of `resolve_without_optimizer`: it holds weights, no master
    weights, no moments and no gradients.

    Raises:
        RuntimeError: as `build_engine`.
    """
    layers = _mark_leaves(model, ds_config)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    share_patience()
    _check_layers(layers, zero_plan(ds_config).stage)
    return engine


def _mark_leaves(model: PreTrainedModel, ds_config: dict[str, object]) -> list[BoundMoELayer | BoundInBlock]:
    """The MoE layers. ZeRO-3 is told to gather together what a layer of the model with experts holds, and the parts of
    an output layer with LoRA, whose weights `models/head.py` reads without calling the modules that own them."""
    layers = cast("list[BoundMoELayer | BoundInBlock]", moe_layers(model))
    if zero_plan(ds_config).stage == 3:
        for leaf in (model.get_output_embeddings(), *_leaves(model, layers)):
            set_z3_leaf_module(leaf, True)
    return layers


def _leaves(model: PreTrainedModel, layers: Sequence[BoundMoELayer | BoundInBlock]) -> list[nn.Module]:
    """The modules whose weights ZeRO-3 gathers together, at the price of one module's hooks: layers with experts.

    A layer with experts must be one: ranks whose tokens visit other experts would gather out of step, and a decision of
    our router does not pass through the tensors that a router in its block returns, to which ZeRO-3 would tie the
    gathering of its weight. ZeRO-3 reduces a leaf's gradients once its input has got one, which the decoder's first
    hidden states always do (`models/freeze.py`). Other layers, such as a vision tower's, whose input need not, stay as
    they are.
    """
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    experts = {id(layer) for layer in layers}
    return [module for module in found if any(id(inner) in experts for inner in module.modules())]


def _check_invariants(engine: deepspeed.DeepSpeedEngine, grouped: list[int], stage: int) -> None:
    if stage in (1, 2) and not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        raise RuntimeError(f"checkpoints cannot be written with DeepSpeed's {type(engine.optimizer).__name__}")
    trainable = {id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if sorted(grouped) != sorted(trainable):
        lost = [name for key, name in trainable.items() if key not in set(grouped)]
        raise RuntimeError(f"every trainable parameter must be in exactly one optimizer group; lost: {lost[:5]}")


def _check_layers(layers: list[BoundMoELayer | BoundInBlock], stage: int) -> None:
    for layer in layers:
        if stage == 3 and not all(z3_leaf_parameter(parameter) for parameter in layer.parameters()):
            raise RuntimeError(f"MoE layer {layer.index} is in no ZeRO-3 leaf module: ranks would gather out of step")
        group = layer.dispatcher.ep.group if layer.ep_size > 1 else None
        if layer.ep_size > 1 and dist.get_world_size(group) != layer.ep_size:
            raise RuntimeError(f"MoE layer {layer.index} exchanges over {dist.get_world_size(group)} ranks")
        for parameter in layer.experts.parameters():
            if parameter.allreduce:
                raise RuntimeError(f"an expert of MoE layer {layer.index} would be averaged with other experts")
