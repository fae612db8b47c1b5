"""Ranks of test_dpo: pairs in packed and padded rows, against every sequence in a forward of its own on one process.

The reference runs without DeepSpeed and writes the formulas out, from logits of all positions in float64. The ranks get
an odd number of pairs: other numbers of them in each row, a filler, one rank without images.
Arguments: `all`, or `few` cases.
"""

import itertools
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.chat import Sample, Turn
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, filler
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import convert_for, moe_layers
from ds_moe.models.freeze import set_trainable
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.replay.record import RoutingRecorder
from ds_moe.tasks.dpo import reference as reference_module
from ds_moe.tasks.dpo.pair_record import Pair
from ds_moe.tasks.dpo.pairs import PAIRS, EncodedPair
from ds_moe.tasks.dpo.task import PreferenceOptimization
from ds_moe.tasks.task import TrainingParts
from ds_moe.training.step import optimizer_step
from tests.distributed.packing_ranks import (
    PRESET,
    counting,
    engine_settings,
    fill_lora,
    leak,
    reading_gradients,
    worst_gradient,
)
from tests.launcher import leave, report

BETA, SMOOTHING, MARGIN, ALPHA = 0.3, 0.2, 0.6, 0.7
LORA = {"rank": 8, "alpha": 24, "experts": True}
AUX = {"balance": [{"kind": "aux", "weight": 0.5, "scope": "sequence"}]}


@dataclass(frozen=True)
class Tuning:
    """A way to learn from pairs."""

    dpo: dict[str, Any]
    moe: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None  # then the reference is the base; otherwise its log-probs are given


MODES = {
    "dpo over LoRA": Tuning({"loss": "dpo", "label_smoothing": SMOOTHING}, lora=LORA),
    "dpo over LoRA, replay": Tuning({"loss": "dpo", "replay_reference": True}, lora=LORA),
    "ipo": Tuning({"loss": "ipo"}),
    "hinge and sft": Tuning({"loss": "hinge", "rpo_alpha": ALPHA}),
    "robust, aux": Tuning({"loss": "robust", "label_smoothing": SMOOTHING}, moe=AUX),
    "simpo, loss-free": Tuning(
        {"loss": "simpo", "margin": MARGIN}, moe={"balance": [{"kind": "loss_free", "update_rate": 0.01}]}
    ),
}


# --- the pairs


def answered(sample, text, image):
    """The question of a scan with another answer, with its image or without."""
    asked = Turn("user", sample.turns[0].parts if image else (sample.last_question(),))
    return Sample((asked, Turn("assistant", (text,))), sample.where)


def pairs(world_size, processor):
    """[rank][row]: list of pairs; 5 on two ranks, 7 on three."""
    scans, count = iter(digits_samples("train")), itertools.count()
    wrong = itertools.cycle(["no", "seven or eight", "Which digit is this?", "even or odd, I cannot tell"])

    def pair(image):
        sample = next(scans)
        chosen, rejected = answered(sample, sample.answer, image), answered(sample, next(wrong), image)
        made = Pair(chosen.turns, sample.where, rejected=rejected, number=next(count))
        return PAIRS.encode(made, processor, 512, 2**20)

    result = []
    for rank in range(world_size):
        first, second = (2, 1) if rank == 0 else (1, 1) if rank == 1 else (2, 0)
        rows = [[pair(rank != 1) for _ in range(first)], [pair(rank != 1) for _ in range(second)]]
        rows[1].append(filler(processor))
        result.append(rows)
    return result


