"""Ranks of test_replay: record a forward, force its routing, compare bit by bit, for every EP size of this world."""

import itertools
import sys

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.config.run import RunConfig
from ds_moe.data.batch import sample_bounds
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import moe_layers
from ds_moe.models.presets import build_preset
from ds_moe.replay.record import RoutingRecorder, joined
from tests.distributed.parity_ranks import batches
from tests.launcher import leave, report

EXPERTS = 8


def packed(rank):
    """Two sequences behind one another in a row, of lengths that differ between ranks."""
    lengths = (5 + rank, 11)
    ids = torch.randint(300, (1, sum(lengths)), generator=torch.Generator().manual_seed(rank))
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, **sample_bounds(lengths)}


def prepared(preset, ep_size, dtype, checkpointing):
    """A converted model, its experts shared by `ep_size` ranks, without an engine: gradients stay this rank's own."""
    config = RunConfig(
        model={"preset": preset},
        data={"train": "any"},
        moe={"ep_size": ep_size},
        train={"gradient_checkpointing": checkpointing, "steps": 1},
        deepspeed="none",
    )
    model = build_preset(preset).to(dtype).train()
    prepare_model(model, config, start_distributed(ep_size))
    for layer in moe_layers(model):
        layer.set_deepspeed_parallelism()
    return model


def outcome(model, batch, **routing):
    model.zero_grad()
    output = model(**batch, use_cache=False, **routing)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def compare(preset, ep_size, dtype, checkpointing, batch):
    """Whether replay is bit-equal to live, whether other ids are not, and the router's largest gradient."""
    model = prepared(preset, ep_size, dtype, checkpointing)
    with RoutingRecorder(model) as recorder:
        live = outcome(model, batch)
    routing = joined(recorder.take(), batch["input_ids"].shape[0])
    replayed = outcome(model, batch, routing=routing)
    other = outcome(model, batch, routing=torch.where(routing < 0, routing, (routing + 1) % EXPERTS))
    router = max(replayed[name].abs().max().item() for name in replayed if name.endswith("gate.weight"))
    return same(live, replayed), same(live, other), router, routing


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    world_size, rank = dist.get_world_size(), dist.get_rank()
    forms = {"padded": ("tiny-vl-moe", batches(world_size)[rank]), "packed": ("tiny-moe", packed(rank))}
    rows = []
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    cases = itertools.product(forms, (torch.float32, torch.bfloat16), sizes, (False, True))
    for form, dtype, ep_size, checkpointing in cases:
        preset, batch = forms[form]
        mine = {**batch}
        if "pixel_values" in mine:
            mine["pixel_values"] = mine["pixel_values"].to(dtype)
        equal, other_equal, router, routing = compare(preset, ep_size, dtype, checkpointing, mine)
        rows.append([form, ep_size, str(dtype), checkpointing, equal, other_equal, router, int((routing >= 0).sum())])
    report(rows=rows)
    leave()


if __name__ == "__main__":
    sys.exit(main())
