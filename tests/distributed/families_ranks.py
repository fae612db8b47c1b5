"""Ranks of test_families: families whose blocks stay, with sharded experts, against the unconverted models."""

import copy
import itertools
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ds_moe.config.moe import MoEConfig
from ds_moe.config.run import RunConfig
from ds_moe.engine.build import build_engine
from ds_moe.engine.moe_binding import BOUND, create_groups
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import expert_state
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.tape import checkpoint_contexts
from tests.launcher import leave, report
from tests.models.tiny_families import build

RUN = RunConfig(model={"preset": "tiny-moe"}, data={"train": "digits"}, moe={"ep_size": 2}, deepspeed="none")


def batch_of(batch, rank):
    """Rank 1's words are others, and its padding too; the image, if there is one, is on both."""
    if rank == 0:
        return batch
    ids = batch["input_ids"]
    words = (ids >= 3) & (ids < 140)
    return {**batch, "input_ids": torch.where(words, 3 + (ids * 7) % 137, ids)}


def reference(model, everything):
    """Loss and gradients of plain transformers, averaged over the ranks' batches."""
    model.set_experts_implementation("eager")
    total = 0.0
    for batch in everything:
        loss = model(**batch, use_cache=False).loss / len(everything)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


ROUNDING = 1e-6  # in units of the model's largest gradient


def engine_settings(stage):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }


def compare(model, stage, checkpointing, everything, expected, breakage=None):
    """(loss difference, largest gradient difference relative to its tensor's largest entry)."""
    expected_loss, expected_grads = expected
    topology = start_distributed(2)
    create_groups(2)
    convert(model, MoEConfig(ep_size=2), ExpertParallel(2, topology.ep_rank), BOUND)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    if breakage is not None:
        breakage(model)
    engine = build_engine(model, RUN, engine_settings(stage), total_steps=1)
    engine.train()
    loss = engine(**everything[topology.rank], use_cache=False).loss
    engine.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = torch.tensor([abs(total.item() / 2 - expected_loss), 0.0])
    largest = max(grad.abs().max() for grad in expected_grads.values() if grad is not None)
    for name, parameter in engine.module.named_parameters():
        ours, theirs = safe_get_full_grad(parameter), expected_grads[name]
        if theirs is None:
            continue
        scale = theirs.abs().max()
        if scale < ROUNDING * largest:  # 0 in theory, as of a bias of all keys: what is there is rounding alone
            scale = largest
        if expert_state(name):
            local = theirs.shape[0] // 2
            theirs = theirs[topology.ep_rank * local : (topology.ep_rank + 1) * local]
        worst[1] = torch.maximum(worst[1], (ours - theirs).abs().max() / scale)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return worst.tolist()


def change_an_expert(model):
    weight = moe_layers(model)[0].down_proj
    with torch.no_grad():
        weight += 0.01 * torch.randn_like(weight)


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    rows = []
    for family in sys.argv[1:]:
        model, batch = build(family)
        everything = [batch_of(batch, rank) for rank in range(2)]
        expected = reference(copy.deepcopy(model), everything)
        for stage, checkpointing in itertools.product((2, 3), (False, True)):
            rows.append(
                [family, stage, checkpointing, *compare(build(family)[0], stage, checkpointing, everything, expected)]
            )
    report(rows=rows)
    report(broken=compare(model, 3, False, everything, expected, change_an_expert))
    leave()


if __name__ == "__main__":
    sys.exit(main())
