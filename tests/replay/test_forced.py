"""Forced routing in one process: recorded, then replayed, it is the live forward bit for bit; forced ids are used."""

import itertools

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from ds_moe.config.moe import MoEConfig
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.presets import build_preset
from ds_moe.moe.tape import checkpoint_contexts
from ds_moe.replay.record import RoutingRecorder, joined
from tests.distributed.parity_ranks import batches

LAYERS, EXPERTS, TOP_K = 2, 8, 2  # of the tiny models


def converted(preset="tiny-vl-moe", dtype=torch.float32, checkpointing=False, **moe):
    model = build_preset(preset).to(dtype).train()
    context = convert(model, MoEConfig(**moe))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    return model, context


def padded(side):
    """Real scans and questions of different lengths; image patches keep their order on either side."""
    [batch] = batches(1)
    if side == "left":
        for row, real in enumerate(batch["attention_mask"].sum(1).tolist()):
            for key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
                batch[key][row] = batch[key][row].roll(-real)
    assert not batch["attention_mask"].all()
    return batch


def packed():
    """Two text sequences behind one another in one row."""
    ids = torch.randint(300, (1, 23), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(9), torch.arange(14)]).unsqueeze(0)
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def outcome(model, batch, routing=None):
    """Logits and all gradients."""
    model.zero_grad()
    output = model(**batch, use_cache=False, **({} if routing is None else {"routing": routing}))
    output.loss.backward()
    return [output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def recorded(model, batch):
    with RoutingRecorder(model) as recorder:
        live = outcome(model, batch)
    [ids_TLK] = recorder.take()
    return live, joined([ids_TLK], batch["input_ids"].shape[0])


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["right", "left", "packed"])
def test_self_replay_is_live_bit_for_bit(form, checkpointing, dtype):
    model, _ = converted("tiny-moe" if form == "packed" else "tiny-vl-moe", dtype, checkpointing)
    batch = packed() if form == "packed" else padded(form)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    live, routing = recorded(model, batch)
    assert routing.dtype == torch.int16 and routing.shape[2:] == (LAYERS, TOP_K)
    if form != "packed":
        assert torch.equal(routing[..., 0, 0] >= 0, batch["attention_mask"].bool())  # padding is routed nowhere
    replayed = outcome(model, batch, routing)
    assert same(live, replayed)
    for layer in moe_layers(model):
        assert layer.gate.weight.grad.abs().max() > 0
    changed = routing.clone()
    changed[routing >= 0] = (changed[routing >= 0] + 1) % EXPERTS
    assert not same(live, outcome(model, batch, changed))  # negative control: the ids are what decides