def noise(number):
    """How the log-probs of a reference that is given differ from -20, by the pair's number."""
    return torch.randn(2, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


# --- the reference


def run_config(mode, ep_size=1, checkpointing=False):
    return RunConfig(
        task="dpo",
        model={"preset": PRESET},
        data={"train": "pairs.jsonl"},
        moe={"ep_size": ep_size, **mode.moe},
        lora=mode.lora,
        dpo={"beta": BETA, **mode.dpo},
        train={"gradient_checkpointing": checkpointing, "steps": 1, "lr": 1e-3},
        deepspeed="none",
    )


def alone(model, context, one, processor, routing=None):
    """(log-prob, tokens) of one sequence in a forward of its own, from the logits of all positions."""
    batch = collate([one], processor)
    context.real_BS = batch.real_of_token
    replay = {} if routing is None else {"routing": routing}
    logits_SV = model(**batch.inputs, **replay, use_cache=False).logits[0, :-1].double()
    target_S = batch.labels[0, 1:]
    kept_S = target_S != NO_LOSS
    logprob_S = logits_SV.log_softmax(-1)[kept_S].gather(1, target_S[kept_S].unsqueeze(1))
    return logprob_S.sum(), int(kept_S.sum())


def written_out(mode, policy, reference, tokens):
    """The loss of a pair."""
    (c, r), (rc, rr), (nc, nr) = policy, reference, tokens
    h, kind = BETA * ((c - rc) - (r - rr)), mode.dpo["loss"]
    if kind == "dpo":
        e = mode.dpo.get("label_smoothing", 0.0)
        return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    if kind == "ipo":
        return ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2
    if kind == "hinge":
        return (1 - h).clamp(min=0) - mode.dpo.get("rpo_alpha", 0.0) * c / nc
    if kind == "robust":
        return (-(1 - SMOOTHING) * F.logsigmoid(h) + SMOOTHING * F.logsigmoid(-h)) / (1 - 2 * SMOOTHING)
    return -F.logsigmoid(BETA * (c / nc - r / nr) - MARGIN)


@dataclass
class Expected:
    """What the pairs come to."""

    loss: float
    aux: float
    figures: dict[str, float]
    gradients: dict[str, torch.Tensor]
    counts: torch.Tensor  # (L, E) assignments that move a loss-free bias


def expected_of(mode, everything, processor):
    config = run_config(mode)
    model, base = build_preset(PRESET).train(), build_preset(PRESET)
    set_trainable(model, config)
    if mode.lora is not None:
        fill_lora(model)
    context, of_base = convert_for(model, config), convert_for(base.eval(), run_config(Tuning(mode.dpo)))
    every = [one for rows in everything for row in rows for one in row if isinstance(one, EncodedPair)]
    total, aux, figures = 0.0, 0.0, dict.fromkeys(("reward_chosen", "reward_rejected", "margin", "accuracy"), 0.0)
    for pair in every:
        policy, reference, tokens, balancing = [], [], [], 0.0
        for place, one in enumerate(pair.sequences()):
            with torch.no_grad(), RoutingRecorder(base) as recorder:
                of_reference, _ = alone(base, of_base, one, processor)
            [routing] = recorder.take()
            given = mode.lora is None
            reference.append(-20 + noise(pair.number)[place] if given else of_reference)
            replays = mode.dpo.get("replay_reference")
            logprob, count = alone(model, context, one, processor, routing.unsqueeze(0) if replays else None)
            policy.append(logprob)
            tokens.append(count)
            balancing = balancing + sum(context.aux_losses) / (2 * len(every)) if context.aux_losses else 0.0
        loss = written_out(mode, policy, reference, tokens) / len(every)
        (loss + balancing).backward()
        total, aux = total + float(loss), aux + float(balancing)
        simpo = mode.dpo["loss"] == "simpo"
        rewards = [float(BETA * (p / n if simpo else p - q)) for p, q, n in zip(policy, reference, tokens, strict=True)]
        values = (*rewards, rewards[0] - rewards[1], float(rewards[0] > rewards[1]))
        figures = {name: figures[name] + value / len(every) for name, value in zip(figures, values, strict=True)}
    counts = [layer.gate.balancing.counts_E for layer in moe_layers(model) if layer.gate.balancing is not None]
    gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return Expected(total, aux, figures, gradients, torch.stack(counts) if counts else torch.empty(0))


# --- the ranks


def compare(
    mode, ep_size, stage, checkpointing, packed, everything, expected, processor, spoil=None, around=nullcontext
):
    """[difference of the loss, of the auxiliary loss, of the worst figure, of gradients relative to each tensor's
    largest entry, whether counts differ]: the largest over ranks."""
    config = run_config(mode, ep_size, checkpointing)
    topology = start_distributed(ep_size)

    def trainable(model, config):
        set_trainable(model, config)
        if mode.lora is not None:
            fill_lora(model)

    model = build_preset(PRESET)
    context = prepare_model(model, config, topology, set_trainable=trainable)
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    engine.train()
    task = PreferenceOptimization(TrainingParts(config, topology, engine, context, stream=None))
    batches = [PAIRS.collate(row, processor, packed=packed) for row in everything[topology.rank]]
    if spoil is not None:
        spoil(batches)
    with around():
        batches = [scored(task, mode, batch) for batch in batches]
    gradients, moves, progress = {}, [], Progress(1)
    with reading_gradients(engine, gradients), counting(moves):
        outcome = optimizer_step(task.parts, task, batches, progress)
    figures = task.metrics(progress)
    found = [
        abs(outcome.loss - expected.loss),
        abs(outcome.aux_loss - expected.aux),
        max(abs(figures[name] - value) for name, value in expected.figures.items()),
        worst_gradient(gradients, expected.gradients, topology),
        float(bool(moves) and not torch.equal(torch.stack(moves), expected.counts)),
    ]
    worst = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return worst.tolist()


def scored(task, mode, batch):
    if mode.lora is not None:
        return task._with_reference(batch, "train")
    batch.reference_P2 = torch.stack([-20 + noise(max(int(number), 0)) for number in batch.number_P])
    return batch


# --- negative controls


def swapped(everything):
    """The first pair of rank 0 with its answers exchanged."""
    [first, *others], *rows = everything[0]
    chosen, rejected = first.sequences()
    ids, labels = torch.cat([rejected.input_ids, chosen.input_ids]), torch.cat([rejected.labels, chosen.labels])
    exchanged = EncodedPair(**{**vars(first), "input_ids": ids, "labels": labels, "chosen": len(rejected.input_ids)})
    return [[[exchanged, *others], *rows], *everything[1:]]


def updates_left_on():
    """The reference is the policy itself."""
    return patch.object(reference_module, "without_updates", lambda model: nullcontext())


def cases(world_size, every):
    sizes = [size for size in (1, 2) if world_size % size == 0]
    if not every:
        return [("dpo over LoRA", sizes[-1], 3, True, True), ("robust, aux", 1, 2, False, False)]
    both = itertools.product(MODES, sizes, (2, 3), (False, True))
    return [(name, size, stage, place % 2 == 0, packed) for place, (name, size, stage, packed) in enumerate(both)]


def main():
    topology = start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    world_size, processor = dist.get_world_size(), tiny_processor()
    everything = pairs(world_size, processor)
    wanted = cases(world_size, sys.argv[1] == "all")
    expected = {
        name: expected_of(MODES[name], everything, processor) for name in dict.fromkeys(one[0] for one in wanted)
    }
    rows = [
        [name, *case, *compare(MODES[name], *case, everything, expected[name], processor)] for name, *case in wanted
    ]
    report(rows=rows, losses={name: one.loss for name, one in expected.items()}, rank=topology.rank)
    plain = "dpo over LoRA"
    settings = (MODES[plain], 1, 2, False, True)
    report(swapped=compare(*settings, swapped(everything), expected[plain], processor))
    if sys.argv[1] == "all":
        report(leak=compare(*settings, everything, expected[plain], processor, spoil=leak))
        left_on = compare(*settings, everything, expected[plain], processor, around=updates_left_on)
        report(**{"wrong reference": left_on})
    leave()


if __name__ == "__main__":
    main()
