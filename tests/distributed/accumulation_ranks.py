"""Ranks of test_accumulation: gradients summed over micro-batches, against one batch. Argument: a folder, or `varying`.

A folder: one rank, ten bf16 micro-batches against their sum in fp32. `varying`: consecutive optimizer steps over the
same samples in 1, 3, 2 and 1 packed rows a rank, as the trainer takes them.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run import RunConfig
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.load import load_model
from ds_moe.models.processor import tiny_processor
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.step import optimizer_step
from tests.distributed.packing_ranks import reading_gradients, worst_gradient
from tests.distributed.parity_ranks import SAMPLES, batches
from tests.launcher import leave, report
from tests.samples import without_image

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


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = {  # name -> ZeRO stage, more of `zero_optimization`, precision, more of the JSON
    "ZeRO 1": (1, {}, "fp32", {}),
    "ZeRO 2": (2, {}, "fp32", {}),
    "ZeRO 3": (3, {}, "fp32", {}),
    "ZeRO 2, offload": (2, OFFLOAD, "fp32", {}),
    "ZeRO 3, offload": (3, OFFLOAD, "fp32", {}),
    "ZeRO 2, bf16 summed in fp32": (2, {}, "bf16", FP32_SUMS),
    "ZeRO 3, bf16 summed in fp32": (3, {}, "bf16", FP32_SUMS),
}
ROWS = (1, 3, 2, 1)  # packed rows a rank, step by step
AUX = [{"kind": "aux", "weight": 0.5, "scope": "sequence"}]  # a mean over the step's samples, however they lie in rows


def step_by_step(topology, stage, zero, precision, more, break_it=None):
    """(language and auxiliary losses of the steps, the largest difference of each one's gradients to the first one's,
    steps counted by the engine and by the schedule, optimizer steps taken)."""
    train = {"precision": precision, "steps": len(ROWS), "lr": 1e-30}  # no weight moves
    config = RunConfig(
        model={"preset": "tiny-vl-moe"}, data={"train": "digits"}, moe={"balance": AUX}, train=train, deepspeed="none"
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # as the trainer tells DeepSpeed, which must make no use of it
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-30, "torch_adam": True}},
        "bf16": {"enabled": precision == "bf16"},
        **more,
    }
    processor = tiny_processor()
    mine = digits_samples("train")[topology.rank * 7 :][:7]
    encoded = [encode(one, processor, 256, 2**20) for one in mine]
    encoded[2] = without_image(encoded[2], processor.image_token_id)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(config.model, dtype)
    context = prepare_model(model, config, topology)
    engine = build_engine(model.train(), config, settings, total_steps=len(ROWS))
    parts = TrainingParts(config, topology, engine, context)
    task, progress, losses, gradients, taken = Task(parts), Progress(len(ROWS)), [], [], []
    if break_it is not None:
        break_it(engine)
    for count in ROWS:
        of_step = {}
        batches = [collate(encoded[row::count], processor, packed=True) for row in range(count)]
        with reading_gradients(engine, of_step):
            outcome = optimizer_step(parts, task, batches, progress)
        losses.append([outcome.loss, outcome.aux_loss])
        taken.append(outcome.taken)
        gradients.append({name: one.float() for name, one in of_step.items()})
    worst = [worst_gradient(one, gradients[0], topology) for one in gradients[1:]]
    found = [losses, worst, engine.global_steps, engine.lr_scheduler.last_epoch, sum(taken)]
    engine.destroy()
    return found


def at_every_micro_batch(engine):
    """Negative control: the boundary of DeepSpeed itself, which its accumulation of 1 puts behind each micro-batch."""
    engine.set_gradient_accumulation_boundary = lambda boundary: None


def varying(topology):
    for name, case in CASES.items():
        report(**{name: step_by_step(topology, *case)})
    report(control=step_by_step(topology, *CASES["ZeRO 2"], at_every_micro_batch))


def main():
    topology = start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    if sys.argv[1] == "varying":
        varying(topology)
        return leave()
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
