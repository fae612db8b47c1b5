"""Ranks of test_streaming: streamed into EP and ZeRO shards, against the complete model prepared and sharded."""

import itertools
import sys
from pathlib import Path

import deepspeed
import torch

from ds_moe.config.run import RunConfig
from ds_moe.engine import masters as zero_state
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model, read_weights
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import moe_layers
from ds_moe.models.load import load_model
from ds_moe.weights.unread import is_unread
from tests.distributed.parity_ranks import batches, engine_settings
from tests.launcher import leave, report
from tests.models.streamed import FORMS

LORA = {"rank": 4, "experts": True, "train_router": True}
TEXT = ("input_ids", "attention_mask", "labels")


SHORT = [  # form, EP size, ZeRO stage, dtype, sections of the run
    *(("vl memory", ep, stage, "fp32", {}) for ep, stage in itertools.product((1, 2), (1, 2, 3))),
    *(("vl hub", ep, stage, "bf16", {}) for ep, stage in ((1, 3), (2, 1), (2, 3))),
    *(("moe per expert", 2, stage, "fp32", {}) for stage in (2, 3)),
    ("dense", 1, 3, "fp32", {}),
    ("vl hub", 2, 3, "fp32", {"lora": LORA}),
    ("tied", 2, 3, "bf16", {"train": {"stage": "router_only"}}),
]
FEW = [  # of SHORT: every stage and form of experts
    ("vl memory", 1, 1, "fp32", {}),
    ("vl hub", 2, 3, "bf16", {}),
    ("moe per expert", 2, 2, "fp32", {}),
    ("vl hub", 2, 3, "fp32", {"lora": LORA}),
]
LONG = [  # 4 ranks: with EP 2 experts are shared out between EP ranks, and then again by ZeRO-3
    *((form, 2, stage, "fp32", {}) for form in FORMS if form != "dense" for stage in (2, 3)),
    *(("vl memory", ep, stage, "bf16", {}) for ep, stage in itertools.product((1, 4), (1, 3))),
    *(("vl hub", 2, stage, "fp32", {"lora": LORA}) for stage in (1, 3)),
    ("dense", 1, 3, "fp32", {}),
]


def build(folder, case, unread, breakage=None):
    """(loss, every weight and buffer by name, bytes read) of an engine."""
    form, ep_size, stage, dtype, sections = case
    sections = {"moe": {"ep_size": ep_size}, **sections, "train": {"steps": 1, **sections.get("train", {})}}
    if form == "dense":
        sections["moe"] = None
    config = RunConfig(model={"path": str(folder / form)}, data={"train": "digits"}, deepspeed="none", **sections)
    topology = start_distributed(ep_size)
    torch.manual_seed(3)
    settings = {**engine_settings(stage), "bf16": {"enabled": dtype == "bf16"}}
    model = load_model(config.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], unread=unread)
    assert all(is_unread(parameter) == unread for parameter in model.parameters())
    prepare_model(model, config, topology)
    size = read_weights(model, config, topology, settings)
    if breakage is not None:
        breakage(model)
    engine = build_engine(model, config, settings, total_steps=1)
    engine.train()
    batch = batches(topology.world_size)[topology.rank]
    if form.startswith("moe"):
        batch = {key: batch[key] for key in TEXT}
    with torch.no_grad():
        loss = engine(
            **{key: value for key, value in batch.items() if key in TEXT or "moe" not in form[:3]}
        ).loss.item()
    values = {}
    for name, parameter in engine.module.named_parameters():
        values[name] = zero_state.read(parameter, zero_state.WEIGHT).clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            values[f"{name} at work"] = parameter.detach().clone()
    values |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    engine.destroy()
    return loss, values, size


def compare(folder, case, breakage=None):
    """Names of what differs on this rank, whether the loss is the same, and bytes read."""
    loss, values, size = build(folder, case, True, breakage)
    expected_loss, expected, nothing = build(folder, case, False)
    assert values.keys() == expected.keys() and nothing == 0
    same = {n: v.dtype == expected[n].dtype and torch.equal(v, expected[n]) for n, v in values.items()}
    return [name for name, equal in same.items() if not equal], loss == expected_loss, size


def swap_experts(model):
    """What reading another expert's rows would do."""
    shard = moe_layers(model)[0].experts.down_proj.ds_tensor
    shard.copy_(shard.roll(shard.numel() // 2))


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    folder, chosen = Path(sys.argv[1]), {"FEW": FEW, "SHORT": SHORT, "LONG": LONG}[sys.argv[2]]
    found = [[*case[:4], sorted(case[4]), *compare(folder, case)] for case in chosen]
    report(found=found, broken=compare(folder, ("vl memory", 2, 3, "fp32", {}), swap_experts))
    leave()


if __name__ == "__main__":
    sys.exit(main())
