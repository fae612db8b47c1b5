"""Adapters as trainers leave them: copies of the base beside the updates, other prefixes, patterns, single experts."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moe.config.sections import ModelConfig
from ds_moe.models.load import load_model
from ds_moe.models.presets import build_preset
from ds_moe.tasks.gate.adapters import CONFIG, WEIGHTS, read_adapter
from ds_moe.tasks.gate.bank import install
from ds_moe.tasks.gate.placement import updates
from tests.hostile.limits import refusal
from tests.tasks.gate.lora_folders import ADAPTERS, DECODER, base, difference, logits, of_peft, write

IDS_BS = torch.arange(40, 54).view(2, 7)
ROOT = "base_model.model."
Q0 = f"{DECODER}.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def weights():
    return base().state_dict()


@pytest.fixture
def adapter(folder, tmp_path):
    """adapter(name, ...): a copy with other config values and tensors; a tensor None is left out."""

    def copied(name: str = "mail", config: dict | None = None, tensors: dict | None = None) -> Path:
        out = Path(shutil.copytree(folder / name, tmp_path / name))
        (out / CONFIG).write_text(json.dumps(json.loads((out / CONFIG).read_text()) | (config or {})))
        kept = load_file(folder / name / WEIGHTS) | (tensors or {})
        save_file({key: tensor.contiguous() for key, tensor in kept.items() if tensor is not None}, out / WEIGHTS)
        return out

    return copied


def banked(*paths):
    """A model with these adapters, its bank, and what the first of them alone adds."""
    model = base()
    bank = install(model, [read_adapter(path.name, path) for path in paths])
    bank.gates.weights = torch.eye(len(paths))[[0, 0]]
    return model, bank


def copies(weights, *names):
    return {f"{ROOT}{name}.weight": weights[f"{name}.weight"].clone() for name in names}


# --- what stands beside the updates


def test_a_saved_head_that_was_not_trained_is_passed_over(adapter, folder, tmp_path):
    """PEFT's own file for `modules_to_save`, which holds the head whole."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path / "head")
    assert any("lm_head" in key for key in load_file(tmp_path / "head" / WEIGHTS))
    model, bank = banked(tmp_path / "head", folder / "mail")
    assert difference(logits(model, IDS_BS), of_peft(tmp_path / "head", IDS_BS)) <= 1e-6
    assert not any(one.others for one in bank.adapters)  # no head of gigabytes is kept during the run
    bank.export(tmp_path / "out")
    again, _ = banked(tmp_path / "out" / "head", tmp_path / "out" / "mail")
    assert torch.equal(logits(again, IDS_BS), logits(model, IDS_BS))
    assert difference(logits(model, IDS_BS), of_peft(tmp_path / "out" / "head", IDS_BS)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_base_are_passed_over(adapter, folder, weights, dtype):
    embeddings = "model.language_model.embed_tokens"
    others = copies(weights, "lm_head", embeddings, f"{DECODER}.0.input_layernorm")
    others |= {
        f"{ROOT}{Q0}.base_layer.weight": weights[f"{Q0}.weight"],
        f"{ROOT}lm_head.original_module.weight": weights["lm_head.weight"],
        f"{ROOT}lm_head.modules_to_save.default.weight": weights["lm_head.weight"],
        f"{ROOT}embed_tokens.weight": weights[f"{embeddings}.weight"],
    }
    path = adapter(tensors={key: value.to(dtype).clone() for key, value in others.items()})
    model, _ = banked(path, folder / "maps")
    assert difference(logits(model, IDS_BS), of_peft(folder / "mail", IDS_BS)) <= 1e-6


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_trained_head_is_refused_with_the_reason(adapter, weights, config):
    trained = copies(weights, "lm_head")
    trained[f"{ROOT}lm_head.weight"][3, 5] += 0.01
    path = adapter(config=config, tensors=trained)
    says = "lm_head.weight differs from the model's own: the adapter trained it beside its low-rank updates"
    refusal(lambda: updates(read_adapter("mail", path), base()), path / WEIGHTS, says)


def test_a_base_that_is_still_in_its_files_is_compared_by_them(adapter, weights, tmp_path):
    base().save_pretrained(tmp_path / "base")
    unread = load_model(ModelConfig(path=str(tmp_path / "base")), torch.float32, unread=True)
    same = copies(weights, "lm_head", f"{DECODER}.0.input_layernorm")
    assert updates(read_adapter("mail", adapter("mail", tensors=same)), unread).keys()
    same[f"{ROOT}lm_head.weight"][3, 5] += 0.01
    path = adapter("maps", tensors=same)
    refusal(lambda: updates(read_adapter("maps", path), unread), path / WEIGHTS, "differs from the model's own")


# --- prefixes


def renamed(path: Path, old: str, new: str) -> Path:
    tensors = load_file(path / WEIGHTS)
    save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, path / WEIGHTS)
    written = (path / CONFIG).read_text()
    (path / CONFIG).write_text(written.replace(old, new).replace(old.replace(".", r"\\."), new.replace(".", r"\\.")))
    return path


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("there", ["model.layers", "language_model.model.layers", "base_model.model.layers", "layers"])
def test_a_layer_behind_another_prefix_is_the_same_layer(adapter, folder, tmp_path, name, there):
    """Scaling, patterns and regular expressions of the config are for the names of the file."""
    path = renamed(adapter(name), "model.language_model.layers", there)
    with pytest.warns(UserWarning, match=f"{path}: {there}.* is read as {DECODER}"):
        model, bank = banked(path, folder / ("maps" if name == "mail" else "mail"))
    assert difference(logits(model, IDS_BS), of_peft(folder / name, IDS_BS)) <= 1e-6
    bank.export(tmp_path / "out")
    for file in (CONFIG, WEIGHTS):
        assert load_or_read(tmp_path / "out" / name / file) == load_or_read(path / file)


