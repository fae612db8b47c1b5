"""Ranks of test_gate: several cases in one launch. Argument: JSON list of [name, overrides, mode]."""

import itertools
import json
import os
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import deepspeed
import peft
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
from ds_moe.engine.prepare import prepare_model, read_weights
from ds_moe.engine.start import start_distributed
from ds_moe.errors import UserError
from ds_moe.models.convert import moe_layers
from ds_moe.models.families import family_of
from ds_moe.models.load import build_outline, load_model, model_config
from ds_moe.models.processor import load_processor
from ds_moe.tasks.gate.adapters import KEY
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
from ds_moe.training.step import _forward_backward
from tests.launcher import leave, report
from tests.tasks.gate.gated import fixed

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
# Over experts, where a pass of the base reads the request before the pass that is trained.
BY_LAYER = ["gate.text=layer", "gate.text_layer=2"]
ONE_HOT = ["gate.stage=joint", "gate.start=null"]
OVER_EXPERTS = [  # EP size, overrides
    (ep_size, [f"train.gradient_checkpointing={checkpointing}", *text])
    for text in ([], BY_LAYER)
    for checkpointing in ("false", "true")
    for ep_size in (1, 0)  # 0: all ranks
]
SOME_OVER_EXPERTS = {
    "one hot": OVER_EXPERTS,
    "one hot, checkpointed": OVER_EXPERTS[-1:],
    "one hot, all at once": OVER_EXPERTS[5:6],
}
STAGES_OVER_EXPERTS = [
    *((3, [*more, f"moe.ep_size={ep_size}"]) for ep_size in (1, 2) for more in (SUPERVISED, JOINT, CHECKPOINTED)),
    (3, ["gate.stage=end_to_end", *REGULARISED, "moe.ep_size=2"]),
    (3, [*SUPERVISED, "gate.text=last", "gate.start=null", "moe.ep_size=2"]),
    (3, [*CHECKPOINTED, *BY_LAYER, "gate.start=null", "gate.kl_weight=0.0", "moe.ep_size=2"]),
]
PARITIES = {"parity": PARITY, "parity of a few": FEW, "parity over experts": STAGES_OVER_EXPERTS}


