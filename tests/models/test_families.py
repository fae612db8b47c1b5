"""Every family with experts is transformers' own model once it is converted, or is refused by name."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from ds_moe.config.moe import MoEConfig, TopKRouting
from ds_moe.errors import UserError
from ds_moe.models.blocks import moe_blocks
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import FAMILIES, IMAGE_BLOCKS, REFUSED, TEXT_BLOCKS, UNREAD, expert_state, family_of
from ds_moe.models.router_forms import ROUTER_FORMS, form_of
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.in_block import GivenRouter
from ds_moe.moe.routers import ROUTERS
from tests.models import family_table
from tests.models.tiny_families import build

LOSS, GRADIENT = 1e-6, 5e-6  # fp32 sums in another order; gradients relative to each tensor's largest entry
ALL = sorted(TEXT_BLOCKS | IMAGE_BLOCKS)
# Family -> gradients that are 0 in theory, so that their largest entry is rounding itself: a bias of all keys does
# nothing to attention without rotation. They are held against the model's largest entry.
ZERO = {"aria": r"^model\.vision_tower\..*k_proj\.bias$"}
# One of each kind: DeepSeek's routers, biases and interleaved gates, no gate, no block, a clamp and a bias held by the
# block, bias on logits, a shared expert with a gate beside linear attention and images.
QUICK = {"glm4_moe", "gpt_oss", "nemotron_h", "gemma4", "minimax_m3_vl_text", "hy_v3", "kolibri1", "qwen3_5_moe"}


def slow_but(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def run(model, batch):
    """Loss and gradients by name."""
    torch.manual_seed(1)  # a router may draw random numbers
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def worst(ours, theirs):
    """(largest difference of a gradient relative to the tensor's largest entry, its name)."""
    scale = {name: grad.abs().max().clamp_min(1e-12) for name, grad in theirs.items()}
    return max(((ours[name] - grad).abs().max().item() / scale[name].item(), name) for name, grad in theirs.items())


@pytest.mark.parametrize("family", slow_but(ALL, QUICK))
def test_a_converted_model_has_the_loss_and_gradients_of_transformers(family, show):
    model, batch = build(family)
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager") if family != "step3p7" else None
    frozen = {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
    expected_loss, expected = run(plain, batch)
    convert(model, MoEConfig())
    assert {name for name, _ in plain.named_parameters()} - frozen <= {name for name, _ in model.named_parameters()}
    loss, gradients = run(model, batch)
    assert gradients.keys() == expected.keys()
    if family in FAMILIES:  # what a run freezes is what no loss reaches
        unreached = {name for name, _ in plain.named_parameters()} - frozen - expected.keys()
        never = re.compile(FAMILIES[family].frozen)
        assert {name for name, _ in plain.named_parameters() if never.search(name)} - frozen == unreached
    assert abs(loss - expected_loss) <= LOSS
    nothing = [name for name in expected if re.search(ZERO.get(family, r"(?!)"), name)]
    largest = max(grad.abs().max() for grad in expected.values())
    for name in nothing:
        theirs, ours = expected.pop(name), gradients.pop(name)
        assert max(theirs.abs().max(), ours.abs().max()) <= 1e-7 * largest
    assert bool(nothing) == (family in ZERO)
    difference, name = worst(gradients, expected)
    show(f"{family:24} loss {abs(loss - expected_loss):.1e}, gradients {difference:.1e} ({name})")
    assert difference <= GRADIENT


def changed(family, change, **keys):
    """How far the loss of a converted model is from transformers', once `change` has broken it."""
    model, batch = build(family, **keys)
    plain = copy.deepcopy(model)
    convert(model, MoEConfig())
    before = run(model, batch)[0]
    for block in moe_blocks(plain):
        change(model.get_submodule(block.path))
    expected = run(plain, batch)[0]
    assert abs(before - expected) <= LOSS
    return abs(run(model, batch)[0] - expected)


def without_shared_gate(block):
    block.shared_expert_gate.forward = lambda x_TD: torch.full_like(x_TD[:, :1], 50.0)


def without_selection_bias(block):
    block.gate.balancing = None


def without_expert_bias(block):
    torch.nn.init.zeros_(block.experts.down_proj_bias)


def without_clamp(block):
    block.experts.limit = block.experts.swiglu_limit = 1e9


def with_best_expert_of_a_group(block):
    block.gate.group_score = "max"


def with_bias_on_scores(block):
    block.gate.bias_on = "scores"


def without_scale(block):
    block.gate.route_scale = 1.0


GROUPS = {"n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("family", "change", "keys"),
    [
        ("qwen2_moe", without_shared_gate, {}),
        ("glm4_moe", without_selection_bias, {}),
        ("glm4_moe", without_scale, {"routed_scaling_factor": 2.5}),
        ("gpt_oss", without_expert_bias, {}),
        ("minimax_m3_vl_text", without_clamp, {"swiglu_limit": 0.05}),
        ("deepseek_v3", with_best_expert_of_a_group, GROUPS),
        ("kolibri1", with_bias_on_scores, {}),
    ],
)
def test_what_is_left_out_is_caught(family, change, keys):
    assert changed(family, change, **keys) > 10 * LOSS


@cache
def routers():
    """Class name -> (block of a tiny model, family), of every router that ours repeats."""
    found = {}
    for family in ALL:
        keys = GROUPS if family in ("axk2", "deepseek_v2") else {}
        keys = keys | ({"topk_method": "group_limited_greedy"} if family == "deepseek_v2" else {})
        block = moe_blocks(build(family, **keys)[0])[0]
        found.setdefault(type(block.router).__name__, (family, block))
    return found


def repeated(block):
    """Our router with the settings of the block's, and a function of hidden states that gives what the block's does."""
    form = form_of(block.router)
    ours = ROUTERS["topk"](block.router.weight, **TopKRouting().settings(form.native(block.router)))
    of_block = form.bias is not None and not form.bias.startswith(block.router_name)
    bias = block.module.get_buffer(form.bias) if of_block else None
    if form.bias is not None:
        parent, _, name = form.bias.rpartition(".")
        bias_E = getattr(block.module.get_submodule(parent), name)
        bias_E.data -= 0.6  # below 0, experts of groups that were not chosen may win where these are ranked by 0
        bias_E = bias_E.detach().float().flatten()
        ours.balancing = lambda ranked_TE: ranked_TE + bias_E
    return ours, lambda x_TD: block.router(x_TD, *([] if bias is None else [bias]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_routers_choose_as_the_families_do(dtype):
    """All tokens get the same experts in bf16 too, and in fp32 the same weights."""
    assert ROUTER_FORMS.keys() <= routers().keys()
    for name in sorted(ROUTER_FORMS):
        family, block = copy.deepcopy(routers()[name])
        for parameter in block.router.parameters():  # buffers keep their dtype, as DeepSpeed leaves them
            parameter.data = parameter.data.to(dtype)
        ours, theirs = repeated(block)
        x_TD = torch.randn(2048, block.router.weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            decision, (_, weight_TK, index_TK) = ours(x_TD), theirs(x_TD)
        top_k = index_TK.shape[1]
        ours_TK, order_TK = decision.expert_N.view(-1, top_k).sort(-1)
        assert torch.equal(ours_TK, index_TK.sort(-1).values), family
        weights_TK = decision.weight_N.view(-1, top_k).gather(1, order_TK)
        expected_TK = weight_TK.gather(1, index_TK.sort(-1).indices).float()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # some families round their weights to bf16
        torch.testing.assert_close(weights_TK, expected_TK, rtol=tolerance, atol=tolerance)


def test_what_a_router_of_the_family_s_own_cannot_do_is_refused_by_name():
    for keys, named in [
        ({"balance": [{"kind": "aux"}]}, "moe.balance aux"),
        ({"balance": [{"kind": "loss_free"}]}, "moe.balance loss_free"),
        ({"router": {"kind": "hash"}}, "moe.router.kind hash"),
        ({"router": {"top_k": 1}}, "moe.router.top_k 1"),
        ({"replay": {"enabled": True}}, "moe.replay.enabled true"),
    ]:
        with pytest.raises(
            UserError, match=f"{named} cannot be used: this model keeps its own router, GptOssTopKRouter"
        ):
            convert(build("gpt_oss")[0], MoEConfig.model_validate(keys))
    model, batch = build("gpt_oss")
    convert(model, MoEConfig())
    assert {type(layer.gate) for layer in moe_layers(model)} == {GivenRouter}
    with pytest.raises(ValueError, match="routing cannot be replayed: this model keeps its own router"):
        model(**batch, routing=torch.zeros(2, 32, 4, 2, dtype=torch.long))


@pytest.mark.parametrize("family", ["glm4_moe", "hy_v3"])  # the router holds the bias, or the block
def test_a_family_s_own_bias_moves_in_place(family):
    model, batch = build(family)
    plain = copy.deepcopy(model)
    convert(model, MoEConfig(balance=[{"kind": "loss_free", "update_rate": 0.01}]))
    names = [name for name, _ in plain.named_buffers() if name.endswith("e_score_correction_bias")]
    assert names and not [name for name, _ in model.named_buffers() if name.endswith("balancing.bias_E")]
    assert abs(run(model, batch)[0] - run(plain, batch)[0]) <= LOSS  # the bias of the family selects
    for layer in moe_layers(model):
        layer.gate.balancing.update()
    for name in names:
        before, after = plain.get_buffer(name), model.get_buffer(name)
        assert after.dtype == torch.float32 and not torch.equal(before, after)
        plain.get_buffer(name).copy_(after)
    assert abs(run(model, batch)[0] - run(plain, batch)[0]) <= LOSS


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "aria_text", "gemma4_text"])
def test_each_rank_keeps_its_own_rows_of_every_weight(family):
    whole, _ = build(family)
    for rank in range(4):
        model, _ = build(family)
        convert(model, MoEConfig(ep_size=4), ExpertParallel(size=4, rank=rank))
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name)
            assert torch.equal(parameter, expected[2 * rank : 2 * rank + 2] if expert_state(name) else expected), name


def test_loss_free_balancing_counts_the_experts_of_all_ranks():
    model, _ = build("glm4_moe")
    convert(model, MoEConfig(ep_size=2, balance=[{"kind": "loss_free"}]), ExpertParallel(size=2, rank=1))
    for layer in moe_layers(model):
        assert layer.gate.balancing.counts_E.shape == (8,) and len(layer.gate_up_proj) == 4


def with_experts():
    """Every type of the registry whose modeling file has experts and that is a causal language model or sees images."""
    trained = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    signs = re.compile(
        r"use_experts_implementation|^class \w*(Experts|SparseMo[eE]\w*|MoE\w*|Moe\w*Block|SparseMLP)\b", re.M
    )
    root = Path(transformers.__file__).parent / "models"
    for model_type in sorted(trained & CONFIG_MAPPING_NAMES.keys()):
        package = model_type_to_module_name(model_type)
        files = (root / package).glob("modeling_*.py")
        if any(signs.search(file.read_text()) for file in files):
            yield model_type


def test_every_family_with_experts_is_supported_or_refused_by_name():
    """A release of transformers that brings another one fails here."""
    found = list(with_experts())
    assert len(found) >= 60
    assert [name for name in found if name not in TEXT_BLOCKS | IMAGE_BLOCKS | REFUSED.keys()] == []
    assert not (TEXT_BLOCKS | IMAGE_BLOCKS) & REFUSED.keys()
    assert len(TEXT_BLOCKS) >= 50 and len(IMAGE_BLOCKS) >= 12
    assert {name for name in TEXT_BLOCKS | IMAGE_BLOCKS if name not in FAMILIES} == UNREAD.keys()


@pytest.mark.parametrize("family", ["jetmoe", "llama4_text", "deepseek_v4", "longcat_flash"])
def test_a_refusal_is_one_line_with_the_reason(family):
    model, _ = build(family, **({"zero_expert_num": 4} if family == "longcat_flash" else {}))
    with pytest.raises(UserError, match=f"the experts of a {family} model cannot be trained: ") as caught:
        convert(model, MoEConfig())
    assert "\n" not in str(caught.value)


def test_the_table_of_families_names_every_one():
    """That of docs/models.md; what it says of each is compared by the next test."""
    named = re.findall(r"^\| `(\w[\w-]*)` \|", family_table.written(family_table.PAGE.read_text()), re.M)
    assert named == ["model_type", *sorted(TEXT_BLOCKS | IMAGE_BLOCKS), *sorted(REFUSED)]


@pytest.mark.slow
def test_the_table_of_families_says_what_they_can_do():
    assert family_table.written(family_table.PAGE.read_text()) == family_table.table()


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mistral3", "because the rows of an image's tokens end by tokens of their own"),
        ("llama4", "because its block multiplies every token with every expert"),
        ("llama", "not supported; supported: "),
    ],
)
def test_a_type_that_no_run_takes_is_one_line_with_the_reason(family, why):
    with pytest.raises(UserError, match="supported: .*qwen3_5_moe") as caught:
        family_of(CONFIG_MAPPING[family]())
    assert why in str(caught.value) and "\n" not in str(caught.value)
