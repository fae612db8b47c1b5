"""Ranks of test_parity: EP x ZeRO x checkpointing of one world size against the unconverted model.

Argument: `all`, or `few`: every EP x ZeRO, with checkpointing in half of them, and one other way of each kind.
"""

import itertools
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ds_moe.config.run import RunConfig
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import moe_layers
from ds_moe.models.families import expert_state
from ds_moe.models.head import at_labels
from ds_moe.models.load import load_model
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from tests.launcher import leave, report
from tests.samples import without_image

SAMPLES = 3  # a rank
EXPERTS = {  # name -> ZeRO stage, checkpointing, section moe: other ways to compute the same, experts over all ranks
    "chunks, ZeRO 1": (1, False, {"dispatch": {"chunks": 2}}),
    "chunks, ZeRO 3": (3, False, {"dispatch": {"chunks": 2}, "experts": {"recompute": "none"}}),
    "chunks, ZeRO 3, checkpointing": (3, True, {"dispatch": {"chunks": 2}, "experts": {"recompute": "all"}}),
    "recompute all, ZeRO 3": (3, False, {"experts": {"recompute": "all"}}),
}
FEW = ("chunks, ZeRO 3, checkpointing", "frozen, ZeRO 3", "mergers alone, ZeRO 2", "ZeRO 3")  # of what is not a row
TOWER = r"^model\.visual\."
TOWERS = {  # name -> ZeRO stage, checkpointing, model.freeze: a light tower, of which all, some or no parts are trained
    **{f"frozen, ZeRO {stage}": (stage, stage == 3, ["vision"]) for stage in (1, 2, 3)},
    **{f"mergers alone, ZeRO {stage}": (stage, stage == 3, [rf"{TOWER}(?!merger|deepstack)"]) for stage in (1, 2, 3)},
    "trained, ZeRO 3, checkpointing": (3, True, []),
}


def batches(world_size):
    """Arguments of forwards over real scans; with several ranks the second has none (text only), and lengths differ."""
    processor = tiny_processor()
    samples = digits_samples("train")
    result = []
    for rank in range(world_size):
        encoded = [encode(sample, processor, 256, 2**20) for sample in samples[rank * 7 : rank * 7 + SAMPLES]]
        if rank == 1:
            encoded = [without_image(one, processor.image_token_id) for one in encoded]
        result.append(collate(encoded, processor).with_labels)
    return result


def reference(model, everything):
    """Loss (mean over all labelled tokens) and gradients of plain transformers on the global batch."""
    labelled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in everything)
    total = 0.0
    for batch in everything:
        loss = model(**batch, num_items_in_batch=labelled).loss
        loss.backward()
        total += loss.item()
    return labelled, total, {name: parameter.grad for name, parameter in model.named_parameters()}


def engine_settings(stage):
    return {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }


def compare(config, stage, everything, expected, breakage=None):
    """(loss difference, largest gradient difference relative to its tensor's largest entry) of one configuration.

    Only what it trains has gradients.
    """
    labelled, expected_loss, expected_grads = expected
    topology = start_distributed(config.moe.ep_size)
    model = load_model(config.model, torch.float32)
    prepare_model(model, config, topology)
    if breakage is not None:
        breakage(model)
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    engine.train()
    inputs = dict(everything[topology.rank])
    loss = at_labels(engine, inputs, inputs.pop("labels"), num_items=labelled / topology.world_size).loss
    engine.backward(loss)
    worst = torch.zeros(2)
    total = loss.detach().clone()
    dist.all_reduce(total)
    worst[0] = abs(total.item() / topology.world_size - expected_loss)
    trained = [(name, one) for name, one in engine.module.named_parameters() if one.requires_grad]
    for name, parameter in trained:
        ours, theirs = safe_get_full_grad(parameter), expected_grads[name]
        scale = theirs.abs().max()
        if expert_state(name):
            local = theirs.shape[0] // topology.ep_size
            theirs = theirs[topology.ep_rank * local : (topology.ep_rank + 1) * local]
        worst[1] = torch.maximum(worst[1], (ours - theirs).abs().max() / scale.clamp_min(1e-12))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return worst.tolist()


def run_config(ep_size, checkpointing, freeze=(), **moe):
    return RunConfig(
        model={"preset": "tiny-vl-moe", "freeze": list(freeze)},
        data={"train": "digits"},
        moe={"ep_size": ep_size, **moe},
        train={"gradient_checkpointing": checkpointing, "steps": 1},
        deepspeed="none",
    )


def cases(world_size, every):
    """(EP size, ZeRO stage, checkpointing) of each row."""
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    found = list(itertools.product(sizes, (1, 2, 3), (False, True)))
    return found if every else [case for place, case in enumerate(found) if place // 2 % 2 == place % 2]


def change_an_expert(model):
    layer = moe_layers(model)[0]
    with torch.no_grad():
        layer.experts.down_proj += 0.01 * torch.randn_like(layer.experts.down_proj)


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    world_size = dist.get_world_size()
    everything = batches(world_size)
    expected = reference(build_preset("tiny-vl-moe").train(), everything)
    every, rows = sys.argv[1] == "all", []
    for ep_size, stage, checkpointing in cases(world_size, every):
        loss, gradient = compare(run_config(ep_size, checkpointing), stage, everything, expected)
        rows.append([ep_size, stage, checkpointing, loss, gradient])
    report(rows=rows, reference_loss=expected[1])
    found = {}
    for name, (stage, checkpointing, moe) in EXPERTS.items():
        if every or name in FEW:
            found[name] = compare(run_config(world_size, checkpointing, **moe), stage, everything, expected)
    report(experts=found)
    found = {}
    for name, (stage, checkpointing, freeze) in TOWERS.items():
        if every or name in FEW:
            found[name] = compare(run_config(1, checkpointing, freeze), stage, everything, expected)
    report(towers=found)
    unlabelled = [{**one, "labels": torch.full_like(one["labels"], -100)} for one in everything[1:]]
    without = [everything[0], *unlabelled]
    labelled_on_rank_0 = reference(build_preset("tiny-vl-moe").train(), without)
    found = {}
    for name, stage in {f"ZeRO {stage}": stage for stage in (1, 2, 3)}.items():
        if every or name in FEW:
            found[name] = compare(run_config(world_size, False), stage, without, labelled_on_rank_0)
    report(unlabelled=found)
    report(broken=compare(run_config(world_size, False), 3, everything, expected, change_an_expert))
    leave()


if __name__ == "__main__":
    sys.exit(main())
