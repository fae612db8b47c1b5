"""Ranks of test_sequence_parallel: rows shared by ranks, through the trainer's own step, against whole rows in one
process.

The reference runs every row whole, without DeepSpeed; test_packing holds whole rows to their samples alone. The rows
are odd: images at one end, parts without a label, an image or a real token. A mode is a way to train.
Arguments: how many ranks share a row, then `all`, or `few` cases of each mode.
"""

import itertools
import sys
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS, sample_bounds
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, collate, encode, filler
from ds_moe.data.row_part import part_of_row
from ds_moe.distributed import sequence_group
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.convert import convert_for, moe_layers
from ds_moe.models.families import expert_state, family_of
from ds_moe.models.freeze import set_trainable
from ds_moe.models.head import at_labels
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.moe.balance import Occupancy
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.step import optimizer_step
from tests.distributed.packing_ranks import counting, fill_lora, reading_gradients
from tests.launcher import leave, report
from tests.samples import joined, without_image

VISION_ONLY = [r"^model\.language_model\.", r"^lm_head\."]


@dataclass(frozen=True)
class Mode:
    """A way to train whose shared rows must come to what whole ones come to."""

    preset: str = "tiny-vl-moe"
    moe: dict[str, Any] | None = field(default_factory=dict)  # section moe of the run
    lora: dict[str, Any] | None = None
    freeze: list[str] = field(default_factory=list)

    def run(self, ep_size=1, checkpointing=False):
        return RunConfig(
            model={"preset": self.preset, "freeze": self.freeze},
            data={"train": "digits", "packing": True},
            moe=None if self.moe is None else {"ep_size": ep_size, **self.moe},
            lora=self.lora,
            train={"gradient_checkpointing": checkpointing, "steps": 1, "lr": 1e-3},
            deepspeed="none",
        )


def aux(scope):
    return {"balance": [{"kind": "aux", "weight": 0.5, "scope": scope, "normalize_by_k": scope == "micro_batch"}]}


MODES = {
    "plain": Mode(),
    "aux, scope sequence": Mode(moe=aux("sequence")),
    "aux, scope micro_batch": Mode(moe=aux("micro_batch")),
    "z-loss, loss-free": Mode(moe={"balance": [{"kind": "z_loss", "weight": 0.1}, {"kind": "loss_free"}]}),
    "dense": Mode("tiny-vl-dense", moe=None),
    "text": Mode("tiny-moe"),
    "LoRA": Mode(lora={"rank": 8, "alpha": 16, "experts": True, "train_router": True}),
    "frozen tower": Mode(freeze=["vision"]),
    "tower alone": Mode("tiny-vl-dense", moe=None, freeze=VISION_ONLY),
}


# --- the rows


def rows_of(groups, processor):
    """[group][micro-step]: the samples of a row."""
    scans = iter([encode(one, processor, 256, 2**20) for one in digits_samples("train")[:64]])

    def text(count):
        return [without_image(next(scans), processor.image_token_id) for _ in range(count)]

    def unlabelled(samples):
        return [replace(one, labels=torch.full_like(one.labels, NO_LOSS)) for one in samples]

    def all_labelled(samples):
        return [replace(one, labels=one.input_ids) for one in samples]

    one_token = Encoded(torch.tensor([7]), torch.tensor([7]), prompt=0)
    everything = []
    for group in range(groups):
        mixed = [next(scans), *text(1), joined(next(scans), next(scans)), *text(1 + group), one_token]
        image_first = [next(scans), *unlabelled(text(4))]  # one image, and labels at one end
        image_last = [*all_labelled(text(3)), next(scans)]  # the next part begins with a label
        no_image = [*text(2), one_token, filler(processor)]
        nothing = [filler(processor)]
        rows = [mixed, image_first, nothing] if group == 0 else [no_image, image_last, mixed]
        everything.append([*rows, image_last if group == 0 else no_image])
    odd = [sum(len(one.input_ids) for one in row) % 2 for rows in everything for row in rows]
    assert set(odd) == {0, 1}
    return everything


# --- the reference


@dataclass
class Expected:
    """What the rows come to whole."""

    loss: float
    aux: float
    gradients: dict[str, torch.Tensor]
    counts: torch.Tensor | None  # (L, E) assignments that move a loss-free bias