def load_or_read(file: Path) -> object:
    if file.suffix == ".json":
        return file.read_bytes()
    return {key: value.float().tolist() for key, value in load_file(file).items()}


# --- patterns, single experts


def test_an_alpha_for_no_layer_is_refused(adapter):
    """PEFT passes over it, and the layer that it was for gets the adapter's common scaling."""
    path = adapter("notes", config={"alpha_pattern": {"layers.1.mlp.down_proj": 11, "mlp.experts.0.up_proj": 3}})
    says = "alpha_pattern names 'mlp.experts.0.up_proj', which is none of the adapter's layers"
    refusal(lambda: updates(read_adapter("notes", path), base()), path / CONFIG, says)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"experts.1.up_proj": 64}}])
@pytest.mark.parametrize("module", ["mlp.experts.1.up_proj", "mlp.experts.base_layer", "mlp.experts"])
def test_updates_of_experts_are_refused_by_name(adapter, config, module):
    layer = f"{DECODER}.0.{module}"
    tensors = {f"{ROOT}{layer}.lora_A.weight": torch.ones(4, 64), f"{ROOT}{layer}.lora_B.weight": torch.ones(48, 4)}
    path = adapter(config=config, tensors=tensors)
    says = f"{layer} is of experts, which transformers keeps fused"
    refusal(lambda: updates(read_adapter("mail", path), build_preset("tiny-vl-moe")), path, says)


# --- malformed

LAYER = f"{ROOT}{Q0}"
A, B = torch.ones(4, 64), torch.ones(64, 4)
MALFORMED = {  # config values, tensors (None: left out), what the error says
    "a head that the config names and the file lacks": (
        {"modules_to_save": ["lm_head"]},
        {},
        "modules_to_save names 'lm_head', of which adapter_model.safetensors holds nothing",
    ),
    "a head of another vocabulary": (
        {},
        {f"{ROOT}lm_head.weight": torch.ones(7, 64)},
        "lm_head.weight is (7, 64), in this model",
    ),
    "a head of integers": ({}, {f"{ROOT}lm_head.weight": "ints"}, "lm_head.weight differs from the model's own"),
    "a head of NaN": ({}, {f"{ROOT}lm_head.weight": "nan"}, "lm_head.weight differs from the model's own"),
    "a head without values": ({}, {f"{ROOT}lm_head.weight": torch.ones(0)}, "is empty, as a shard under ZeRO-3 is"),
    "updates without values": ({}, {f"{LAYER}.lora_A.weight": torch.ones(0)}, "lora_A.weight is empty, as a shard"),
    "a weight of no model": ({}, {f"{ROOT}value_head.weight": A}, "value_head.weight is neither a low-rank update"),
    "a weight without a name": ({}, {"": A}, "is neither a low-rank update of a linear layer nor a weight"),
    "a name of 1 MB": ({}, {"x" * 10**6: A}, "is neither a low-rank update of a linear layer nor a weight"),
    "a bias of a layer that has none": ({}, {f"{LAYER.replace('q_proj', 'o_proj')}.bias": A}, "o_proj.bias is neither"),
    "names of a state dict": ({}, {f"{LAYER}.lora_A.default.weight": A}, "the name of a state dict: save the adapter"),
    "names without PEFT's prefix": ({}, {f"{Q0}.lora_A.weight": A}, "PEFT's prefix is missing"),
    "magnitudes": ({}, {f"{LAYER}.lora_magnitude_vector": torch.ones(64)}, "DoRA: train the adapter without it"),
    "a bias of lora_B": ({}, {f"{LAYER}.lora_B.bias": torch.ones(64)}, "a bias: train the adapter without lora_bias"),
    "deltas of tokens": ({}, {f"{ROOT}embed_tokens.token_adapter.trainable_tokens_delta": A}, "linear layers only"),
    "modules to save as numbers": ({"modules_to_save": [1]}, {}, "modules_to_save=[1] is more than the plain low-rank"),
    "modules to save as an object": ({"modules_to_save": {"a": 1}}, {}, "modules_to_save={'a': 1} is more than"),
    "an alpha for a layer of another prefix": (
        {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64}},
        {},
        "alpha_pattern names 'model.layers.0.self_attn.q_proj', which is none",
    ),
    "one layer under two names": (
        {},
        {f"{ROOT}model.layers.0.self_attn.q_proj.lora_{side}.weight": value for side, value in (("A", A), ("B", B))},
        "model.layers.0.self_attn.q_proj are one layer",
    ),
    "the vision tower behind another prefix": (
        {},
        {f"{ROOT}visual.blocks.0.attn.qkv.lora_{side}.weight": value for side, value in (("A", A), ("B", B))},
        "visual.blocks.0.attn.qkv: the gate reads the screen through the vision tower",
    ),
}


@pytest.mark.filterwarnings("ignore:.*is read as")
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_adapter_is_one_line(adapter, weights, name):
    config, tensors, says = MALFORMED[name]
    head = weights["lm_head.weight"]
    made = {"ints": torch.ones(head.shape, dtype=torch.int64), "nan": torch.full(head.shape, torch.nan)}
    path = adapter(
        config=config, tensors={key: made.get(t, t) if isinstance(t, str) else t for key, t in tensors.items()}
    )
    model = base()
    refusal(lambda: updates(read_adapter("mail", path), model), path, says)
