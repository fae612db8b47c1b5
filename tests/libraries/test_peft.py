"""What PEFT does that a reader of its manual would not expect. A test that fails here means that a guard may go.

`docs/libraries.md` lists them all.
"""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

FUSED = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Three experts of width 5, as transformers fuses them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 10, 4)), nn.Parameter(torch.randn(3, 4, 5))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head, self.experts = nn.Linear(4, 4), nn.Linear(4, 4), Experts()

    def forward(self, x):
        return self.head(self.a(x))


def with_lora(**options):
    return peft.get_peft_model(
        Model(), peft.LoraConfig(**{"r": 2, "target_modules": ["a"], **options})
    ).base_model.model


# --- experts


def test_names_of_linear_layers_pass_over_fused_experts():
    """Guard: `_check_targets` of models/lora.py, and `lora.experts`, which updates them by moe/expert_lora.py."""
    model = with_lora(target_modules=["a", "gate_up_proj", "down_proj"])
    assert [name for name, _ in model.named_parameters() if "lora_A" in name] == ["a.lora_A.default.weight"]


@pytest.mark.parametrize("order", [FUSED, FUSED[::-1]])
def test_wrappers_of_parameters_lie_one_in_the_other_the_first_parameter_inside(order):
    """Relied on: `WRAPPED` of models/lora.py. The order in which they are targeted does not matter."""
    model = with_lora(target_modules=[], target_parameters=order)
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters() if "lora_A" in name}
    assert shapes == {
        "experts.base_layer.lora_A.default.weight": (6, 4),
        "experts.lora_A.default.weight": (6, 5),
    }


def test_a_holds_expert_after_expert_and_b_has_the_experts_innermost():
    """Relied on: `peft_value` of models/lora.py."""
    wrapper = with_lora(target_modules=[], target_parameters=FUSED[:1], lora_alpha=2).experts
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    nn.init.normal_(b)
    expected = torch.stack([b[:, expert::3] @ a[2 * expert : 2 * expert + 2] for expert in range(3)])
    torch.testing.assert_close(wrapper.get_delta_weight("default"), expected)


def test_wrappers_of_parameters_refuse_dropout():
    """Guard: `write_adapter` of export/lora.py writes none."""
    with pytest.raises(ValueError, match="lora_dropout"):
        with_lora(target_modules=[], target_parameters=FUSED, lora_dropout=0.1)


# --- configs


def test_an_alpha_for_no_layer_is_passed_over_with_a_warning():
    """Guard: `updates` of tasks/gate/placement.py."""
    with pytest.warns(RuntimeWarning, match="alpha_pattern.*ignored"):
        assert with_lora(lora_alpha=8, alpha_pattern={"nothing": 99}).a.scaling == {"default": 4.0}


def test_rslora_divides_by_the_root_of_the_rank():
    """Relied on: `scaling` of models/lora.py; tasks/gate/placement.py asks PEFT itself."""
    assert with_lora(r=4, lora_alpha=8, use_rslora=True).a.scaling == {"default": 4.0}


def test_a_key_that_a_config_file_has_and_peft_does_not_know_is_passed_over_with_a_warning(tmp_path):
    """Guard: `_check_values` of tasks/gate/adapters.py."""
    peft.LoraConfig(target_modules=["a"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_other": True}))
    with pytest.warns(UserWarning, match="use_other.*ignored"):
        peft.LoraConfig.from_pretrained(tmp_path)


def test_values_are_used_before_their_types_are_looked_at():
    """Guard: `updates` of tasks/gate/placement.py and `_read_config` of tasks/gate/adapters.py catch any exception."""
    assert peft.LoraConfig(r="four").r == "four"
    with pytest.raises(TypeError):
        with_lora(r="four")


def test_pissa_rewrites_the_base_and_plain_initialisations_do_not():
    """Guard: `_PLAIN_INIT` of tasks/gate/adapters.py."""
    for init, kept in [("pissa", False), (True, True), (False, True), ("gaussian", True), ("orthogonal", True)]:
        model = Model()
        before = model.a.weight.clone()
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["a"], r=2, init_lora_weights=init), model)
        assert torch.equal(model.a.base_layer.weight, before) == kept, init


# --- adapters


def test_an_adapter_file_holds_a_module_of_modules_to_save_whole(tmp_path):
    """Guard: `_compare_with_base` of tasks/gate/placement.py."""
    config = peft.LoraConfig(target_modules=["a"], modules_to_save=["head"])
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held["base_model.model.head.weight"].shape == (4, 4)


def test_adapters_row_by_row_are_refused_in_training():
    """Guard: `BankedLinear` of tasks/gate/bank.py, which a gate trains through."""
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["a"])).train()
    with pytest.raises(ValueError, match="training mode"):
        model(torch.ones(1, 4), adapter_names=["default"])


def test_injected_adapters_keep_the_dtype_of_the_base_those_of_a_peft_model_are_fp32():
    """Relied on: `add_lora` of models/lora.py injects, so that a bf16 run trains bf16 updates with fp32 masters."""
    config, model = peft.LoraConfig(target_modules=["a"]), Model().bfloat16()
    assert peft.get_peft_model(Model().bfloat16(), config).base_model.model.a.lora_A.default.weight.dtype == torch.float
    assert peft.inject_adapter_in_model(config, model).a.lora_A.default.weight.dtype == torch.bfloat16
