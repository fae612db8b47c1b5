"""Ranks of test_gate: several cases in one launch. Argument: JSON list of [name, overrides, mode]."""

import itertools
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from torch.distributions import Categorical, kl_divergence

from ds_moe.checkpoint import restore
from ds_moe.checkpoint.progress import Progress
from ds_moe.config.run_file import load_run
from ds_moe.data.encode import filler
from ds_moe.data.stream import TrainStream
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.errors import UserError
from ds_moe.models.load import load_model
from ds_moe.models.processor import load_processor
from ds_moe.tasks.gate.features import sequence_of
from ds_moe.tasks.gate.files import start_gate
from ds_moe.tasks.gate.model import install_gate
from ds_moe.tasks.gate.records import Routed
from ds_moe.tasks.gate.task import GateTask
from ds_moe.tasks.registry import task_kind
from ds_moe.tasks.task import TrainingParts
from ds_moe.train import train
from ds_moe.training.checkpoints import resume, save_checkpoint
from ds_moe.training.set_up import set_up
from tests.launcher import leave, report

RUN, PACKED = "tests/runs/gate.yaml", "tests/runs/gate_packed.yaml"
NAMES = ["agenda", "auditor", "operator", "pointer"]
LABELS = ["agenda"] * 5 + ["auditor"] * 2 + ["operator", "pointer", None]  # of a training file; the last names none
SAMPLES = 3  # a rank
BATCH = [f"train.micro_batch_size={SAMPLES}", f"train.global_batch_size={2 * SAMPLES}"]
KL, ENTROPY = 0.3, -0.2
SUPERVISED = ["gate.stage=supervised", "gate.class_weights=balanced"]
REGULARISED = [f"gate.kl_weight={KL}", f"gate.entropy_weight={ENTROPY}"]
JOINT = ["gate.stage=joint", "gate.adapter_lr=1e-4", *REGULARISED]
CHECKPOINTED = [*JOINT, "train.gradient_checkpointing=true"]
PARITY = [  # ZeRO stage, overrides
    *itertools.product((1, 2, 3), (SUPERVISED, JOINT)),
    (2, CHECKPOINTED),
    (3, CHECKPOINTED),
    (3, ["gate.stage=end_to_end", *REGULARISED]),
    # What reads the request otherwise cannot start from the supervised gate, so nothing holds it near that.
    (3, [*SUPERVISED, "gate.text=last", "gate.start=null"]),
    (3, [*CHECKPOINTED, "gate.text=layer", "gate.text_layer=1", "gate.start=null", "gate.kl_weight=0.0"]),
]
FEW = [(1, SUPERVISED), (3, CHECKPOINTED)]  # in `make test`


