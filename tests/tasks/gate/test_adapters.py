"""Adapters as files: read, written back bit for bit, merged into one, and refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ds_moe.errors import UserError
from ds_moe.tasks.gate.adapters import CONFIG, WEIGHTS, find_adapters, read_adapter
from ds_moe.tasks.gate.bank import install
from tests.tasks.gate.lora_folders import ADAPTERS, DECODER, base, difference, logits, of_peft, read, write

Q1 = f"{DECODER}.1.self_attn.q_proj"
A, B = (f"base_model.model.{Q1}.lora_{side}.weight" for side in "AB")
IDS_BS = torch.arange(40, 54).view(2, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def banked(folder):
    model = base()
    return model, install(model, read(folder))


def same_bytes(ours: Path, theirs: Path) -> bool:
    return ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_not_trained_is_written_back_bit_for_bit(folder, tmp_path, dtype):
    bank = install(base().to(dtype), read(folder))
    bank.export(tmp_path / "out")
    for name in ADAPTERS:
        assert same_bytes(tmp_path / "out" / name / CONFIG, folder / name / CONFIG)
        assert same_bytes(tmp_path / "out" / name / WEIGHTS, folder / name / WEIGHTS)
    with pytest.raises(UserError, match="mail is not empty: choose another folder"):
        bank.export(tmp_path / "out")


def test_a_trained_adapter_is_written_as_it_is_now(folder, banked, tmp_path):
    model, bank = banked
    for parameter in bank.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    bank.export(tmp_path)
    photos = load_file(tmp_path / "photos" / WEIGHTS)
    assert {tensor.dtype for tensor in photos.values()} == {torch.float32}  # as trained, not rounded to its file's bf16
    for index, name in enumerate(ADAPTERS):
        bank.gates.weights = torch.eye(4)[[index, index]]
        ours = logits(model, IDS_BS)
        assert difference(ours, of_peft(tmp_path / name, IDS_BS)) <= 1e-6
        assert difference(ours, of_peft(folder / name, IDS_BS)) > 1e-4


def test_values_of_sharded_parameters(banked, tmp_path):
    _, bank = banked
    bank.export(tmp_path / "whole")
    bank.merged(torch.ones(4), tmp_path / "whole_merged")
    whole = {parameter: parameter.detach().clone().flatten() for parameter in bank.parameters()}
    for parameter in bank.parameters():
        parameter.data = torch.empty(0)  # what ZeRO-3 leaves of it
    bank.export(tmp_path / "gathered", whole.__getitem__)
    bank.merged(torch.ones(4), tmp_path / "gathered_merged", whole.__getitem__)
    for name in [*(f"{{}}/{name}" for name in ADAPTERS), "{}_merged"]:
        assert same_bytes(*(tmp_path / name.format(form) / WEIGHTS for form in ("gathered", "whole")))


def test_a_merged_adapter_is_the_blend(banked, tmp_path):
    model, bank = banked
    weights_K = torch.tensor([0.4, 0.3, -0.2, 0.5])
    bank.merged(weights_K, tmp_path / "blend")
    bank.gates.weights = weights_K.expand(2, 4)
    ours = logits(model, IDS_BS)
    assert difference(ours, of_peft(tmp_path / "blend", IDS_BS)) <= 1e-6
    bank.gates.weights = weights_K.roll(1).expand(2, 4)
    assert difference(logits(model, IDS_BS), ours) > 1e-3
    with pytest.raises(UserError, match="blend is not empty"):
        bank.merged(weights_K, tmp_path / "blend")


def test_adapters_are_found_by_name_and_by_folder(folder):
    assert list(find_adapters({}, str(folder))) == sorted(ADAPTERS)
    assert find_adapters({"b": str(folder / "maps"), "a": str(folder / "mail")}, None) == {
        "b": folder / "maps",
        "a": folder / "mail",
    }
    assert list(find_adapters({"extra": str(folder / "mail")}, str(folder))) == ["extra", *sorted(ADAPTERS)]


@pytest.mark.parametrize(
    ("explicit", "inside", "message"),
    [
        ({}, [], "a gate needs at least 2 adapters, found none in .*all"),
        ({"one": "mail"}, None, "found only 'one': give folders that hold adapter_config.json"),
        ({"mail": "mail"}, ["mail", "maps"], "adapter 'mail' is given by name and found in .*all: rename one"),
        ({"a/b": "mail", "c": "maps"}, None, "adapter name 'a/b' cannot name a folder: leave out slashes"),
        ({"a": "mail", "c": "nowhere"}, None, "adapter 'c': .*nowhere holds no adapter_config.json"),
        ({}, ["mail", "no weights"], "adapter 'no weights': .*: no adapter_model.safetensors"),
        ({}, ["mail", "pickle"], "adapter_model.bin is a pickle, which can run code; save it as safetensors"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, explicit, inside, message):
    for name in inside or []:
        shutil.copytree(folder / (name if name in ADAPTERS else "mail"), tmp_path / "all" / name)
    for name in {"no weights", "pickle"} & set(inside or []):
        (tmp_path / "all" / name / WEIGHTS).unlink()
        if name == "pickle":
            (tmp_path / "all" / name / "adapter_model.bin").touch()
    (tmp_path / "all").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        find_adapters(
            {name: str(folder / path) for name, path in explicit.items()},
            None if inside is None else str(tmp_path / "all"),
        )


def test_no_such_folder():
    with pytest.raises(UserError, match="/nowhere: no such folder of adapters"):
        find_adapters({}, "/nowhere")


def changed(folder: Path, out: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    """A copy of the adapter "mail" with other values; a tensor None is left out."""
    shutil.copytree(folder / "mail", out)
    written = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(written | (config or {})))
    if tensors:
        kept = load_file(folder / "mail" / WEIGHTS) | tensors
        save_file({key: tensor for key, tensor in kept.items() if tensor is not None}, out / WEIGHTS)
    return out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("of_a_later_peft", 0.5),
    ],
)
def test_more_than_plain_lora_is_refused(folder, tmp_path, key, value):
    path = changed(folder, tmp_path / "new", {key: value})
    with pytest.raises(UserError, match=f"{path}/{CONFIG}: {key}=.* is more than the plain low-rank update"):
        read_adapter("new", path)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA'; a gate mixes adapters of type 'LORA' only"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            {},
            "init_lora_weights='pissa_niter_4' changed the base's own weights",
        ),
        ({"target_modules": "a", "layers_pattern": "b"}, {}, "PEFT .* refuses it"),
        (
            {},
            {"base_model.model.x.lora_embedding_A": torch.ones(2, 2)},
            "lora_embedding_A is no LoRA weight of a linear layer .train the adapter on linear layers only",
        ),
        ({}, {B: None}, f"{A} without {B}: the file is incomplete"),
        ({}, {B: torch.ones(64, 3)}, r"\(4, 64\) does not fit|\(64, 3\) does not fit"),
    ],
)
def test_files_that_are_refused(folder, tmp_path, config, tensors, message):
    path = changed(folder, tmp_path / "new", config, tensors)
    with pytest.raises(UserError, match=message):
        read_adapter("new", path)


@pytest.mark.parametrize(("file", "text"), [(CONFIG, "{"), (CONFIG, "[]"), (WEIGHTS, "none")])
def test_broken_files(folder, tmp_path, file, text):
    path = changed(folder, tmp_path / "new")
    (path / file).write_text(text)
    with pytest.raises(UserError, match=f"{path}/{file}: (cannot be read|peft_type is None)"):
        read_adapter("new", path)
    save_file({}, path / WEIGHTS)
    shutil.copy(folder / "mail" / CONFIG, path / CONFIG)
    with pytest.raises(UserError, match="holds no weights"):
        read_adapter("new", path)


def layer(name: str, inputs: int = 64, outputs: int = 64) -> dict[str, torch.Tensor]:
    """Tensors of rank 4."""
    keys = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
    return dict(zip(keys, (torch.ones(4, inputs), torch.ones(outputs, 4)), strict=True))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {},
            layer("model.visual.blocks.0.attn.qkv"),
            "model.visual.blocks.0.attn.qkv: the gate reads the screen through",
        ),
        ({}, layer(f"{DECODER}.7.mlp.up_proj"), r"layers.7.mlp.up_proj is no module of this model"),
        ({}, layer("model.language_model.norm"), "language_model.norm is a .*RMSNorm, no plain nn.Linear"),
        ({}, layer(Q1, inputs=48), "q_proj maps 64 to 64 in this model and 48 to 64 in the adapter"),
        ({"r": 5}, {}, "q_proj has rank 4, its adapter_config.json says 5"),
        ({}, {A: None, B: None}, f"{Q1}: the folder has no weights for it"),
        ({}, layer(f"{DECODER}.0.self_attn.o_proj"), "o_proj: the folder has no target_modules that name it"),
        ({"target_modules": ["nothing"]}, {}, "PEFT cannot place it in this model"),
    ],
)
def test_adapters_that_do_not_fit_the_model(folder, tmp_path, config, tensors, message):
    model = base()
    bad = read_adapter("bad", changed(folder, tmp_path / "bad", config, tensors))
    with pytest.raises(UserError, match=message) as refusal:
        install(model, [read_adapter("maps", folder / "maps"), bad])
    assert str(bad.path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert type(model.get_submodule(Q1)) is nn.Linear  # nothing was replaced


def test_a_model_is_banked_once(folder, banked):
    with pytest.raises(UserError, match="is a BankedLinear, no plain nn.Linear"):
        install(banked[0], read(folder))
