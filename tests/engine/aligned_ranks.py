"""Ranks of test_aligned: where experts of real engines begin, modulo 16 bytes, by EP size and ZeRO stage."""

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run import RunConfig
from ds_moe.engine import build
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import moe_layers
from ds_moe.models.presets import build_preset
from tests.launcher import leave, report


def remainders(ep_size: int, stage: int) -> list[int]:
    """Of every trained tensor of experts, the vision tower being trained too."""
    train = {"steps": 1, "precision": "bf16", "global_batch_size": 2}
    config = RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        moe={"ep_size": ep_size},
        train=train,
        deepspeed=f"zero{stage}",
    )
    topology = start_distributed(ep_size)
    model = build_preset("tiny-vl-moe").to(torch.bfloat16)
    prepare_model(model, config, topology)
    with torch.no_grad():  # a dense weight of odd size, as towers of real models have them
        model.model.visual.odd = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    engine = build.build_engine(model, config, resolve_deepspeed(config, dist.get_world_size(), True, 64), 1)
    experts = [one for layer in moe_layers(engine.module) for one in layer.experts.parameters()]
    found = [getattr(one, "ds_tensor", one).data_ptr() % 16 for one in experts]
    engine.destroy()
    return found


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    report(found={f"EP {ep}, ZeRO {stage}": remainders(ep, stage) for ep in (1, 2) for stage in (1, 2, 3)})
    parameter_groups = build.parameter_groups
    build.parameter_groups = lambda *given: parameter_groups(*given)[::-1]  # experts last
    report(broken=remainders(2, 3))
    leave()


if __name__ == "__main__":
    main()
