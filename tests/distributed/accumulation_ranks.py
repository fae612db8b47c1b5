"""One rank: the gradients that an engine has summed over ten bf16 micro-batches, against their sum in fp32."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run import RunConfig
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.load import load_model
from tests.distributed.parity_ranks import SAMPLES, batches
from tests.launcher import leave, report

MICRO_BATCHES = 10


def run_config(file):
    return RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        moe={},
        train={"precision": "bf16", "micro_batch_size": SAMPLES, "global_batch_size": SAMPLES * MICRO_BATCHES},
        deepspeed=str(file),
    )


def prepared(config, topology):
    model = load_model(config.model, torch.bfloat16)
    prepare_model(model, config, topology)
    return model.train()


def sums_in_fp32(config, topology, everything, share):
    """Of each micro-batch's own bf16 gradients, as autograd gives them without an engine."""
    model = prepared(config, topology)
    sums = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in model.named_parameters()}
    for batch in everything:
        (model(**batch, use_cache=False, num_items_in_batch=share).loss / MICRO_BATCHES).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:  # the second micro-batch has no image
                sums[name] += parameter.grad.float()
                parameter.grad = None
    return sums


def difference(config, topology, everything, share, expected):
    """The largest of all tensors: largest difference over the largest entry."""
    resolved = resolve_deepspeed(config, 1, on_cpu=True, hidden_size=64)
    engine = build_engine(prepared(config, topology), config, resolved, total_steps=1)
    found = []
    for number, batch in enumerate(everything, start=1):
        engine.backward(engine(**batch, use_cache=False, num_items_in_batch=share).loss)
        if number < MICRO_BATCHES:
            engine.step()
    for name, parameter in engine.module.named_parameters():
        ours, theirs = safe_get_full_grad(parameter), expected[name]
        found.append(((ours.float() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item())
    engine.destroy()
    return max(found)


def main():
    topology = start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    everything = batches(MICRO_BATCHES)
    share = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in everything) / MICRO_BATCHES
    found = {}
    for stage in (2, 3):
        shipped = Path(f"ds_configs/zero{stage}.json")
        without = Path(sys.argv[1], shipped.name)
        keys = json.loads(shipped.read_text())
        del keys["data_types"]
        without.write_text(json.dumps(keys))
        expected = sums_in_fp32(run_config(shipped), topology, everything, share)
        for name, file in (("shipped", shipped), ("left out", without)):
            found[f"ZeRO-{stage}, {name}"] = difference(run_config(file), topology, everything, share, expected)
    report(**found)
    leave()


if __name__ == "__main__":
    main()
