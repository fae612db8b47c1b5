"""Experts that were trained apart side by side, routers that point to their domains, and the mean of checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ds_moe.data.digits import write_digits
from ds_moe.errors import UserError
from ds_moe.models.processor import load_processor
from ds_moe.weights.files import SafetensorsFiles
from tests.assembly.dense_folders import converted, load, logits, make, write_dense

NAMES = ("parent", "a", "b")
SAMPLES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """parent, a, b: three dense checkpoints; a.jsonl, b.jsonl: data of two domains."""
    folder = tmp_path_factory.mktemp("branches")
    for seed, name in enumerate(NAMES):
        write_dense(folder / name, seed, sharded=name == "b")
    train, _ = write_digits(folder)
    lines = train.read_text().splitlines()
    for name, kind in (("a", "digit"), ("b", "parity")):
        mine = [line for line in lines if json.loads(line)["kind"] == kind]
        (folder / f"{name}.jsonl").write_text("\n".join(mine[:SAMPLES]) + "\n")
    return folder


def branches(folder: Path, top_k: int = 2, rest: str = "average", router: str = "", second: str = "b") -> str:
    experts = f"{{a: {folder}/a, b: {folder}/{second}}}"
    text = f"branches:\n  parent: {folder}/parent\n  experts: {experts}\n  top_k: {top_k}\n  rest: {rest}\n"
    return text + (f"  router: {{{router}}}\n" if router else "")


def by_hidden_mean(folder: Path, more: str = "") -> str:
    data = f"{{a: {folder}/a.jsonl, b: {folder}/b.jsonl}}"
    return f"init: hidden_mean, data: {data}, samples: 64{more}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = SafetensorsFiles.of_folder(folder)
    return {name: files.read(name) for name in files.shapes}


@pytest.mark.parametrize("rest", ["average", "parent"])
@pytest.mark.parametrize("layout", ["memory", "hub"])
def test_each_expert_is_its_branch_s_ffn_and_the_rest_is_as_asked(folder, tmp_path, rest, layout):
    out, _ = make(tmp_path, branches(folder, rest=rest), layout=layout, max_shard_bytes=100_000)
    model = load(out)
    parent, a, b = (weights(folder / name) for name in NAMES)
    compared = set()
    for name, weight in model.state_dict().items():
        if name.endswith("mlp.gate.weight"):
            continue
        prefix, _, kind = name.partition("experts.")
        for expert, branch in enumerate((a, b) if kind else ()):
            if kind == "down_proj":
                want = branch[f"{prefix}down_proj.weight"]
            else:
                want = torch.cat([branch[f"{prefix}gate_proj.weight"], branch[f"{prefix}up_proj.weight"]])
            assert torch.equal(weight[expert], want), name
        if not kind:
            assert torch.equal(weight, (a[name] + b[name]) / 2 if rest == "average" else parent[name]), name
        compared.add(kind)
    assert compared == {"", "gate_up_proj", "down_proj"}
    assert model.config.text_config.num_experts == 2


def test_twice_the_same_branch_is_that_branch(folder, tmp_path):
    out, _ = make(tmp_path, branches(folder, top_k=1, second="a"))
    model, want = load(out), logits(load(folder / "a"))
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(converted(model)), want, atol=1e-6, rtol=0)


def independent_means(model_folder: Path, data: Path) -> torch.Tensor:
    """(layers, H): all samples in one padded forward, its text written out by the chat template."""
    processor: Any = load_processor(model_folder)
    model, rows, images = load(model_folder), [], []
    for line in data.read_text().splitlines():
        messages = json.loads(line)["messages"]
        images.append(Image.open(data.parent / messages[0]["content"][0]["image"]).convert("RGB"))
        text = processor.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 4)
        rows.append(torch.tensor(processor.tokenizer(text).input_ids))
    ids = pad_sequence(rows, batch_first=True, padding_value=processor.tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    seen = []
    for layer in model.model.language_model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.append(out))
    pixels = processor.image_processor(images=images, return_tensors="pt")
    types = (ids == model.config.image_token_id).long()
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **pixels)
    return torch.stack([hidden[mask.bool()].double().mean(0) for hidden in seen])


@pytest.mark.parametrize("reader", ["parent", "expert"])
def test_hidden_mean_routers_are_what_an_independent_computation_gives(folder, tmp_path, reader):
    out, _ = make(tmp_path, branches(folder, router=by_hidden_mean(folder, f", model: {reader}, std: 0.05")))
    means = []
    for name in ("a", "b"):
        means.append(independent_means(folder / ("parent" if reader == "parent" else name), folder / f"{name}.jsonl"))
    away_EL = torch.stack(means) - sum(means) / 2
    want_EL = 0.05 * away_EL / away_EL.square().mean(-1, keepdim=True).sqrt()
    for layer in range(2):
        got = weights(out)[f"model.language_model.layers.{layer}.mlp.gate.weight"]
        torch.testing.assert_close(got, want_EL[:, layer].float(), atol=1e-6, rtol=0)


def test_hidden_mean_routers_send_each_domain_to_its_expert(folder, tmp_path):
    out, _ = make(tmp_path, branches(folder, top_k=1, rest="parent", router=by_hidden_mean(folder)))
    rows = weights(out)["model.language_model.layers.0.mlp.gate.weight"].double()
    for expert, name in enumerate(("a", "b")):
        mean = independent_means(folder / "parent", folder / f"{name}.jsonl")[0]
        assert (rows @ mean).argmax() == expert


def test_domains_that_do_not_differ_are_refused(folder, tmp_path):
    data = f"{{a: {folder}/a.jsonl, b: {folder}/a.jsonl}}"
    with pytest.raises(UserError, match="hidden means do not differ"):
        make(tmp_path, branches(folder, router=f"init: hidden_mean, data: {data}"))


def test_random_routers_depend_on_the_seed_alone(folder, tmp_path):
    name = "model.language_model.layers.1.mlp.gate.weight"
    specs = [branches(folder, router="std: 0.1") + f"seed: {seed}\n" for seed in (0, 0, 1)]
    one, again, other = (weights(make(tmp_path, spec)[0])[name] for spec in specs)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(0.1, rel=0.2)


def test_wider_numbers_are_kept(folder, tmp_path):
    """A bf16 branch beside an fp32 one: nothing is rounded."""
    write_dense(tmp_path / "bf16", 7, torch.bfloat16)
    spec = branches(folder).replace(f"{folder}/b", str(tmp_path / "bf16"))
    out, assembly = make(tmp_path, spec)
    assert assembly.dtype == torch.float32
    name = "model.language_model.layers.0.mlp."
    down = load(out).get_parameter(f"{name}experts.down_proj")[1]
    assert torch.equal(down, weights(tmp_path / "bf16")[f"{name}down_proj.weight"].float())


def test_an_average_is_dense_and_the_mean_of_every_weight(folder, tmp_path):
    models = ", ".join(f"{name}: {folder}/{name}" for name in NAMES)
    out, assembly = make(tmp_path, f"average:\n  models: {{{models}}}\n")
    sources = [weights(folder / name) for name in NAMES]
    model = load(out)
    assert model.config.model_type == "qwen3_vl" and not assembly.is_moe
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, (sources[0][name] + sources[1][name] + sources[2][name]) / 3), name
    assert "dense qwen3_vl" in (out / "README.md").read_text()
    assert "Experts" not in (out / "README.md").read_text()
