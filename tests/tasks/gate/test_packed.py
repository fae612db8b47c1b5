"""Packed rows: the gate reads each sample as it would alone, and its choice reaches that sample's tokens alone."""

import pytest
import torch
import torch.nn.functional as F

from ds_moe.data.batch import NO_LOSS
from ds_moe.data.encode import collate
from ds_moe.models.attention import attend_by_sample
from ds_moe.tasks.gate import features
from ds_moe.tasks.gate import model as gate
from ds_moe.tasks.gate.network import divergence, entropy, gate_loss
from tests.tasks.gate.gated import PROCESSOR, SAMPLES, encoded, gated
from tests.tasks.gate.lora_folders import write

LOSS, GRADIENT = 1e-6, 5e-6
HIDDEN = 1.5e-6  # of hidden states, whose fp32 products other CPUs round in another order: 1.2e-6 is the most seen
READS = [{"text": "embeddings"}, {"text": "last"}, {"text": "layer", "text_layer": 1}, {"text": "first"}]
GATES = [*READS, {"vision": "mean"}, {"per": "layer"}, {"per": "token"}, {"per": "token", "modalities": "vision"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


def prepared(folder, **keys):
    model = gated(folder, **keys)
    attend_by_sample(model)
    return model


def losses(model, batch):
    """(B,) the summed loss of each sample."""
    logits = model(**batch.with_labels, use_cache=False).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none")
    of_sample = batch.sequence_of_token[:, 1:].flatten()
    return torch.zeros(batch.samples).index_add(0, of_sample.clamp(min=0), torch.where(of_sample < 0, 0.0, each))


def seen(model, batch):
    """(B, .) what the gate has read and decided of each sample, as one row of numbers each."""
    found, decision, mask = model.features, model.decision, model.counted_BS
    decided = decision.logits if mask is None else decision.logits.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)
    return torch.cat([found.text_BD, found.vision_BD, found.present_B[:, None].float(), decided.flatten(1)], dim=1)


def alone(model):
    """(losses, what the gate saw) of each sample in a forward of its own, padded by nothing."""
    found = []
    for one in encoded():
        batch = collate([one], PROCESSOR)
        found.append((losses(model, batch), seen(model, batch)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def apart(ours, theirs):
    return (ours - theirs).abs().max() / theirs.abs().max()


@pytest.mark.parametrize("keys", GATES, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_sample_of_a_row_is_read_and_answered_as_it_is_alone(folder, keys):
    model, batch = prepared(folder, **keys), collate(encoded(), PROCESSOR, packed=True)
    with torch.no_grad():
        expected, read = alone(model)
        assert apart(losses(model, batch), expected) <= LOSS
        assert apart(seen(model, batch), read) <= HIDDEN


@pytest.mark.parametrize("keys", [{}, {"per": "layer"}, {"per": "token"}], ids=["example", "layer", "token"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_gate_and_adapters_are_those_of_padded_rows(folder, keys, checkpointed):
    """With the terms that hold a gate near its reference and near even weights."""
    labels_B, found = torch.tensor([0, 2, NO_LOSS, 1, 2]), []
    for packed in (False, True):
        model = prepared(folder, stage="joint", **keys).train()
        gate.hold_reference(model)
        with torch.no_grad():
            model.gate_reference.out.bias += torch.linspace(-1, 1, len(model.gate_reference.out.bias))
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = collate(encoded(), PROCESSOR, packed=packed)
        own = losses(model, batch)
        decision, mask = model.decision, model.counted_BS
        terms = [entropy(decision.weights, mask), divergence(decision.logits, model.reference_logits, mask)]
        total = own.sum() + sum(one.sum() for one in terms) + gate_loss(decision, labels_B, mask)
        total.backward()
        found.append(
            ([own.detach(), *terms], {name: one.grad for name, one in model.named_parameters() if one.requires_grad})
        )
    (theirs, their_grads), (ours, our_grads) = found
    assert all(apart(a, b) <= LOSS for a, b in zip(ours, theirs, strict=True))
    for name, gradient in their_grads.items():
        assert (our_grads[name] - gradient).abs().max() <= GRADIENT * gradient.abs().max(), name


@pytest.mark.parametrize("per", ["example", "layer", "token"])
def test_a_choice_that_reaches_another_sample_is_noticed(folder, per, monkeypatch):
    """Negative control: the first two samples of the row get each other's adapters."""
    model, batch = prepared(folder, per=per), collate(encoded(), PROCESSOR, packed=True)
    with torch.no_grad():
        expected, _ = alone(model)

        def swapped(lengths, device):
            sequence_S = features.sequence_of(lengths, device)
            return torch.where(sequence_S < 2, 1 - sequence_S, sequence_S)

        monkeypatch.setattr(gate, "sequence_of", swapped)
        assert apart(losses(model, batch)[:2], expected[:2]) > 100 * LOSS


@pytest.mark.parametrize("keys", [*READS[:3], {"per": "token"}], ids=lambda keys: "-".join(map(str, keys.values())))
def test_no_answer_token_reaches_the_features(folder, keys):
    """Other answers change nothing that the gate reads; an answer whose first label is missing does (the control)."""
    model, batch = prepared(folder, **keys), collate(encoded(), PROCESSOR, packed=True)
    answers = batch.labels != NO_LOSS

    @torch.no_grad()
    def read(labels):
        found = []
        for ids in (batch.inputs["input_ids"], torch.where(answers, 7, batch.inputs["input_ids"])):
            model(**{**batch.inputs, "input_ids": ids}, labels=labels, gate_only=True)
            found.append(seen(model, batch))
        return found

    before, after = read(batch.labels)
    assert torch.equal(before, after)
    leaking = batch.labels.clone()
    leaking[0, answers[0].nonzero()[0]] = NO_LOSS
    before, after = read(leaking)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])


def test_what_is_hidden_begins_anew_with_every_sample():
    """Negative control: hidden from the row's first label on, all samples but the first would have nothing to read."""
    batch = collate(encoded(), PROCESSOR, packed=True)
    lengths = batch.inputs["sample_lengths"]
    mask = features.prompt_mask(batch.inputs["input_ids"], None, batch.labels, (), lengths)
    counts = features.of_samples(torch.sum, mask, lengths).tolist()
    assert counts == [int((one.labels != NO_LOSS).cumsum(0).eq(0).sum()) for one in encoded()]
    whole = features.prompt_mask(batch.inputs["input_ids"], None, batch.labels, ())
    assert features.of_samples(torch.sum, whole, lengths).tolist() == [counts[0], *[0] * (len(SAMPLES) - 1)]


def test_a_packed_row_that_hides_its_lengths_is_refused(folder):
    model, batch = prepared(folder), collate(encoded(), PROCESSOR, packed=True)
    inputs = {name: value for name, value in batch.inputs.items() if name != "sample_lengths"}
    with pytest.raises(ValueError, match="sample_lengths"):
        model(**inputs)