def batches(file, processor, ranks=2):
    """(micro-batches of each rank, packed rows of theirs, all joined in one padded micro-batch).

    Rank 1 has no image; one of its records names no adapter. Packed rows hold other numbers of samples on each rank,
    and a filler.
    """
    record_kind = Routed(NAMES, labelled=False)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    nameless = {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a tree"}]}
    samples = [record_kind.parse(record, "here", file.parent) for record in [nameless, *records]]
    encoded = [record_kind.encode(sample, processor, 512, 2**20) for sample in samples]
    pictures = [one for one in encoded if one.pixel_values is not None]
    texts = [one for one in encoded if one.pixel_values is None]
    parts = [pictures[:SAMPLES], texts[:SAMPLES], [texts[SAMPLES], *pictures[SAMPLES:][:2]]][:ranks]
    rows = [[part[: 1 + rank % 2], part[1 + rank % 2 :]] for rank, part in enumerate(parts)]
    rows[1][1].append(filler(processor))
    padded = [[record_kind.collate(part, processor)] for part in parts]
    packed = [[record_kind.collate(row, processor, packed=True) for row in of_rank] for of_rank in rows]
    return padded, packed, record_kind.collate(sum(parts, []), processor)


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

    remembered, rows = LABELS, None


def compare(config, zero, own, expected, breakage=None, chosen=None):
    """(loss difference, largest gradient difference relative to its tensor's largest entry, assignments to experts that
    were counted too often or too seldom) of one configuration.

    `own` are the rank's micro-batches of a step. Every request gets the adapter `chosen` if there is one.
    """
    expected_loss, expected_grads = expected
    topology = start_distributed(config.moe.ep_size if config.moe else 1)
    model = load_model(config.model, torch.float32, unread=True)
    torch.manual_seed(3)
    gate = task_kind(config)
    context = prepare_model(model, config, topology, set_trainable=gate.prepare, keep_ranks_in_step=False)
    if chosen is None:
        move(model.adapter_gate)
    else:
        fixed(model, torch.eye(len(NAMES))[NAMES.index(chosen)])
    if breakage == "scale":
        for layer in model.adapter_bank.layers.values():
            layer.scale_R *= 1.01
    ds_config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": len(own),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    read_weights(model, config, topology, ds_config)
    engine = build_engine(model, config, ds_config, 1, gate.adapter_lr(config))
    engine.train()
    stream = Stream([own])
    if breakage == "class weights":
        stream.remembered = NAMES
    parts = TrainingParts(config, topology, engine, context, stream=stream)
    task = GateTask(parts)
    micro_batches = next(task.steps(Progress(2, step=1)))
    labelled = sum(task.weight(batch) for batch in micro_batches)
    dist.all_reduce(labelled)
    total = torch.zeros((), dtype=torch.float64)  # sums add no rounding to the losses compared
    share = labelled.item() / topology.world_size / len(own)
    with BREAKAGES.get(breakage, nullcontext)():
        for batch in micro_batches:
            engine.set_gradient_accumulation_boundary(batch is micro_batches[-1])
            language, of_balancers = _forward_backward(parts, task, batch, share, len(own), at=lambda phase: None)
            total += language + of_balancers
            if batch is not micro_batches[-1]:
                engine.step()
    dist.all_reduce(total)
    trained = {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
    assert trained.keys() == expected_grads.keys()
    differences = []
    for name, parameter in trained.items():
        ours, theirs = safe_get_full_grad(parameter), expected_grads[name]
        differences.append((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
    tokens = 0 if task.supervised else sum(int(batch.tokens) for batch in micro_batches)
    layers = moe_layers(engine.module)
    counted = [int(torch.as_tensor(layer.load.counts_E).sum()) - tokens * layer.gate.top_k for layer in layers]
    worst = [(total / topology.world_size - expected_loss).abs(), max(differences)]
    worst = torch.stack([*worst, torch.tensor(max(map(abs, counted), default=0.0))])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return worst.tolist()


def of_peft(config, name, joined):
    """Loss and gradients of one adapter, by PEFT and plain transformers; the gradients as a bank holds them."""
    plain = family_of(model_config(config.model)).model_class.from_pretrained(config.model.path, dtype=torch.float32)
    bank = install_gate(build_outline(model_config(config.model)), config.gate).adapter_bank
    model = peft.PeftModel.from_pretrained(plain, Path(config.gate.adapters_in) / name, is_trainable=True).train()
    logits_BSV = model(**joined.with_labels, use_cache=False).logits
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).double(), joined.labels[:, 1:].flatten())
    loss.backward()
    own = {key.replace(".default", ""): one.grad for key, one in model.named_parameters() if one.requires_grad}
    grads = {}
    for path, layer in bank.layers.items():
        mine_R = layer.owner_R == bank.names.index(name)
        for side, rows in (("A", (mine_R,)), ("B", (slice(None), mine_R))):
            grads[f"{path}.lora_{side}"] = torch.zeros(getattr(layer, f"lora_{side}").shape)
            if mine_R.any():
                grads[f"{path}.lora_{side}"][rows] = own.pop(KEY.format(module=path, side=side))
    assert not own
    return loss.item(), grads


def one_hot(overrides, cases, controls):
    """Over experts: rows (EP, text, checkpointing, packing, what `compare` gives) against PEFT, and the same of models
    that are broken in the last case, if those `controls` are wanted."""
    deepspeed.utils.logger.setLevel("ERROR")
    config = load_run(RUN, overrides)
    *own_of, joined = batches(Path(config.data.train), load_processor(config.model.path), dist.get_world_size())
    if not family_of(model_config(config.model)).packs:
        own_of = own_of[:1]
    rank, rows, broken = dist.get_rank(), [], {}
    names = NAMES if len(cases) > 1 else NAMES[2:]  # of Qwen3.5-MoE, the third is inside of blocks with experts
    expected = cache(lambda name: of_peft(load_run(RUN, [*overrides, *ONE_HOT]), name, joined))
    for (ep_size, more), name in zip(cases, itertools.cycle(names), strict=False):
        config = load_run(RUN, [*overrides, *ONE_HOT, *more, f"moe.ep_size={ep_size or dist.get_world_size()}"])
        for packing, of_ranks in enumerate(own_of):
            found = compare(config, 3, of_ranks[rank], expected(name), chosen=name)
            rows.append([config.moe.ep_size, config.gate.text, config.train.gradient_checkpointing, packing, *found])
    breakages = {"scale": NAMES[0], "another adapter": NAMES[1], "counted twice": NAMES[0]} if controls else {}
    for breakage, chosen in breakages.items():
        broken[breakage] = compare(config, 3, own_of[-1][rank], expected(NAMES[0]), breakage, chosen)
    return {"rows": rows, "broken": broken}


def swapped_choices():
    """A patch under which the first two samples of a packed row get each other's adapters."""

    def swapped(lengths, device):
        sequence_S = sequence_of(lengths, device)
        return torch.where(sequence_S < 2, 1 - sequence_S, sequence_S) if len(lengths) > 1 else sequence_S

    return patch("ds_moe.tasks.gate.model.sequence_of", swapped)


BREAKAGES = {  # of forwards
    "choices": swapped_choices,
    "counted twice": lambda: patch("ds_moe.tasks.gate.model._beside_training", lambda model: nullcontext()),
}


def parity(overrides, cases):
    """Rows (stage, ZeRO, text, checkpointing, packing, what `compare` gives), and what it gives of broken models."""
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
        broken[breakage] = compare(config, 3 if config.moe else 2, own, reference(config, joined), breakage)
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
            report(**{name: parity(overrides, PARITIES[mode])})
            continue
        if mode.startswith("one hot"):
            report(**{name: one_hot(overrides, SOME_OVER_EXPERTS[mode], controls=mode != "one hot, all at once")})
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