def trainable(mode):
    def prepare(model, config):
        set_trainable(model, config)
        if mode.lora is not None:
            fill_lora(model)

    return prepare


def reference(mode, everything, processor):
    config = mode.run()
    model = build_preset(mode.preset).train()
    trainable(mode)(model, config)
    attend_by_sample(model)
    context = convert_for(model, config) if mode.moe is not None else None
    batches = [collate(row, processor, packed=True) for rows in everything for row in rows]
    labels, real = sum(int(one.label_tokens) for one in batches), sum(int(one.real_B.sum()) for one in batches)
    filled = sum(bool(one.real_B.any()) for one in batches)  # one row holds a filler alone
    occupancy = Occupancy(real / len(batches), filled / len(batches), 1.0)
    losses, balancing = 0.0, 0.0
    for batch in batches:
        if context is not None:
            context.real_BS, context.occupancy = batch.real_of_token, occupancy
            context.sequence_BS, context.sequences = batch.sequence_of_token, batch.samples
        loss = at_labels(model, batch.inputs, batch.labels, num_items=labels).loss
        extra = sum(context.aux_losses) / len(batches) if context is not None and context.aux_losses else loss * 0.0
        (loss + extra).backward()
        losses, balancing = losses + loss.item(), balancing + extra.item()
    counts = [one.gate.balancing.counts_E for one in moe_layers(model) if one.gate.balancing is not None]
    gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return Expected(losses, balancing, gradients, torch.stack(counts) if counts else None)


# --- the shared rows


def compare(mode, case, everything, expected, processor, spoil=lambda batches: None):
    """(loss, aux loss, gradients relative to their tensor's largest entry, held-out loss, counts) that differ most."""
    ranks, ep_size, stage, checkpointing = case
    config = mode.run(ep_size, checkpointing)
    topology = start_distributed(ep_size, sequence_parallel=ranks)
    whole = [collate(row, processor, packed=True) for row in everything[topology.data_rank]]
    batches = [part_of_row(batch, topology.part, ranks, processor) for batch in whole]
    spoil(batches)
    model = build_preset(mode.preset)
    context = prepare_model(model, config, topology, set_trainable=trainable(mode))
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    held_out = expected.loss if checkpointing else evaluated(engine, everything, processor)
    engine.train()
    moves, gradients = [], {}
    with counting(moves), reading_gradients(engine, gradients):
        parts = TrainingParts(config, topology, engine, context)
        outcome = optimizer_step(parts, Task(parts), batches, Progress(1))
    worst = worst_gradient(gradients, expected.gradients, topology)
    counted = float(bool(moves) and not torch.equal(torch.stack(moves), expected.counts))
    engine.destroy()
    found = [abs(outcome.loss - expected.loss), abs(outcome.aux_loss - expected.aux), worst, held_out, counted]
    values = torch.tensor([*found[:3], abs(held_out - expected.loss), counted])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def evaluated(engine, everything, processor):
    """The loss of all rows in evaluation, whole on every rank."""
    batches = [collate(row, processor, packed=True) for rows in everything for row in rows]
    engine.eval()
    with torch.no_grad():
        total = sum(at_labels(engine, one.inputs, one.labels).loss.item() for one in batches)
    return total / sum(int(one.label_tokens) for one in batches)


def engine_settings(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # as a packed run says; the step sets the boundary
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }


def worst_gradient(gradients, expected, topology):
    assert gradients.keys() == expected.keys()
    worst = 0.0
    for name, theirs in expected.items():
        theirs = torch.zeros_like(gradients[name]) if theirs is None else theirs
        scale = theirs.abs().max().clamp_min(1e-12)
        if expert_state(name):
            local = theirs.shape[0] // topology.ep_size
            theirs = theirs[topology.ep_rank * local : (topology.ep_rank + 1) * local]
        worst = max(worst, float((gradients[name] - theirs).abs().max() / scale))
    return worst


# --- isolation


