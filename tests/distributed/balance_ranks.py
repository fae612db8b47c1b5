"""Ranks of test_balance: the same four micro-batches on any number of ranks, through the trainer's own step.

Reported by case: counts of every update (int64), the bias after it (hex of its bytes), and router gradients compared
with plain autograd. Arguments: `few`, `short`, or `long` (20 steps beside it); `train` and cases of whole runs.
"""

import json
import sys
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ds_moe.checkpoint.progress import Progress
from ds_moe.checkpoint.save import persistent_buffers
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.data.batch import Batch
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode, filler
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.errors import UserError
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import BIAS_SUFFIX
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.train import train
from ds_moe.training.checkpoints import resume, save_checkpoint
from ds_moe.training.set_up import set_up
from ds_moe.training.step import optimizer_step
from tests.distributed.parity_ranks import SAMPLES, batches
from tests.launcher import leave, report

MICRO_BATCHES = 4
LOSS_FREE = {"kind": "loss_free", "update_rate": 0.01}
AUX = {"kind": "aux", "weight": 0.5}
SCOPES = ("micro_batch", "global_batch", "sequence")


def run_config(ep_size, checkpointing, balance, steps=1):
    return RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        moe={"ep_size": ep_size, "balance": balance},
        train={
            "gradient_checkpointing": checkpointing,
            "steps": steps,
            "lr": 1e-3,
            "micro_batch_size": SAMPLES,
            "global_batch_size": SAMPLES * MICRO_BATCHES,
        },
        deepspeed="none",
    )


def start(config, stage):
    """The parts that `optimizer_step` needs, and where they are in the run."""
    topology = start_distributed(config.moe.ep_size)
    model = build_preset("tiny-vl-moe")
    context = prepare_model(model, config, topology)
    ds_config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": MICRO_BATCHES // topology.world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    steps = config.train.steps
    engine = build_engine(model, config, ds_config, steps)
    engine.train()
    return TrainingParts(config, topology, engine, context), Progress(steps)


def step(parts, progress, everything):
    return optimizer_step(parts, Task(parts), own_share(everything, parts.topology), progress)


def own_share(everything, topology):
    """This rank's micro-batches, in the order of accumulation: those of all ranks at one time are neighbours."""
    own = everything[topology.rank :: topology.world_size]
    return [one if isinstance(one, Batch) else Batch.of_rows(without_labels(one), one["labels"]) for one in own]


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def recording(moves):
    original = LossFreeBalancing.move

    def move(self, counts_E, rate):
        original(self, counts_E, rate)
        assert counts_E.dtype == torch.int64 and self.bias_E.dtype == torch.float32
        moves.append({"counts": counts_E.tolist(), "bias": self.bias_E.numpy().tobytes().hex()})

    return patch.object(LossFreeBalancing, "move", move)


def biases(config, stage, everything):
    """What every update of a run did, in the order of steps and layers."""
    moves = []
    with recording(moves):
        parts, progress = start(config, stage)
        for _ in range(config.train.steps):
            step(parts, progress, everything)
    parts.engine.destroy()
    return moves


# --- negative controls


def per_micro_batch():
    original = LossFreeBalancing.add

    def add(self, counts_E):
        original(self, counts_E)
        self.update()

    return patch.object(LossFreeBalancing, "add", add)


def counted_in_the_recompute():
    return patch("ds_moe.engine.prepare.checkpoint_contexts", lambda: (nullcontext(), nullcontext()))


@contextmanager
def left_out_of_the_checkpoint():
    def kept(model):
        return [(name, buffer) for name, buffer in persistent_buffers(model) if not name.endswith(BIAS_SUFFIX)]

    with (
        patch("ds_moe.checkpoint.save.persistent_buffers", kept),
        patch("ds_moe.checkpoint.restore.persistent_buffers", kept),
        patch("ds_moe.checkpoint.fit.persistent_buffers", kept),
    ):
        yield


# --- gradients of the router


def router_gradients(config, stage, everything):
    """(the gradient of every router in one step, as the optimizer would get it; its auxiliary loss)."""
    (parts, progress), found = start(config, stage), []
    engine_step = parts.engine.step

    def spying_step():
        if parts.engine.is_gradient_accumulation_boundary():
            found.extend(safe_get_full_grad(layer.gate.weight).clone() for layer in parts.layers)
        engine_step()

    parts.engine.step = spying_step
    outcome = step(parts, progress, everything)
    parts.engine.destroy()
    return found, outcome.aux_loss