def batches(file, processor):
    """(micro-batches of ranks 0 and 1, packed rows of theirs, all joined in one padded micro-batch).

    Rank 1 has no image; one of its records names no adapter. Packed rows hold other numbers of samples on each rank,
    and a filler.
    """
    record_kind = Routed(NAMES, labelled=False)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    nameless = {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a tree"}]}
    samples = [record_kind.parse(record, "here", file.parent) for record in [nameless, *records]]
    encoded = [record_kind.encode(sample, processor, 512, 2**20) for sample in samples]
    pictures = [one for one in encoded if one.pixel_values is not None][:SAMPLES]
    texts = [one for one in encoded if one.pixel_values is None][:SAMPLES]
    rows = [[pictures[:1], pictures[1:]], [texts[:2], [*texts[2:], filler(processor)]]]
    padded = [[record_kind.collate(part, processor)] for part in (pictures, texts)]
    packed = [[record_kind.collate(row, processor, packed=True) for row in of_rank] for of_rank in rows]
    return padded, packed, record_kind.collate(pictures + texts, processor)


def move(gate):
    """Away from the reference, or their divergence would be 0; the same on every rank."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def reference(config, joined):
    """Loss and gradients of a plain gated model on the joined batch, by formulas of torch."""
    model = load_model(config.model, torch.float32)
    torch.manual_seed(3)
    install_gate(model, config.gate)
    start_gate(model, config.gate)
    move(model.adapter_gate)
    labels_B, inputs = joined.adapter_B, joined.with_labels
    if config.gate.stage == "supervised":
        weights_K = torch.tensor([9 / (4 * count) for count in (5, 2, 1, 1)])  # of the 9 labels of LABELS
        losses = F.cross_entropy(model(**inputs, gate_only=True).logits, labels_B, weights_K, reduction="sum")
        loss = losses / (labels_B != -100).sum()
    else:
        logits_BSV = model.train()(**inputs, use_cache=False).logits
        labels_BS = inputs["labels"]
        # In float64: the mean over all labelled tokens is then exact beside the limit of the comparison.
        loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).double(), labels_BS[:, 1:].flatten())
        gate = model.adapter_gate(model.features)
        loss = loss + ENTROPY * Categorical(probs=gate.weights).entropy().mean()
        if config.gate.kl_weight:
            before = Categorical(logits=model.gate_reference(model.features).logits)
            loss = loss + KL * kl_divergence(before, Categorical(logits=gate.logits)).mean()
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


class Stream(list):
    """Steps of micro-batches, and the labels of the file that they are from."""

    remembered = LABELS


def compare(config, zero, own, expected, breakage=None):
    """(loss difference, largest gradient difference relative to its tensor's largest entry) of one configuration.

    `own` are the rank's micro-batches of a step.
    """
    expected_loss, expected_grads = expected
    topology = start_distributed(1)
    model = load_model(config.model, torch.float32)
    torch.manual_seed(3)
    gate = task_kind(config)
    prepare_model(model, config, topology, set_trainable=gate.prepare, keep_ranks_in_step=False)
    move(model.adapter_gate)
    if breakage == "scale":
        next(iter(model.adapter_bank.layers.values())).scale_R *= 1.01
    ds_config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": len(own),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine = build_engine(model, config, ds_config, 1, gate.adapter_lr(config))
    engine.train()
    stream = Stream([own])
    if breakage == "class weights":
        stream.remembered = NAMES
    task = GateTask(TrainingParts(config, topology, engine, None, stream=stream))
    micro_batches = next(task.steps(Progress(2, step=1)))
    labelled = sum(task.weight(batch) for batch in micro_batches)
    dist.all_reduce(labelled)
    total = torch.zeros((), dtype=torch.float64)  # sums add no rounding to the losses compared
    with swapped_choices() if breakage == "choices" else nullcontext():
        for batch in micro_batches:
            loss = task.loss(batch, labelled.item() / topology.world_size / len(own))
            engine.backward(loss)
            total += loss.detach() / len(own)
            if batch is not micro_batches[-1]:
                engine.step()
    dist.all_reduce(total)
    trained = {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
    assert trained.keys() == expected_grads.keys()
    differences = []
    for name, parameter in trained.items():
        ours, theirs = safe_get_full_grad(parameter), expected_grads[name]
        differences.append((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
    worst = torch.stack([(total / topology.world_size - expected_loss).abs(), max(differences)])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return worst.tolist()


def swapped_choices():
    """A patch under which the first two samples of a packed row get each other's adapters."""

    def swapped(lengths, device):
        sequence_S = sequence_of(lengths, device)
        return torch.where(sequence_S < 2, 1 - sequence_S, sequence_S) if len(lengths) > 1 else sequence_S

    return patch("ds_moe.tasks.gate.model.sequence_of", swapped)


def parity(overrides, cases):
    """Rows (stage, ZeRO, text, checkpointing, packing, loss and gradient differences), and the same of models that are
    broken."""
    deepspeed.utils.logger.setLevel("ERROR")
    config = load_run(RUN, overrides)
    *own_of, joined = batches(Path(config.data.train), load_processor(config.model.path))
    rank, rows = dist.get_rank(), []
    for zero, more in cases:
        config = load_run(RUN, [*overrides, *more, *BATCH])
        expected = reference(config, joined)
        for packing, of_ranks in enumerate(own_of):
            found = compare(config, zero, of_ranks[rank], expected)
            rows.append(
                [config.gate.stage, zero, config.gate.text, config.train.gradient_checkpointing, packing, *found]
            )
    broken = {}
    for breakage, more in (("scale", JOINT), ("class weights", SUPERVISED), ("choices", JOINT)):
        config = load_run(RUN, [*overrides, *more, *BATCH])
        own = own_of[breakage == "choices"][rank]
        broken[breakage] = compare(config, 2, own, reference(config, joined), breakage)
    return {"rows": rows, "broken": broken}


def forget(what):
    """A patch under which a resumed run has lost something."""
    if what == "data position":
        return patch.object(TrainStream, "load_state_dict", lambda self, state: None)
    if what == "random state":
        return patch.object(restore, "_restore_rng", lambda *args: None)

    def without_best(*args, **more):
        return {**restore.load(*args, **more), "best_loss": None}

    return patch("ds_moe.training.checkpoints.load", without_best)


def main():
    start_distributed(1)
    for name, overrides, mode in json.loads(sys.argv[1]):
        if os.environ["RANK"] == "0":
            print(f"case {name}", flush=True)
        if mode.startswith("parity"):
            report(**{name: parity(overrides, PARITY if mode == "parity" else FEW)})
            continue
        config = load_run(PACKED if mode == "train packed" else RUN, overrides)
        if mode in ("train", "train packed"):
            report(**{name: train(config)})
        elif mode.startswith("forget "):
            with forget(mode.removeprefix("forget ")):
                report(**{name: train(config)})
        elif mode == "load and save":
            run = set_up(config)
            resume(run)
            save_checkpoint(run)
            run.engine.destroy()
        elif mode == "refused":
            try:
                train(config)
            except UserError as error:
                report(**{name: str(error)})
    leave()


if __name__ == "__main__":
    main()