def isolation(mode, ranks, row, processor, leaks=False):
    """How far the last hidden states of other samples move, and those of a sample whose text changes."""
    topology = start_distributed(1, sequence_parallel=ranks)
    model = build_preset(mode.preset).train()
    prepare_model(model, mode.run(), topology)
    decoder, kept = model.get_submodule(family_of(model).decoder), []
    decoder.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state.detach()))
    changed = list(row)
    ids = changed[1].input_ids.flip(0)
    changed[1] = replace(changed[1], input_ids=ids)
    lengths = [len(one.input_ids) for one in row]
    for samples in (row, changed):
        batch = collate(samples, processor, packed=True)
        if leaks:
            batch.inputs |= sample_bounds([lengths[0], lengths[1] + 1, lengths[2] - 1, *lengths[3:]])
        batch = part_of_row(batch, topology.part, ranks, processor)
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    group = sequence_group(topology).group
    both = []
    for hidden in kept:
        parts = [torch.empty_like(hidden) for _ in range(ranks)]
        dist.all_gather(parts, hidden, group=group)
        both.append(torch.cat(parts, dim=1)[0, : sum(lengths)])
    moved_S = (both[0] - both[1]).abs().amax(1)
    sample_S = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return [float(moved_S[sample_S != 1].max()), float(moved_S[sample_S == 1].max())]


# --- negative controls


def local(batches):
    """Every part attends to itself alone."""
    for batch in batches:
        batch.inputs |= sample_bounds([batch.inputs["input_ids"].shape[1]] * batch.inputs["row_part"].ranks)


def forgotten_label(batches):
    for batch in batches:
        batch.next_label = torch.full_like(batch.next_label, NO_LOSS)


def turned_features(batches):
    """The features of a row's images come in another order."""
    for part in (batch.inputs["row_part"] for batch in batches):
        if part.features is not None:
            part.features.order_M.copy_(part.features.order_M.flip(0))


CONTROLS = {"local attention": local, "forgotten label": forgotten_label, "turned features": turned_features}


def cases(ranks, modes, every):
    """(mode, (ranks, EP size, ZeRO stage, checkpointing)): all of two modes, and some of each other one. With more than
    two ranks checkpointing alternates."""
    world_size = dist.get_world_size()
    for number, (name, mode) in enumerate(modes.items()):
        sizes = [1] if mode.moe is None else [size for size in (1, 2, 4) if world_size % size == 0]
        found = list(itertools.product(sizes, (1, 2, 3), (False, True)))
        if world_size > 2:
            found = [one for place, one in enumerate(found) if place // 2 % 2 == place % 2]
        if not every:
            found = [found[-1 - number]]
        elif name not in ("plain", "dense"):
            found = found[number % len(found) :: 5]
        yield from ((name, (ranks, *one)) for one in found)


def as_text(everything, processor, vocabulary):
    """The same rows for a model without images."""

    def text(one):
        one = without_image(one, processor.image_token_id)
        return replace(
            one,
            input_ids=one.input_ids % vocabulary,
            labels=one.labels.where(one.labels == NO_LOSS, one.input_ids % vocabulary),
        )

    return [[[text(one) for one in row] for row in rows] for rows in everything]


def main():
    ranks, every = int(sys.argv[1]), sys.argv[2] == "all"
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    processor, words = tiny_processor(), tiny_processor("text")
    everything = rows_of(dist.get_world_size() // ranks, processor)
    texts = as_text(everything, processor, len(words.tokenizer))
    modes = MODES if every else {name: MODES[name] for name in ("aux, scope sequence", "dense")}
    expected, rows = {}, []
    for name, case in cases(ranks, modes, every):
        mode = MODES[name]
        given = (texts, words) if mode.preset == "tiny-moe" else (everything, processor)
        if name not in expected:
            expected[name] = reference(mode, *given)
        rows.append([name, *case, *compare(mode, case, given[0], expected[name], given[1])])
        print(rows[-1], flush=True)
    report(rows=rows, losses={name: one.loss for name, one in expected.items()})
    for name, spoil in CONTROLS.items() if every else ():
        mode = MODES["plain"]
        found = compare(mode, (ranks, 1, 1, False), everything, expected["plain"], processor, spoil)
        report(**{name: found})
    if every:
        with patch("ds_moe.moe.layer.shared_counts", lambda *arguments: None):
            mode = "aux, scope sequence"
            found = compare(MODES[mode], (ranks, 1, 1, False), everything, expected[mode], processor)
        report(**{"unshared counts": found})
    row = everything[0][0]
    for mode in ("dense", "plain") if every else ("dense",):
        report(**{f"isolation, {mode}": isolation(MODES[mode], ranks, row, processor)})
    report(leak=isolation(MODES["dense"], ranks, row, processor, leaks=True))
    leave()


if __name__ == "__main__":
    main()
