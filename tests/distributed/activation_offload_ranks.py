"""Ranks of test_activation_offload: a step with and without offload, for every ZeRO stage and kind of run.

DeepSpeed moves nothing on a CPU, so the ranks say that their tensors lie on a device: hooks, copies and buffers are the
real ones.
"""

import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ds_moe.config.run import RunConfig
from ds_moe.engine.activation_offload import ActivationOffload
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.families import family_of
from ds_moe.models.presets import build_preset
from ds_moe.tasks.registry import task_kind
from tests.distributed.parity_ranks import batches, engine_settings
from tests.launcher import leave, report

CASES = {  # name -> ZeRO stage, sections of the run file
    "ZeRO 1": (1, {}),
    "ZeRO 2": (2, {}),
    "ZeRO 3": (3, {}),
    "ZeRO 3, frozen vision": (3, {"model": {"freeze": ["vision"]}}),
    "ZeRO 3, LoRA": (3, {"lora": {"rank": 8, "experts": True}}),
}


def config_of(sections, offload):
    sections = {"model": {}, **sections}
    return RunConfig(
        model={"preset": "tiny-vl-moe", **sections.pop("model")},
        data={"train": "digits"},
        moe={"ep_size": 2, "balance": [{"kind": "aux"}]},
        train={"gradient_checkpointing": True, "offload_activations": offload, "steps": 1},
        deepspeed="none",
        **sections,
    )


def run(stage, config, everything):
    """Loss and gradients of a micro-batch, and the stats of the offload."""
    topology = start_distributed(2)
    torch.manual_seed(0)
    model = build_preset("tiny-vl-moe")
    context = prepare_model(model, config, topology, set_trainable=task_kind(config).prepare)
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    engine.train()
    loss = engine(**everything[topology.rank], num_items_in_batch=9).loss + sum(context.aux_losses)
    engine.backward(loss)
    found = [safe_get_full_grad(one) for one in engine.module.parameters() if one.requires_grad]
    layer = engine.module.get_submodule(family_of(model).decoder).layers[0]
    offload = getattr(layer._gradient_checkpointing_func.func, "__self__", None)
    engine.destroy()
    return [loss.detach(), *found], None if offload is None else vars(offload.stats)


def main():
    start_distributed(2)
    deepspeed.utils.logger.setLevel("ERROR")
    everything, rows = batches(dist.get_world_size()), {}
    ActivationOffload._should_skip = staticmethod(lambda tensor: False)
    for name, (stage, sections) in CASES.items():
        plain, _ = run(stage, config_of(sections, False), everything)
        ours, stats = run(stage, config_of(sections, True), everything)
        equal = all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))
        rows[name] = [equal, len(ours), *(stats[name + "_tensors"] for name in ("offloaded", "restored", "kept_last"))]
    if dist.get_rank() == 0:
        report(rows=rows)
    leave()


if __name__ == "__main__":
    sys.exit(main())
