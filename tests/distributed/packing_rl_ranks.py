"""Ranks of test_packing: policies on packed rows, against every completion in a forward of its own on one process.

The samples are those of packing_ranks; what each completion replays, what the engine said of it and its advantage
depend on its number alone. The old policy is scored on either side and moved a little, so that ratios are clipped.
Arguments: `all`, or `few` cases.
"""

import sys
from dataclasses import replace

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import convert_for
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.replay.align import RoutingShape
from ds_moe.tasks.rl.rollouts import EncodedRollout, Rollouts
from ds_moe.tasks.rl.task import PolicyOptimization
from ds_moe.tasks.task import TrainingParts
from ds_moe.training.step import optimizer_step
from tests.distributed.packing_ranks import (
    PRESET,
    ROWS,
    cases,
    engine_settings,
    numbered,
    reading_gradients,
    routing_of,
    samples,
    worst_gradient,
)
from tests.launcher import leave, report

MODES = {
    "grpo": {"objective": "grpo", "router": "router_shift", "kl_weight": 0.1},
    "gspo, joint": {"objective": "gspo", "router": "joint", "joint_lambda": 0.3},
    "dapo": {"objective": "dapo", "correction": "tis", "correction_level": "sequence", "temperature": 0.7},
    "cispo": {"objective": "cispo", "correction": "icepop"},
}


class Bare:
    """A model in the place of an engine."""

    def __init__(self, model):
        self.module, self.eval, self.train = model, model.eval, model.train

    def __call__(self, **inputs):
        return self.module(**inputs)


def rollout_of(place, one):
    """The sample number `place` as a rollout: what it answers is the completion."""
    drawn = torch.Generator().manual_seed(100 + place)
    completion = one.labels != NO_LOSS
    completion[0] = False
    near = -5.8 + 0.3 * torch.randn(2, len(completion), generator=drawn)  # what this model says of most tokens
    engine, reference = torch.where(completion, near, 0)
    return EncodedRollout(
        **{**vars(one), "labels": one.input_ids.where(completion, NO_LOSS)},
        completion=completion,
        engine=engine,
        reference=reference,
        routing=routing_of(place, one),
        advantage=float(torch.randn(1, generator=drawn)),
    )


def with_old(task, batch, places):
    """The old policy as the task scores it, moved by noise that depends on the sample alone."""
    batch = task._with_old(batch)
    noise = torch.zeros_like(batch.old_BS)
    for row, place in zip(noise, places, strict=True):
        row[: len(row)] = 0.3 * torch.randn(400, generator=torch.Generator().manual_seed(200 + place))[: len(row)]
    return replace(batch, old_BS=batch.old_BS + torch.where(batch.completion_BS, noise, 0))


def run_config(mode, ep_size=1, checkpointing=False):
    return RunConfig(
        task="rl",
        model={"preset": PRESET},
        data={"train": "rollouts.jsonl"},
        moe={"ep_size": ep_size, "replay": {"enabled": True}},
        rl=mode,
        train={"gradient_checkpointing": checkpointing, "steps": 1, "lr": 1e-3},
        deepspeed="none",
    )


def record_kind(config, model):
    return Rollouts(RoutingShape.of(model.config), need_reference=config.rl.kl_weight > 0)


def reference(mode, everything, processor, topology):
    """(loss, gradients) of completions that are alone in their forwards."""
    config = run_config(mode)
    model = build_preset(PRESET).train()
    context = convert_for(model, config)
    task = PolicyOptimization(TrainingParts(config, topology, Bare(model), context))
    kind = record_kind(config, model)
    every = [
        rollout_of(place, one) for place, one in enumerate(one for rows in everything for row in rows for one in row)
    ]
    batches = [kind.collate([one], processor) for one in every]
    weight, total = sum(int(task.weight(batch)) for batch in batches), 0.0
    for place, batch in enumerate(batches):
        context.real_BS = batch.real_of_token
        loss = task.loss(with_old(task, batch, [place]), share=weight)
        loss.backward()
        total += loss.item()
    return total, {name: one.grad for name, one in model.named_parameters()}


def compare(mode, ep_size, stage, checkpointing, everything, expected, processor, broken=False):
    """(difference of the step's loss, of gradients relative to the tensor's largest entry)."""
    config = run_config(mode, ep_size, checkpointing)
    topology = start_distributed(ep_size)
    model = build_preset(PRESET)
    context = prepare_model(model, config, topology)
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    engine.train()
    task, kind = PolicyOptimization(TrainingParts(config, topology, engine, context)), record_kind(config, model)
    batches = []
    for places, row in zip(numbered(everything)[topology.rank], everything[topology.rank], strict=True):
        rollouts = [rollout_of(place, one) for place, one in zip(places, row, strict=True)]
        batch = with_old(task, kind.collate(rollouts, processor, packed=True), places)
        assert batch.packed
        batches.append(replace(batch, advantage_B=batch.advantage_B.roll(1)) if broken else batch)
    gradients = {}
    with reading_gradients(engine, gradients):
        outcome = optimizer_step(task.parts, task, batches, Progress(1))
    found = torch.tensor([abs(outcome.loss - expected[0]), worst_gradient(gradients, expected[1], topology)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    assert len(batches) == ROWS
    engine.destroy()
    return found.tolist()


def main():
    topology = start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    world_size, processor = dist.get_world_size(), tiny_processor()
    everything = samples(world_size, processor)
    expected = {name: reference(mode, everything, processor, topology) for name, mode in MODES.items()}
    rows = []
    for name, *case in cases(MODES, world_size, sys.argv[1] == "all"):
        rows.append([name, *case, *compare(MODES[name], *case, everything, expected[name], processor)])
    report(rows=rows, losses={name: loss for name, (loss, _) in expected.items()})
    report(broken=compare(MODES["grpo"], 1, 1, False, everything, expected["grpo"], processor, broken=True))
    leave()


if __name__ == "__main__":
    main()
