"""Ranks of test_packing: packed rows through the trainer's own step against every sample alone on one process.

The reference runs each sample in a forward of its own, without padding and without DeepSpeed, so nothing can mix there.
The packed side deals the same samples out unevenly: other numbers of them in each row, two rows a rank, one rank
without images. A mode is a way to train; other rooms add theirs to `MODES`.
Arguments: `all`, or `few` cases of each mode.
"""

import itertools
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from peft.tuners.lora import LoraLayer

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS, sample_bounds
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, collate, encode, filler, lay_out
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import convert_for, moe_layers
from ds_moe.models.families import expert_state, family_of
from ds_moe.models.freeze import set_trainable
from ds_moe.models.lora import ADAPTER
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.step import optimizer_step
from tests.launcher import leave, report
from tests.samples import filmed, joined, losses, without_image

PRESET, EXPERTS, LAYERS, TOP_K = "tiny-vl-moe", 8, 2, 2
ROWS = 2  # packed rows a rank, which are its micro-batches of a step
SEED = 3


@dataclass(frozen=True)
class Mode:
    """A way to train whose packed rows must come to what its samples alone come to."""

    moe: dict[str, Any] = field(default_factory=dict)  # section moe of the run
    lora: dict[str, Any] | None = None
    replay: bool = False  # whether the samples bring a routing


MODES = {
    "plain": Mode(),
    "aux, scope sequence": Mode(moe={"balance": [{"kind": "aux", "weight": 0.5, "scope": "sequence"}]}),
    "loss-free": Mode(moe={"balance": [{"kind": "loss_free", "update_rate": 0.01}]}),
    "replay": Mode(replay=True),
    "LoRA": Mode(lora={"rank": 4, "alpha": 12, "experts": True, "train_router": True}),
    "LoRA on the head": Mode(lora={"rank": 4, "alpha": 12, "targets": ["lm_head"], "experts": True}),
}


# --- the samples


def samples(world_size, processor):
    """Real scans mixed with texts, a sample of two images, a video, one of a single token; rank 1 has no images.

    [rank][row]: list of samples. Rows hold 1 to 5 of them.
    """
    scans = iter([encode(one, processor, 256, 2**20) for one in digits_samples("train")[: 8 * world_size]])
    result = []
    for rank in range(world_size):
        first = [next(scans) for _ in range(2 + rank % 3)]
        second = [next(scans) for _ in range(4 - rank % 3)]
        first[-1], second[-1] = (without_image(one, processor.image_token_id) for one in (first[-1], second[-1]))
        second[0] = joined(second[0], next(scans))
        if rank != 1:
            second.insert(1, filmed(processor, 3 + rank, rank))
        first.append(Encoded(torch.tensor([7]), torch.tensor([7]), prompt=0))  # its label is predicted by nothing
        second.append(filler(processor))
        rows = [first, second]
        if rank == 1:
            rows = [[without_image(one, processor.image_token_id) for one in row] for row in rows]
        result.append(rows)
    return result


def routing_of(place, one):
    """(S, L, K) experts that sample number `place` replays; every third token's router decides."""
    generator = torch.Generator().manual_seed(place)
    size = (len(one.input_ids), LAYERS)
    routing = torch.rand(*size, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int16)
    routing[::3] = -1
    return routing


def batch_of(mode, processor, places, encoded, packed):
    """The samples `encoded`, numbers `places` of all, in one packed row or in padded ones."""
    batch = collate(encoded, processor, packed=packed)
    if mode.replay:
        routing = [routing_of(place, one) for place, one in zip(places, encoded, strict=True)]
        batch.inputs["routing"] = lay_out(routing, -1, packed)
    return batch


def numbered(everything):
    """[rank][row]: the numbers of its samples, counted over all ranks."""
    count = itertools.count()
    return [[[next(count) for _ in row] for row in rows] for rows in everything]


# --- the reference


