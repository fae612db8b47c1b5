"""ds_moe/models/lora.py: what a model with low-rank updates needs beside them."""

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch

from ds_moe.checkpoint.files import FORMAT, Reader
from ds_moe.checkpoint.fit import model_misfits
from ds_moe.config.moe import MoEConfig
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import write_run
from ds_moe.config.sections import LoRAConfig, ModelConfig
from ds_moe.errors import UserError
from ds_moe.export.lora import MergedReader, write_adapter
from ds_moe.models.blocks import moe_blocks
from ds_moe.models.convert import convert
from ds_moe.models.load import load_model
from ds_moe.models.lora import add_lora, peft_config, peft_value, update_of
from ds_moe.models.presets import build_preset
from ds_moe.weights.files import write_tensors
from tests.distributed.lora_ranks import from_peft
from tests.models.test_families import GRADIENT, LOSS, run, slow_but, worst
from tests.models.tiny_families import build

PLAIN_SWIGLU = ["deepseek_v3", "glm4_moe", "glm4v_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_next"]


@pytest.mark.parametrize("trained", [{"experts": True}, {"train_router": True}], ids=["experts", "routers"])
def test_the_first_layer_s_experts_get_an_input_that_needs_a_gradient(trained):
    """Where it does not, and nothing before them is trained, ZeRO-3 partitions them before their gradients arrive
    (`tests/libraries/test_deepspeed.py`)."""
    model = build_preset("tiny-vl-moe").train()
    add_lora(model, LoRAConfig(rank=8, targets=[], **trained), seed=0)
    needed = []
    block = moe_blocks(model)[0].module
    block.register_forward_pre_hook(lambda _, args: needed.append(args[0].requires_grad))
    model(input_ids=torch.arange(5).unsqueeze(0), use_cache=False).logits.sum().backward()
    assert needed == [True] and not any(one.requires_grad for one in model.model.visual.parameters())


