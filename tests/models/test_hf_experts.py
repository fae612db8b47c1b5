"""transformers' own models on our kernels."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_moe.models.hf_experts import experts_forward, register
from ds_moe.models.presets import build_preset


@pytest.fixture(autouse=True)
def registered():
    register()


def run(model, ids, implementation):
    """Loss, logits and gradients."""
    model.set_experts_implementation(implementation)
    model.zero_grad(set_to_none=True)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return [output.loss, output.logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-vl-moe"])
def test_a_plain_model_gives_the_loss_and_gradients_of_its_eager_experts(preset):
    model = build_preset(preset).train()
    ids = torch.randint(0, 200, (3, 17))
    calls = []
    hooks = [
        m.register_forward_hook(lambda *_: calls.append(1)) for n, m in model.named_modules() if n.endswith("experts")
    ]
    expected, ours = run(model, ids, "eager"), run(model, ids, "ds_moe")
    assert hooks and len(calls) == 2 * len(hooks)
    for one, other in zip(ours, expected, strict=True):
        if other is None:
            assert one is None  # the vision tower saw no image
            continue
        # fp32, sums in another order; relative to the largest entry of each tensor
        assert (one - other).abs().max() <= 5e-6 * other.abs().max().clamp_min(1e-6)


def test_autocast_computes_in_the_weights_dtype():
    """Hidden states come in fp32 out of a norm, weights are bf16."""
    model = build_preset("tiny-moe").to(torch.bfloat16).train()
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    x = torch.randn(6, experts.gate_up_proj.shape[2], requires_grad=True)
    index, weights = torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts_forward(experts, x, index, weights)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == torch.float32
    assert experts.down_proj.grad.dtype == torch.bfloat16 and experts.down_proj.grad.abs().sum() > 0


def test_a_model_is_built_and_reloaded_with_it(tmp_path):
    model = build_preset("tiny-moe")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="ds_moe")
    ids = torch.randint(0, 200, (1, 9))
    assert loaded.config._experts_implementation == "ds_moe"
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert loaded.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 13)


def gelu(experts):
    experts.act_fn = torch.nn.GELU()


@pytest.mark.parametrize(
    ("model_type", "change", "reason"),
    [
        ("qwen3_moe", gelu, "Qwen3MoeExperts: their activation is GELU; take grouped_mm"),
        # An activation that is SiLU, behind a gate that clamps what it is given: the loss would be another.
        ("deepseek_v4", None, "DeepseekV4Experts: their gate is a function of the family's own; take grouped_mm"),
        ("gpt_oss", None, "GptOssExperts: they have biases; take grouped_mm"),
        ("nemotron_h", None, "NemotronHExperts: they have no gate; take grouped_mm"),
    ],
)
def test_experts_of_another_form_are_refused(model_type, change, reason):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    if change is not None:
        change(experts)
    with pytest.raises(ValueError, match=reason):
        experts_forward(experts, torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
