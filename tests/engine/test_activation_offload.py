"""Activation offload: exact, and only inputs of checkpointed layers move.

DeepSpeed moves nothing on a CPU. `Moving` is told that these tensors lie on a device, so that the real hooks, copies
and buffers run here; streams and pinned memory are a GPU's.
"""

import gc
import weakref

import pytest
import torch

from ds_moe.config.moe import MoEConfig
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode
from ds_moe.engine.activation_offload import KEPT_LAYERS, ActivationOffload
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.moe import tape
from ds_moe.moe.all_to_all import ExpertParallel


class Moving(ActivationOffload):
    """Notes the tensors that move, and those that came back, for as long as these live."""

    _should_skip = staticmethod(lambda tensor: False)

    def __init__(self, layers):
        super().__init__(layers)
        self.shapes, self.back, self.buffers = [], [], []

    def _start_offload(self, number, tensor, **more):
        self.shapes.append((*tensor.shape,))
        super()._start_offload(number, tensor, **more)

    def restore_input(self, tensor_id):
        tensor = super().restore_input(tensor_id)
        self.back.append(weakref.ref(tensor))
        return tensor

    def _empty_cpu_like(self, tensor):
        reused = sum(map(len, self._cpu_buffer_pool.values()))
        buffer, key = super()._empty_cpu_like(tensor)
        if sum(map(len, self._cpu_buffer_pool.values())) == reused:
            self.buffers.append(buffer._base.numel())
        return buffer, key


def model_of(device: str = "cpu"):
    model = build_preset("tiny-vl-moe").to(device).train()
    convert(model, MoEConfig(), ExpertParallel())
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": tape.checkpoint_contexts})
    return model


def batch_of(count: int, device: str = "cpu"):
    processor = tiny_processor()
    encoded = [encode(sample, processor, 256, 2**20) for sample in digits_samples("train")[:count]]
    return {name: value.to(device) for name, value in collate(encoded, processor).with_labels.items()}


def gradients(model, batches) -> list[torch.Tensor]:
    """The loss of the last micro-batch and every gradient, summed over micro-batches."""
    model.zero_grad()
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def both(*batches, kind=Moving):
    """(without, with offload, the offload)."""
    model = model_of()
    plain = gradients(model, batches)
    offload = kind.enable(model)
    return plain, gradients(model, batches), offload


def equal(ones, others) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def layers_of(model) -> int:
    return model.config.get_text_config().num_hidden_layers + model.config.vision_config.depth


def test_nothing_changes_and_only_the_inputs_of_layers_move():
    batch, configs = batch_of(3), model_of().config
    plain, ours, offload = both(batch)
    assert equal(plain, ours)
    text, vision = configs.get_text_config(), configs.vision_config
    of_vision, of_text = (len(batch["pixel_values"]), vision.hidden_size), (*batch["input_ids"].shape, text.hidden_size)
    # No index, no weight, nothing of routing.
    assert offload.shapes == vision.depth * [of_vision] + (text.num_hidden_layers - KEPT_LAYERS) * [of_text]
    stats, moved = offload.stats, len(offload.shapes)
    assert (stats.offloaded_tensors, stats.restored_tensors, stats.kept_last_tensors) == (moved, moved, KEPT_LAYERS)
    assert stats.offloaded_bytes == stats.restored_bytes == sum(4 * torch.Size(one).numel() for one in offload.shapes)
    gc.collect()
    assert not offload._tracker and not offload._keep_last and all(tensor() is None for tensor in offload.back)


def test_a_wrong_copy_is_noticed():
    """Negative control of the comparison above: what comes back is what was sent, but for one entry."""

    class Wrong(Moving):
        def restore_input(self, tensor_id):
            restored = super().restore_input(tensor_id).clone()
            restored.view(-1)[0] += 1
            return restored

    plain, wrong, _ = both(batch_of(2), kind=Wrong)
    assert not equal(plain, wrong)


def test_scoring_and_evaluation_move_nothing():
    """Old policies, gates' features and evaluations are forwards without gradients, or of a model that evaluates."""
    model, batch = model_of(), batch_of(2)
    offload = Moving.enable(model)
    with torch.no_grad():
        model(**batch, use_cache=False)
    model.eval()(**batch, use_cache=False)
    assert offload._next_id == 0


def test_inputs_go_when_they_were_read(monkeypatch):
    """When the backward pass of the first layer begins, the inputs of the layers behind it are gone again."""
    alive = []

    class Counting(Moving):
        def restore_input(self, tensor_id):
            alive.append(sum(tensor() is not None for tensor in self.back))
            return super().restore_input(tensor_id)

    both(batch_of(2), kind=Counting)
    assert len(alive) == layers_of(model_of()) and max(alive) <= 1


def test_the_tape_is_written_once_and_read_as_it_is(monkeypatch):
    """The recompute gets the very objects that the forward left: neither moved nor copied."""
    model, batch, tapes = model_of(), batch_of(2), []
    Moving.enable(model)
    monkeypatch.setattr(tape, "Tape", lambda: tapes.append(Noted()) or tapes[-1])
    gradients(model, [batch])
    written = [entry for one in tapes for entry in one.entries.written]
    assert len(written) == len(moe_layers(model)) and all(one.entries.read == one.entries.written for one in tapes)


class Noted(tape.Tape):
    """A tape that remembers what was written to it and read from it."""

    def __init__(self):
        super().__init__(entries=Entries())


class Entries(dict):
    def __init__(self):
        super().__init__()
        self.written, self.read = [], []

    def __setitem__(self, index, entry):
        self.written.append(id(entry))
        super().__setitem__(index, entry)

    def __getitem__(self, index):
        self.read.append(id(super().__getitem__(index)))
        return super().__getitem__(index)


def test_host_buffers_serve_micro_batches_of_other_lengths():
    """Six micro-batches, no two of one shape, and back: powers of two, at most twice what is moved, and kept."""
    model = model_of()
    batches = [batch_of(count) for count in (3, 4, 5, 6, 7, 8)]
    assert len({batch["pixel_values"].shape for batch in batches}) == 6
    offload = Moving.enable(model)
    gradients(model, batches)
    made, moved = list(offload.buffers), len(offload.shapes)
    assert len(made) <= moved / 2 and all(size & (size - 1) == 0 for size in made)
    assert all(size < 2 * max(torch.Size(shape).numel() for shape in offload.shapes) for size in made)
    gradients(model, batches[::-1])
    assert offload.buffers == made


def test_a_cpu_moves_nothing():
    plain, ours, offload = both(batch_of(2), kind=ActivationOffload)
    assert equal(plain, ours)
    assert offload.stats.skipped_marked_tensors == layers_of(model_of()) and offload.stats.offloaded_bytes == 0


@pytest.mark.gpu
def test_a_gpu_holds_less_and_computes_the_same():
    model, batches = model_of("cuda"), [batch_of(count, "cuda") for count in (3, 8)]
    plain, before = gradients(model, batches), _held_after_forward(model, batches[1])
    offload = ActivationOffload.enable(model)
    assert equal(plain, gradients(model, batches))
    assert offload.stats.offloaded_tensors == len(batches) * (layers_of(model) - KEPT_LAYERS)
    assert _held_after_forward(model, batches[1]) < before


def _held_after_forward(model, batch) -> int:
    """Bytes in use on the device before the backward pass."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    loss.backward()
    return held
