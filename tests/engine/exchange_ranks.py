"""Ranks of test_exchange: a copy of the starting weights in the place of a run's, whose parameters are offloaded."""

import sys

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.checkpoint.fit import persistent_buffers
from ds_moe.config.moe import MoEConfig
from ds_moe.config.run import RunConfig
from ds_moe.engine.build import build_engine
from ds_moe.engine.exchange import FrozenCopy
from ds_moe.engine.moe_binding import BOUND, create_groups
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import convert
from ds_moe.models.presets import build_preset
from ds_moe.moe.all_to_all import ExpertParallel
from tests.launcher import leave, report

RUN = RunConfig(model={"preset": "tiny-moe"}, data={"train": "digits"}, moe={"ep_size": 2}, deepspeed="none")
IDS = torch.arange(24).view(2, 12)
STEPS = 3


def made(zero):
    topology = start_distributed(2)
    create_groups(2)
    torch.manual_seed(0)
    model = build_preset("tiny-moe")
    convert(model, MoEConfig(ep_size=2), ExpertParallel(2, topology.ep_rank), BOUND)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100, **zero},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    return build_engine(model, RUN, settings, total_steps=STEPS)


@torch.no_grad()
def answer(engine):
    """Logits of the weights of now."""
    engine.eval()
    logits = engine(input_ids=IDS, use_cache=False).logits.clone()
    engine.train()
    return logits


def compare(zero):
    """(whether forwards inside are those of the start, whether the run goes on as without the copy)."""
    engine, other = made(zero), made(zero)
    start = answer(engine)
    copy = FrozenCopy(engine.module, (buffer for _, buffer in persistent_buffers(engine.module)))
    inside, after, moved = [], [], []
    for _ in range(STEPS):
        for one in (engine, other):
            one.backward(one(input_ids=IDS + dist.get_rank(), labels=IDS, use_cache=False).loss)
            one.step()
        with copy.in_place():
            inside.append(torch.equal(answer(engine), start))
        now = answer(engine)
        after.append(torch.equal(now, answer(other)))
        moved.append(not torch.equal(now, start))
    engine.destroy(), other.destroy()
    return [inside, after, moved]


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    offload = {"device": "cpu", "pin_memory": False}
    report(plain=compare({}), offloaded=compare({"offload_param": offload, "offload_optimizer": offload}))
    leave()


if __name__ == "__main__":
    sys.exit(main())