def plain_gradients(everything, weight, scope, at_once):
    """The same by autograd on one process: cross entropy over all labels, and the loss as its papers write it.

    `at_once`: micro-batches whose tokens a global scope takes together.
    """
    model = build_preset("tiny-vl-moe").train()
    convert(model, run_config(1, False, []).moe)
    layers, seen = moe_layers(model), []
    for layer in layers:
        layer.gate.register_forward_hook(lambda gate, args, decision: seen.append(decision))
    labelled = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in everything)
    total, terms = 0.0, []
    for first in range(0, len(everything), at_once):
        parts = [[] for _ in layers]  # by layer: (scores, one row of uses a token) of groups of real tokens
        for batch in everything[first : first + at_once]:
            seen.clear()
            total = total + model(**batch, num_items_in_batch=labelled).loss
            for part, decision in zip(parts, seen, strict=True):
                uses_TE = torch.zeros_like(decision.scores_TE)
                uses_TE[decision.token_N, decision.expert_N] = 1
                masks = batch["attention_mask"].bool()
                shape = (*masks.shape, -1)
                scores_BSE, uses_BSE = decision.scores_TE.view(shape), uses_TE.view(shape)
                if scope == "sequence":
                    part += [(s[m], u[m]) for s, u, m in zip(scores_BSE, uses_BSE, masks, strict=True)]
                else:
                    part.append((scores_BSE[masks], uses_BSE[masks]))
        for part in parts:
            groups = part if scope != "global_batch" else [tuple(map(torch.cat, zip(*part, strict=True)))]
            values = [s.shape[1] * (u.mean(0) * s.mean(0)).sum() for s, u in groups]
            terms.append(at_once * sum(values) / len(values))
    auxiliary = weight * sum(terms) / len(everything)
    (total + auxiliary).backward()
    return [layer.gate.weight.grad for layer in layers], auxiliary.item()


def worst(ours, theirs):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def gradient_rows(everything, world_size):
    sizes = [size for size in (1, 2) if world_size % size == 0]
    rows = []
    for scope in SCOPES:
        at_once = world_size if scope == "global_batch" else 1
        expected, _ = plain_gradients(everything, AUX["weight"], scope, at_once)
        for ep_size in sizes:
            config = run_config(ep_size, ep_size == 1, [{**AUX, "scope": scope}])
            ours, _ = router_gradients(config, 3 if ep_size == 2 else 1, everything)
            rows.append([scope, ep_size, worst(ours, expected)])
    doubled, _ = plain_gradients(everything, 2 * AUX["weight"], "sequence", 1)
    report(gradients=rows, gradients_doubled=worst(ours, doubled))


def filler_rows(everything, world_size):
    """A step of one micro-batch, in padded rows or a packed one, whose other micro-batches hold fillers, against that
    micro-batch alone."""
    rows, processor = [], tiny_processor()
    encoded = [encode(one, processor, 256, 2**20) for one in digits_samples("train")[:SAMPLES]]
    for scope, packed in [(scope, False) for scope in SCOPES] if world_size > 1 else [("micro_batch", True)]:
        expected, auxiliary = plain_gradients(everything[:1], AUX["weight"], scope, 1)
        laid = [encoded, *[[filler(processor)] * (1 if packed else SAMPLES)] * (MICRO_BATCHES - 1)]
        mixed = [collate(one, processor, packed=packed) for one in laid]
        ours, found = router_gradients(run_config(1, False, [{**AUX, "scope": scope}]), 1, mixed)
        rows.append([f"{scope}{', packed' if packed else ''}", worst(ours, expected), found / auxiliary])
    report(fillers=rows)


def topologies(everything, world_size, mode):
    """`few`: one rank without checkpointing, two with it."""
    found = {}
    for checkpointing in (world_size > 1,) if mode == "few" else (False, True):
        config = run_config(world_size, checkpointing, [LOSS_FREE, {**AUX, "weight": 1e-3}])
        found[f"checkpointing {checkpointing}"] = biases(config, 3, everything)
    if mode == "long":
        found["20 steps"] = biases(run_config(world_size, False, [LOSS_FREE], steps=20), 1, everything)
    report(**found)
    if world_size == 2 and mode != "few":
        config = run_config(2, True, [LOSS_FREE])
        for name, control in {"per micro-batch": per_micro_batch, "counted twice": counted_in_the_recompute}.items():
            with control():
                report(**{name: biases(config, 3, everything)})
    if world_size == 2:
        disagreement()


def disagreement():
    """One rank's bias is tipped: the check must say which."""
    parts, progress = start(run_config(2, False, [LOSS_FREE]), 1)
    if parts.topology.rank == 1:
        parts.balancings[1].bias_E[0] += 1e-6
    try:
        step(parts, progress, batches(MICRO_BATCHES))
    except RuntimeError as error:
        report(disagreement=str(error))
    parts.engine.destroy()


def whole_runs(cases):
    """{name: [overrides of resume.yaml, mode]}; an error that the user would see is reported by name."""
    for name, (overrides, mode) in cases.items():
        config = load_run("tests/runs/resume.yaml", overrides)
        with left_out_of_the_checkpoint() if mode == "left out" else nullcontext():
            try:
                resharded(config) if mode == "reshard" else train(config)
            except UserError as error:
                report(**{name: str(error)})


def resharded(config):
    """Load a checkpoint and save it again at once."""
    run = set_up(config)
    resume(run)
    save_checkpoint(run)
    run.engine.destroy()


def main():
    if sys.argv[1] == "train":
        return whole_runs(json.loads(sys.argv[2]))
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    everything, world_size = batches(MICRO_BATCHES), dist.get_world_size()
    masks = [batch["attention_mask"] for batch in everything]
    report(tokens=sum(int(mask.sum()) for mask in masks), padding=sum(int((mask == 0).sum()) for mask in masks))
    topologies(everything, world_size, sys.argv[1])
    if world_size < 4:
        gradient_rows(everything, world_size)
        filler_rows(everything, world_size)


if __name__ == "__main__":
    main()
    leave()
