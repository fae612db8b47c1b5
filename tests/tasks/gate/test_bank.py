"""ds_moe/tasks/gate/bank.py: the mixture is PEFT's, and a loop over the adapters is what it is a faster form of."""

import peft
import pytest
import torch
import torch.nn.functional as F

from ds_moe.models.head import at_labels
from ds_moe.tasks.gate.bank import Bank, BankedLinear, Gates, install
from ds_moe.tasks.gate.placement import Update
from tests.tasks.gate.lora_folders import ADAPTERS, DECODER, base, difference, logits, of_peft, read, write

K, B, S, L = 4, 3, 7, 2
Q0, O1, UP1 = f"{DECODER}.0.self_attn.q_proj", f"{DECODER}.1.self_attn.o_proj", f"{DECODER}.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def banked(folder):
    model = base()
    return model, install(model, read(folder))


@pytest.fixture
def ids_BS():
    return torch.randint(5, 200, (B, S), generator=torch.Generator().manual_seed(0))


def one_hot(index: int) -> torch.Tensor:
    return F.one_hot(torch.full((B,), index), K).float()


@pytest.mark.parametrize("index", range(K))
def test_one_hot_is_that_adapter(folder, banked, ids_BS, index):
    model, bank = banked
    plain = logits(model, ids_BS)
    bank.gates.weights = one_hot(index)
    ours = logits(model, ids_BS)
    assert bank.names == list(ADAPTERS) and difference(ours, plain) > 1e-3
    assert difference(ours, of_peft(folder / bank.names[index], ids_BS)) <= 1e-6


def test_swapped_owner_is_noticed(folder, banked, ids_BS):
    model, bank = banked
    owner_R = bank.layers[Q0].owner_R
    assert owner_R.tolist() == [0] * 4 + [1] * 2
    owner_R[3:5] = owner_R[3:5].flip(0).clone()
    bank.gates.weights = one_hot(0)
    assert difference(logits(model, ids_BS), of_peft(folder / "mail", ids_BS)) > 1e-4


def test_rows_of_different_adapters_are_peft_mixed_inference(folder, banked, ids_BS):
    model, bank = banked
    theirs = peft.PeftModel.from_pretrained(base(), folder / "mail", "mail")
    for name in list(ADAPTERS)[1:]:
        theirs.load_adapter(folder / name, name)
    chosen = [3, 1, 2]
    bank.gates.weights = F.one_hot(torch.tensor(chosen), K).float()
    expected = logits(theirs.eval(), ids_BS, adapter_names=[bank.names[index] for index in chosen])
    assert difference(logits(model, ids_BS), expected) <= 1e-6


def test_without_gates_it_is_the_base(banked, ids_BS):
    model, bank = banked
    plain = base()
    assert torch.equal(logits(model, ids_BS), logits(plain, ids_BS))
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() - theirs.keys() == {f"{name}.lora_{side}" for name in bank.layers for side in "AB"}
    linear = torch.nn.Linear(2, 3)
    made = BankedLinear(linear, {0: Update(torch.randn(1, 2), torch.randn(3, 1), 1.0)}, 0, Gates())
    assert made.weight is linear.weight and made.bias is linear.bias


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("per", ["example", "layer", "token"])
def test_tokens_in_one_dimension_have_the_gates_of_their_rows(per, packed):
    """As blocks with experts call what else is in them; a layer of B * S examples would take other gates, or none."""
    torch.manual_seed(0)
    gates = Gates(per=per)
    parts = {0: Update(torch.randn(2, 5), torch.randn(6, 2), 1.5), 2: Update(torch.randn(3, 5), torch.randn(6, 3), 0.5)}
    layer, x_BSI = BankedLinear(torch.nn.Linear(5, 6), parts, 1, gates), torch.randn(B, S, 5)
    weights, sequence_S = gates_of(per), None
    if packed:
        x_BSI, sequence_S = x_BSI.view(1, B * S, 5), torch.arange(B).repeat_interleave(S)
        weights = weights.view(1, B * S, K) if per == "token" else weights
    gates.choose(weights, sequence_S)
    assert torch.equal(layer(x_BSI.flatten(0, 1)), layer(x_BSI).flatten(0, 1))


def gates_of(per: str) -> torch.Tensor:
    shape = {"example": (B, K), "layer": (B, L, K), "token": (B, S, K)}[per]
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()


def of_layer_1(weights: torch.Tensor, per: str) -> torch.Tensor:
    """(B, S, K)"""
    if per == "layer":
        weights = weights[:, 1]
    return weights if per == "token" else weights.unsqueeze(1).expand(B, S, K)