def run_config(mode, ep_size=1, checkpointing=False):
    return RunConfig(
        model={"preset": PRESET},
        data={"train": "digits"},
        moe={"ep_size": ep_size, **mode.moe},
        lora=mode.lora,
        train={"gradient_checkpointing": checkpointing, "steps": 1, "lr": 1e-3},
        deepspeed="none",
    )


@dataclass
class Expected:
    """What the samples come to alone."""

    alone: torch.Tensor  # (all samples,) the summed loss of each
    total: float  # mean over all labelled tokens
    aux: float
    gradients: dict[str, torch.Tensor]
    counts: torch.Tensor  # (L, E) assignments that move a loss-free bias
    head: torch.Tensor  # (V, D) the output layer


def reference(mode, everything, processor):
    """Each sample in a forward of its own, on a converted model without DeepSpeed; losses are added up."""
    config = run_config(mode)
    model = build_preset(PRESET).train()
    set_trainable(model, config)
    if mode.lora is not None:
        fill_lora(model)
    context = convert_for(model, config)
    every = [one for rows in everything for row in rows for one in row]
    labelled = sum(int((one.labels[1:] != NO_LOSS).sum()) for one in every)
    real = sum(one.real for one in every)
    alone, aux = [], 0.0
    for place, one in enumerate(every):
        batch = batch_of(mode, processor, [place], [one], packed=False)
        context.real_BS = batch.real_of_token
        own = losses(model(**batch.inputs, use_cache=False).logits, batch)[0]
        balancing = sum(context.aux_losses) / real if context.aux_losses and one.real else own.new_zeros(())
        (own / labelled + balancing).backward()
        alone.append(own.detach())
        aux += float(balancing.detach())
    counts = [layer.gate.balancing.counts_E for layer in moe_layers(model) if layer.gate.balancing is not None]
    gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    every_loss = torch.stack(alone)
    head = model.lm_head.weight.detach().clone()
    if isinstance(model.lm_head, LoraLayer):
        head += model.lm_head.get_delta_weight(ADAPTER).detach()
    return Expected(every_loss, float(every_loss.sum()) / labelled, aux, gradients, torch.stack(counts or [head]), head)


def fill_lora(model):
    """Updates that are not zero, the same for the reference and for every engine."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if "lora" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


# --- the packed side


@dataclass
class Found:
    """The largest differences over all ranks."""

    train: float = 0.0  # of a sample's loss in training, relative to the largest
    eval: float = 0.0  # the same in evaluation
    total: float = 0.0  # of the step's loss
    aux: float = 0.0
    gradient: float = 0.0  # relative to the tensor's largest entry
    counts: bool = True  # whether those of the loss-free bias are equal


def compare(mode, ep_size, stage, checkpointing, everything, expected, processor, spoil=None):
    """One optimizer step of packed rows by the trainer, compared with `expected`; `spoil` changes a rank's batches."""
    config = run_config(mode, ep_size, checkpointing)
    topology = start_distributed(ep_size)
    places = numbered(everything)[topology.rank]
    rows = everything[topology.rank]
    batches = [batch_of(mode, processor, *both, packed=True) for both in zip(places, rows, strict=True)]
    if spoil is not None:
        spoil(batches)

    def trainable(model, config):
        set_trainable(model, config)
        if mode.lora is not None:
            fill_lora(model)

    model = build_preset(PRESET)
    context = prepare_model(model, config, topology, set_trainable=trainable)
    engine = build_engine(model, config, engine_settings(stage), total_steps=1)
    hidden = []
    decoder = engine.module.get_submodule(family_of(model).decoder)
    decoder.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state.detach()))
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            engine(**batch.inputs, use_cache=False)
    evaluated, hidden[:] = list(hidden), []
    engine.train()
    found, moves, gradients = Found(), [], {}
    with counting(moves), reading_gradients(engine, gradients):
        parts = TrainingParts(config, topology, engine, context)
        outcome = optimizer_step(parts, Task(parts), batches, Progress(1))
    for name, outputs in (("train", hidden[:ROWS]), ("eval", evaluated)):
        own = torch.cat([losses(h @ expected.head.T, b) for h, b in zip(outputs, batches, strict=True)])
        theirs = expected.alone[[place for row in places for place in row]]
        setattr(found, name, float((own - theirs).abs().max() / expected.alone.max()))
    found.total, found.aux = abs(outcome.loss - expected.total), abs(outcome.aux_loss - expected.aux)
    found.gradient = worst_gradient(gradients, expected.gradients, topology)
    found.counts = not moves or torch.equal(torch.stack(moves), expected.counts)
    engine.destroy()
    return over_ranks(found)


