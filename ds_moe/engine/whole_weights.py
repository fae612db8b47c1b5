"""Weights of a ZeRO-3 model gathered once for an evaluation, instead of layer by layer for every generated token."""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import psutil
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero import unwrap_model_for_generation
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses, ZeroParamStatus

from ds_moe.distributed import over_ranks, ranks_of_host

SHARE = 0.5  # of the free memory; the rest is left to caches of attention and to activations


@contextmanager
def evaluation_mode(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Evaluate inside, with whole weights where they fit, and train again after it, however it ends (collective)."""
    engine.eval()
    try:
        with whole_weights(engine):
            yield
    finally:
        engine.train()


@contextmanager
def whole_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Hold every weight whole on every rank, without ZeRO-3's hooks, where all ranks have room for it (collective).

    Experts stay spread over their EP group. Below stage 3, and where memory is short, nothing changes. Weights must not
    be changed inside.
    """
    sharded = [parameter for parameter in engine.module.parameters() if hasattr(parameter, "ds_id")]
    missing = [one for one in sharded if one.ds_status is not ZeroParamStatus.AVAILABLE]
    size = sum(one.ds_numel * one.element_size() for one in missing)
    if not sharded or not all(over_ranks(size <= SHARE * _free_bytes(engine.device))):
        yield
        return
    failure = None
    with unwrap_model_for_generation(engine), _linear_of_torch():
        try:
            yield
        except BaseException as error:  # DeepSpeed would not put its hooks back
            failure = error
    if failure is not None:
        raise failure


@contextmanager
def _linear_of_torch() -> Iterator[None]:
    """Undo what stage 3 has put in the place of torch's linear function, which is slower and only spares a backward
    pass memory."""
    of_zero, F.linear = F.linear, getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", F.linear)
    try:
        yield
    finally:
        F.linear = of_zero


def _free_bytes(device: torch.device) -> float:
    """What one rank can still allocate."""
    if device.type == "cpu":
        return psutil.virtual_memory().available / (ranks_of_host() or 1)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
