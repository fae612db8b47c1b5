"""Ranks of test_lora: EP x ZeRO x checkpointing of LoRA on sharded experts against PEFT's target_parameters.

Argument: `all` or `few`, as of parity_ranks.
"""

import sys

import deepspeed
import peft
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft import get_peft_model_state_dict

from ds_moe.config.run import RunConfig
from ds_moe.engine import masters as zero_state
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.families import family_of
from ds_moe.models.lora import peft_config, peft_value, update_of
from ds_moe.models.presets import build_preset
from tests.distributed.parity_ranks import batches, cases, engine_settings
from tests.launcher import leave, report

LORA = {"rank": 8, "alpha": 24, "experts": True, "train_router": True}


def run_config(ep_size, checkpointing):
    return RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        moe={"ep_size": ep_size},
        lora=LORA,
        train={"gradient_checkpointing": checkpointing, "steps": 1},
        deepspeed="none",
    )


def reference(config, everything):
    """Loss, gradients by PEFT's names and values of plain transformers under PEFT, with updates that are not zero."""
    model = build_preset("tiny-vl-moe").train()
    experts = family_of(model).moe.lora_parameters
    settings = peft_config(config.lora, config.lora.targets, target_parameters=experts)
    model = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".mlp.gate.weight" in name:
            parameter.requires_grad_(True)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    labelled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in everything)
    total = 0.0
    for batch in everything:
        loss = model(**batch, num_items_in_batch=labelled).loss
        loss.backward()
        total += loss.item()
    grads = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return labelled, total, grads, get_peft_model_state_dict(model)


def from_peft(update, value, experts):
    """The inverse of `peft_value`, written down on its own."""
    if not update.stacked:
        return value
    if update.half == "A":
        return value.reshape(experts, -1, value.shape[1])
    return torch.stack([value[:, expert::experts] for expert in range(experts)])


def compare(config, stage, everything, expected, swap=False):
    """(loss difference, largest gradient difference relative to its tensor's largest entry) of one configuration."""
    labelled, expected_loss, expected_grads, values = expected
    topology = start_distributed(config.moe.ep_size)
    model = build_preset("tiny-vl-moe")
    prepare_model(model, config, topology)
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    engine.train()
    trained = {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
    for name, parameter in trained.items():
        if update := update_of(name):
            value = own(update, from_peft(update, values[update.peft], 8), topology)
            zero_state.write(parameter, zero_state.WEIGHT, value.roll(1, 0) if swap and update.stacked else value)
    loss = engine(**everything[topology.rank], num_items_in_batch=labelled / topology.world_size).loss
    engine.backward(loss)
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst = torch.zeros(2)
    worst[0] = abs(total.item() / topology.world_size - expected_loss)
    compared = 0
    for name, parameter in trained.items():
        update, ours = update_of(name), safe_get_full_grad(parameter)
        theirs = expected_grads[update.peft if update else f"base_model.model.{name}"]
        scale = theirs.abs().max()
        if update:
            theirs = own(update, from_peft(update, theirs, 8), topology)
            if update.stacked and topology.ep_size == 1:
                assert torch.equal(peft_value(update, from_peft(update, values[update.peft], 8)), values[update.peft])
        worst[1] = torch.maximum(worst[1], (ours - theirs).abs().max() / scale.clamp_min(1e-12))
        compared += 1
    assert compared == len(expected_grads)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return worst.tolist()


def own(update, value, topology):
    if not update.stacked:
        return value
    local = value.shape[0] // topology.ep_size
    return value[topology.ep_rank * local : (topology.ep_rank + 1) * local]


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    world_size = dist.get_world_size()
    everything = batches(world_size)
    expected = reference(run_config(1, False), everything)
    rows = []
    for ep_size, stage, checkpointing in cases(world_size, sys.argv[1] == "all"):
        loss, gradient = compare(run_config(ep_size, checkpointing), stage, everything, expected)
        rows.append([ep_size, stage, checkpointing, loss, gradient])
    report(rows=rows, reference_loss=expected[1])
    report(broken=compare(run_config(world_size, False), 3, everything, expected, swap=True))
    leave()


if __name__ == "__main__":
    sys.exit(main())