def engine_settings(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ROWS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }


@contextmanager
def counting(moves):
    """The counts by which loss-free biases move."""
    original = LossFreeBalancing.move

    def move(self, counts_E, rate):
        moves.append(counts_E.clone())
        original(self, counts_E, rate)

    with patch.object(LossFreeBalancing, "move", move):
        yield


@contextmanager
def reading_gradients(engine, gradients):
    """The gradients of a step as the optimizer would get them."""
    own = engine.step

    def step():
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradients[name] = safe_get_full_grad(parameter).clone()
        own()

    with patch.object(engine, "step", step):
        yield


def worst_gradient(gradients, expected, topology):
    assert gradients.keys() == expected.keys()
    worst = 0.0
    for name, theirs in expected.items():
        scale = theirs.abs().max().clamp_min(1e-12)
        if expert_state(name):
            local = theirs.shape[0] // topology.ep_size
            theirs = theirs[topology.ep_rank * local : (topology.ep_rank + 1) * local]
        worst = max(worst, float((gradients[name] - theirs).abs().max() / scale))
    return worst


def over_ranks(found):
    values = torch.tensor([found.train, found.eval, found.total, found.aux, found.gradient, float(not found.counts)])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


# --- negative controls


def leak(batches):
    """On rank 0 the last token of the first sample attends with the second."""
    if dist.get_rank() == 0:
        lengths = list(batches[0].inputs["sample_lengths"])
        batches[0].inputs |= sample_bounds([lengths[0] - 1, lengths[1] + 1, *lengths[2:]])


def wrong_rope(batches):
    """On rank 0 the image of the first sample is taken for one of another shape: its rows become its columns."""
    if dist.get_rank() == 0:
        positions = batches[0].inputs["position_ids"]
        first = slice(0, batches[0].inputs["sample_lengths"][0])
        assert not torch.equal(positions[2, 0, first], positions[3, 0, first])
        positions[2:, 0, first] = positions[2:, 0, first].flip(0)


def miscounted(batches):
    """On rank 0 one sample's tokens count as the next one's, for everything that speaks of samples."""
    if dist.get_rank() == 0:
        batches[0].sequence_of_token[batches[0].sequence_of_token == 0] = 1


CONTROLS = {
    "leak": ("plain", leak),
    "wrong rope row": ("plain", wrong_rope),
    "miscounted": ("aux, scope sequence", miscounted),
}


def cases(modes, world_size, every):
    sizes = [size for size in (1, 2, 4) if world_size % size == 0]
    if every:
        return list(itertools.product(modes, sizes, (1, 2, 3), (False, True)))
    few = [(sizes[-1], 3, True), (1, 2, False), (sizes[-1], 1, False)]
    return [(name, *few[place % len(few)]) for place, name in enumerate(modes)]


def main():
    start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    world_size, processor = dist.get_world_size(), tiny_processor()
    everything = samples(world_size, processor)
    expected = {name: reference(mode, everything, processor) for name, mode in MODES.items()}
    rows = []
    for name, *case in cases(MODES, world_size, sys.argv[1] == "all"):
        rows.append([name, *case, *compare(MODES[name], *case, everything, expected[name], processor)])
    report(rows=rows, losses={name: one.total for name, one in expected.items()})
    for control, (name, spoil) in CONTROLS.items():
        report(**{control: compare(MODES[name], 1, 1, False, everything, expected[name], processor, spoil)})
    leave()


if __name__ == "__main__":
    main()