def test_the_order_of_a_tokens_experts_changes_nothing_but_rounding():
    model, _ = converted()
    batch = padded("right")
    live, routing = recorded(model, batch)
    for ours, theirs in zip(outcome(model, batch, routing.flip(-1)), live, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # sums of a token's two experts, turned round


def test_weights_come_from_live_logits_at_the_replayed_experts():
    """Against transformers' own block with the ids put in by hand, dense in experts."""
    model, _ = converted("tiny-moe")
    layer = moe_layers(model)[0]
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    ids = torch.tensor([[7, 0], [1, 2], [-1, -1], [3, 6], [5, 4]])
    layer.context.routing_BSLK = ids.view(1, 5, 1, TOP_K)
    layer.context.begin(None, None)
    y = layer(hidden)[0]
    plain = build_preset("tiny-moe").model.layers[0].mlp
    _, live_weights, live_ids = plain.gate(hidden[0])
    chosen = torch.where(ids < 0, live_ids, ids)
    probabilities = torch.softmax(hidden[0] @ plain.gate.weight.T, -1).gather(1, chosen)
    weights = probabilities / probabilities.sum(-1, keepdim=True)
    expected = plain.experts(hidden[0], chosen, weights)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights[2], live_weights[2])
    direction = torch.randn_like(y)
    [ours] = torch.autograd.grad((y * direction).sum(), layer.gate.weight)
    [theirs] = torch.autograd.grad((expected * direction).sum(), plain.gate.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_rows_of_minus_one_are_the_live_routers():
    model, _ = converted()
    batch = padded("right")
    live, routing = recorded(model, batch)
    assert same(live, outcome(model, batch, torch.full_like(routing, -1)))
    mixed = routing.clone()
    mixed[:, ::2] = -1
    assert same(live, outcome(model, batch, mixed))


def test_layers_are_told_apart_by_their_index():
    """Negative control: the layers' ids exchanged give another forward."""
    model, _ = converted()
    batch = padded("right")
    live, routing = recorded(model, batch)
    assert not same(live, outcome(model, batch, routing.flip(2)))


def test_a_trace_counts_for_one_forward_only_and_must_fit():
    model, context = converted()
    batch = padded("right")
    live, routing = recorded(model, batch)
    outcome(model, batch, (routing + 1) % EXPERTS)
    assert context.routing_BSLK is None  # taken: a decoder that is called by itself must not find it
    assert same(live, outcome(model, batch)) and context.replayed_TLK is None
    with pytest.raises(ValueError, match=r"must end in \(2 MoE layers, top_k 2\)"):
        model(**batch, routing=routing[:, :, :1])


@pytest.mark.parametrize("moves", [False, True])
def test_replayed_rows_move_the_bias_only_if_asked(moves):
    balance = [{"kind": "loss_free", "update_rate": 0.1}]
    model, _ = converted(balance=balance, replay={"enabled": True, "moves_bias": moves})
    batch = padded("right")
    _, routing = recorded(model, batch)
    tokens = int(batch["attention_mask"].sum())
    layer = moe_layers(model)[0]
    layer.gate.balancing.counts_E.zero_()
    layer.load.take()
    routing[:, -3:] = -1
    live = int(batch["attention_mask"][:, -3:].sum())
    outcome(model, batch, routing)
    assert layer.load.take().counts_E.sum() == TOP_K * tokens  # the work is counted in any case
    assert layer.gate.balancing.counts_E.sum() == TOP_K * (tokens if moves else live)


def test_the_bias_never_enters_a_replayed_weight():
    plain, biased = converted()[0], converted(balance=[{"kind": "loss_free"}])[0]
    batch = padded("right")
    _, routing = recorded(plain, batch)
    for layer in moe_layers(biased):
        layer.gate.balancing.bias_E.copy_(torch.linspace(-1, 1, EXPERTS))
    assert same(outcome(plain, batch, routing), outcome(biased, batch, routing))


def test_one_recorded_trace_compares_two_backends_under_the_same_routing():
    fast, slow = converted()[0], converted(experts={"backend": "reference"})[0]
    batch = padded("right")
    live, routing = recorded(fast, batch)
    for ours, theirs in zip(outcome(slow, batch, routing), live, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_plain_transformers_and_incremental_decoding_record_what_we_record():
    plain = build_preset("tiny-moe").eval()
    ours = converted("tiny-moe")[0].eval()
    prompt = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(2))
    traces = []
    for model in (plain, ours):
        assert isinstance(model, Qwen3MoeForCausalLM)
        with torch.no_grad(), RoutingRecorder(model) as recorder:
            tokens = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        traces.append(joined(recorder.take(), 2))
    assert traces[0].shape == (2, 7 + 4, LAYERS, TOP_K)  # the last token is never routed
    assert torch.equal(*traces)
    with torch.no_grad(), RoutingRecorder(ours) as recorder:
        ours(tokens[:, :-1])
    whole = joined(recorder.take(), 2)
    assert (whole.sort(-1).values == traces[1].sort(-1).values).float().mean() > 0.98  # rounding may flip a tie


def test_recording_needs_moe_layers_and_equal_numbers_of_experts():
    with pytest.raises(ValueError, match="no MoE layer"):
        RoutingRecorder(build_preset("tiny-vl-dense"))
    model, _ = converted(router={"kind": "expert_choice", "allow_noncausal": True})
    with RoutingRecorder(model), pytest.raises(ValueError, match="only dropless top-k"):
        model(**padded("right"))


@pytest.mark.parametrize("apply_weight", ["before", "after"])
def test_the_weight_multiplies_what_experts_get_or_what_they_give(apply_weight):
    model, _ = converted("tiny-moe", experts={"apply_weight": apply_weight})
    layer = moe_layers(model)[0]
    hidden = torch.randn(1, 6, 64, requires_grad=True)
    plain = build_preset("tiny-moe").model.layers[0].mlp
    _, weights, ids = plain.gate(hidden[0])
    rows = []
    for token, k in itertools.product(range(6), range(TOP_K)):
        expert, weight, x = ids[token, k], weights[token, k], hidden[0, token]
        gate, up = (plain.experts.gate_up_proj[expert] @ (x * weight if apply_weight == "before" else x)).chunk(2)
        row = plain.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
        rows.append(row if apply_weight == "before" else row * weight)
    expected = torch.stack(rows).view(6, TOP_K, -1).sum(1)
    y = layer(hidden)[0]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(y)
    ours = torch.autograd.grad((y * direction).sum(), [hidden, *layer.parameters()])
    theirs = torch.autograd.grad((expected * direction).sum(), [hidden, *plain.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