def of_peft(plain, config):
    """A model under PEFT, with updates of its experts that are not zero, and names of its parameters without PEFT's."""
    experts = ".".join(moe_blocks(plain)[0].experts_path.split(".")[-2:])
    targets = [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    model = peft.get_peft_model(plain, peft_config(config, [], target_parameters=targets))
    torch.manual_seed(1)
    trained = {name.replace(".default", ""): one for name, one in model.named_parameters() if one.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.05)
    return model, trained


@pytest.mark.parametrize("family", slow_but(PLAIN_SWIGLU, {"qwen2_moe"}))
def test_experts_of_a_block_that_stays_are_updated_as_under_peft(family, show):
    config = LoRAConfig(rank=8, alpha=24, targets=[], experts=True)
    model, batch = build(family)
    plain = copy.deepcopy(model)
    add_lora(model, config, seed=0)
    convert(model, MoEConfig())
    theirs, values = of_peft(plain, config)
    updates = {name: update_of(name) for name, one in model.named_parameters() if one.requires_grad}
    assert {update.peft for update in updates.values()} == values.keys()
    for name, update in updates.items():
        parameter = model.get_parameter(name)
        parameter.data.copy_(from_peft(update, values[update.peft].detach(), len(parameter)))
        assert torch.equal(peft_value(update, parameter), values[update.peft])
    expected_loss, _ = run(theirs, batch)
    loss, gradients = run(model, batch)
    expected = {name: from_peft(one, values[one.peft].grad, len(gradients[name])) for name, one in updates.items()}
    difference, name = worst(gradients, expected)
    show(f"{family:24} loss {abs(loss - expected_loss):.1e}, gradients {difference:.1e} ({name})")
    assert gradients.keys() == expected.keys() and abs(loss - expected_loss) <= LOSS and difference <= GRADIENT
    model.get_parameter(name).data.copy_(model.get_parameter(name).roll(1, 0))  # negative control: other experts'
    assert abs(run(model, batch)[0] - expected_loss) > LOSS


NO_SWIGLU = {"gpt_oss": "they have biases", "nemotron_h": "they have no gate", "minimax_m3_vl_text": "their gate"}


@pytest.mark.parametrize(("family", "reason"), NO_SWIGLU.items())
def test_experts_that_are_no_plain_swiglu_get_no_updates(family, reason):
    with pytest.raises(UserError, match=f"lora.experts cannot update the experts of {family} models: {reason}"):
        add_lora(build(family)[0], LoRAConfig(rank=8, targets=[], experts=True), seed=0)


def test_a_run_s_attention_is_not_needed_to_merge_its_updates():
    model = ModelConfig(preset="tiny-moe", attention="flash_attention_2")
    with pytest.raises(UserError, match="model.attention flash_attention_2"):
        load_model(model, torch.float32)
    config = SimpleNamespace(model=model, train=SimpleNamespace(seed=3))
    merged = MergedReader(SimpleNamespace(tensors={}), config, LoRAConfig(), torch.float32)
    head = build_preset("tiny-moe", 3).get_parameter("lm_head.weight")
    assert torch.equal(merged.read("weight/lm_head.weight"), head)


def test_a_convolution_that_is_called_like_a_target_is_left_as_it_is():
    """`proj` is a linear layer of the tower's attention, and the convolution over patches, whose updates no export
    could merge."""
    model = build_preset("tiny-vl-moe")
    add_lora(model, LoRAConfig(rank=8, targets=["proj"]), seed=0)
    updated = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(updated) == 2 * len(model.model.visual.blocks) and all(".attn.proj.lora_" in name for name in updated)


@pytest.fixture
def of_an_earlier_build(tmp_path):
    """(a checkpoint, its run's settings) whose lora.targets meant the convolution over patches too."""
    lora, model = LoRAConfig(rank=8, targets=["proj"]), build_preset("tiny-vl-moe")
    peft.inject_adapter_in_model(peft_config(lora, lora.targets), model, "default")
    trained = {f"weight/{name}": one.detach() for name, one in model.named_parameters() if ".lora_" in name}
    write_tensors(tmp_path / "a.safetensors", trained)
    pieces = {key: [["a.safetensors", 0, len(one)]] for key, one in trained.items()}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": {}, "tensors": pieces}))
    (tmp_path / "state.json").write_text(json.dumps({"base": {}}))
    run = RunConfig(
        task="sft",
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        train={"output_dir": "run", "global_batch_size": 2, "steps": 5},
        lora=lora,
        deepspeed="zero3",
    )
    write_run(run, tmp_path)
    return tmp_path, run


def test_an_adapter_of_an_earlier_build_keeps_its_update_of_a_convolution(of_an_earlier_build, tmp_path):
    checkpoint, _ = of_an_earlier_build
    written = write_adapter(checkpoint, tmp_path / "out", torch.float32, build_preset("tiny-vl-moe"))
    loaded = peft.PeftModel.from_pretrained(build_preset("tiny-vl-moe"), tmp_path / "out")
    updates = [one for name, one in loaded.named_parameters() if ".lora_" in name]
    assert sum(one.numel() for one in updates) == written


def test_other_uses_of_that_checkpoint_are_refused(of_an_earlier_build):
    checkpoint, run = of_an_earlier_build
    text = "lora.targets updates model.visual.patch_embed.proj, a convolution.*earlier build.*--adapter"
    with pytest.raises(UserError, match=text):
        MergedReader(Reader(checkpoint), run, run.lora, torch.float32)
    model = build_preset("tiny-vl-moe")
    add_lora(model, run.lora, seed=0)
    [problem] = model_misfits(checkpoint, model, 1, {})
    assert "lora.targets no longer means the convolution model.visual.patch_embed.proj (choose another" in problem


def test_an_update_of_a_tied_output_layer_is_lost_in_no_export(tmp_path):
    """The base has one weight for two, and a merged model would have to hold both."""
    config = build_preset("tiny-moe").config
    config.tie_word_embeddings = True
    model = type(build_preset("tiny-moe"))(config)
    model.save_pretrained(tmp_path)
    lora = LoRAConfig(rank=8, targets=["q_proj", "lm_head"])
    add_lora(model, lora, seed=0)
    trained = {f"weight/{name}": [] for name, one in model.named_parameters() if one.requires_grad}
    assert any("lm_head.lora_A" in key for key in trained)
    of_run = SimpleNamespace(model=ModelConfig(path=str(tmp_path)), train=SimpleNamespace(seed=0))
    with pytest.raises(UserError, match=r"^lora.targets updates lm_head.weight, which model.path has no"):
        MergedReader(SimpleNamespace(tensors=trained), of_run, lora, torch.float32)