@pytest.mark.parametrize("per", ["example", "layer", "token"])
@pytest.mark.parametrize("module", [O1, UP1])  # three adapters of other ranks and scalings; one
def test_a_layer_is_the_loop_over_its_adapters(folder, banked, per, module):
    model, bank = banked
    layer = bank.layers[module]
    bank.train_adapters(True)
    x = torch.randn(B, S, layer.in_features, generator=torch.Generator().manual_seed(6))
    x_ours, x_naive, g_ours, g_naive = x.clone().requires_grad_(), x.requires_grad_(), gates_of(per), gates_of(per)

    expected, pairs = F.linear(x_naive, layer.weight, layer.bias), []
    for index, name in enumerate(ADAPTERS):
        wrapped = peft.PeftModel.from_pretrained(base(), folder / name).base_model.model.get_submodule(module)
        if hasattr(wrapped, "scaling"):
            pairs.append([wrapped.get_parameter(f"lora_{side}.default.weight").requires_grad_() for side in "AB"])
            delta = F.linear(F.linear(x_naive, pairs[-1][0]), pairs[-1][1]) * wrapped.scaling["default"]
            expected = expected + of_layer_1(g_naive, per)[..., index, None] * delta

    bank.gates.weights, bank.gates.per = g_ours, per
    y = layer(x_ours)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    (y * weigh).sum().backward()
    (expected * weigh).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x_ours.grad, x_naive.grad, **close)
    torch.testing.assert_close(g_ours.grad, g_naive.grad, **close)
    torch.testing.assert_close(layer.lora_A.grad, torch.cat([A.grad for A, _ in pairs]), **close)
    torch.testing.assert_close(layer.lora_B.grad, torch.cat([B.grad for _, B in pairs], 1), **close)
    if per == "example":  # (B, in), as a sequence of one token
        torch.testing.assert_close(layer(x_ours[:, 2]), y[:, 2], rtol=1e-5, atol=1e-6)


def test_a_token_at_a_time_with_a_cache(banked, ids_BS):
    model, bank = banked
    weights = gates_of("token").detach()
    bank.gates.weights, bank.gates.per = weights, "token"
    whole, cache, steps = logits(model, ids_BS), None, []
    for token in range(S):
        bank.gates.weights = weights[:, token : token + 1]
        with torch.no_grad():
            out = model(input_ids=ids_BS[:, token : token + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_output_is_kept(banked):
    model, bank = banked
    model.requires_grad_(False)
    layer, kept = bank.layers[O1], []
    bank.gates.weights = gates_of("example")
    x = torch.randn(B, S, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {tensor.data_ptr(): tensor.numel() for tensor in kept if tensor.data_ptr() not in weights}
    R = len(layer.owner_R)
    assert sum(kept.values()) <= B * S * R + B * R + 2 * R  # A x; g * scale; scale and owner


def gradients(model, bank: Bank, ids_BS) -> list[torch.Tensor]:
    bank.gates.weights = gates_of("layer")
    bank.gates.per = "layer"
    wanted = [bank.gates.weights, *bank.parameters()]
    loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    return list(torch.autograd.grad(loss, wanted))


def test_gradient_checkpointing(banked, ids_BS):
    model, bank = banked
    bank.train_adapters(True)
    model.train()
    plain = gradients(model, bank, ids_BS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for ours, expected in zip(gradients(model, bank, ids_BS), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
    bank.train_adapters(False)
    assert not any(parameter.requires_grad for parameter in bank.parameters())


def test_a_bf16_base(banked, ids_BS):
    model, bank = banked
    weights = gates_of("example")
    bank.gates.weights = weights
    expected = logits(model, ids_BS)
    scale_R = bank.layers[Q0].scale_R.clone()
    model.bfloat16()
    assert torch.equal(bank.layers[Q0].scale_R, scale_R) and scale_R[4] == 16 / 2**0.5
    out = model(input_ids=ids_BS, use_cache=False).logits
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and weights.grad.dtype == torch.float32 and weights.grad.abs().min() > 0
    assert difference(out.float(), expected) < 0.05 * expected.abs().max()


@pytest.mark.parametrize("per", ["example", "layer", "token", "example, packed"])
def test_an_output_layer_with_adapters_where_labels_are(per, ids_BS):
    """Loss and gradients are those of logits of all tokens, whose rows have gates of their own."""
    torch.manual_seed(5)
    model, per, packed = base(), per.partition(",")[0], "packed" in per
    gates, (out, width) = Gates(per=per), model.lm_head.weight.shape
    parts = {owner: Update(torch.randn(2, width), 0.1 * torch.randn(out, 2), 0.5) for owner in (0, 2)}
    model.lm_head = head = BankedLinear(model.lm_head, parts, 1, gates)
    trained = {"lora_A": head.lora_A.requires_grad_(), "lora_B": head.lora_B.requires_grad_(), "weight": head.weight}
    shape = {"example": (B, K), "layer": (B, L, K), "token": (B, S, K)}[per]
    weights = torch.rand(shape, requires_grad=True)
    labels = torch.where(torch.rand(B, S) < 0.5, ids_BS, -100)
    if packed:
        ids_BS, labels = ids_BS.reshape(1, -1), labels.reshape(1, -1)
    gates.choose(weights, torch.arange(B).repeat_interleave(S) if packed else None)
    found = []
    for loss in (
        model(input_ids=ids_BS, labels=labels, use_cache=False, num_items_in_batch=10).loss,
        at_labels(model, {"input_ids": ids_BS}, labels, num_items=10).loss,
    ):
        gradients = torch.autograd.grad(loss, [weights, *trained.values()], retain_graph=True)
        found.append((loss.item(), gradients))
    (expected, theirs), (loss, ours) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0 and difference(one, other) <= 5e-6 * other.abs().max()
