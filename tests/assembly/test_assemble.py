"""An upcycled model is the dense one, for plain transformers and for ds_moe, however its experts are cut and stored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moe.assembly import weights as assembly_weights
from ds_moe.cli import main
from ds_moe.config.moe import MoEConfig, TopKRouting
from ds_moe.export.model import export_checkpoint
from ds_moe.models.card import model_card
from ds_moe.models.convert import convert
from ds_moe.models.processor import load_processor
from ds_moe.weights.files import SafetensorsFiles
from tests.assembly.dense_folders import converted, images, load, logits, make, upcycle, write_dense

LAYER = "model.language_model.layers.0.mlp."


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    return write_dense(tmp_path_factory.mktemp("dense") / "model", sharded=True)


@pytest.mark.parametrize(
    ("experts", "top_k", "split", "layout"),
    [(8, 2, 1, "hub"), (4, 4, 1, "memory"), (8, 2, 2, "hub"), (8, 4, 2, "memory"), (12, 6, 3, None), (3, 3, 3, None)],
)
def test_an_upcycled_model_gives_what_the_dense_one_gives(dense, tmp_path, experts, top_k, split, layout):
    assert len(list(Path(dense).glob("*.safetensors"))) > 3
    out, assembly = make(tmp_path, upcycle(dense, experts, top_k, split), layout=layout, max_shard_bytes=200_000)
    text = assembly.config.get_text_config()
    assert (text.num_experts, text.num_experts_per_tok) == (experts, top_k)
    assert text.moe_intermediate_size * split == 96
    want, model = logits(load(dense)), load(out)
    assert want.std() > 0.1
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(converted(model)), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("top_k", "split"), [(2, 2), (4, 2), (6, 3)])
def test_a_token_s_experts_are_whole_groups(dense, tmp_path, top_k, split):
    out, _ = make(tmp_path, upcycle(dense, 12, top_k, split))
    with torch.no_grad():
        every_layer = load(out)(**images(), output_router_logits=True).router_logits
    for logits_TE in every_layer:
        groups_TK = logits_TE.softmax(-1).topk(top_k).indices.div(split, rounding_mode="floor")
        assert all(len(set(row)) == top_k // split for row in groups_TK.tolist())
    assert len(set(groups_TK[:, 0].tolist())) > 1  # and the router does choose


def test_ds_moe_keeps_groups_whole_where_logits_tie(tmp_path):
    """Two groups with the same row, as bf16 may round: plain top-k cuts through them, grouped routing does not."""
    source = write_dense(tmp_path / "model")
    out, _ = make(tmp_path, upcycle(source, 8, 2, 2))
    model = load(out)
    for layer in model.model.language_model.layers:
        rows_EH = layer.mlp.gate.weight.data
        rows_EH[4:6] = rows_EH[:2]
    want = logits(load(source))
    assert (logits(model) - want).abs().max() > 1e-2
    convert(model, MoEConfig(router=TopKRouting(groups=4, top_groups=1)))
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)


def test_experts_are_the_slices_of_the_ffn(dense, tmp_path):
    out, _ = make(tmp_path, upcycle(dense, 4, 2, 2), layout="memory")
    old, new = SafetensorsFiles.of_folder(Path(dense)), SafetensorsFiles.of_folder(out)
    gate, up, down = (old.read(f"{LAYER}{name}_proj.weight") for name in ("gate", "up", "down"))
    for expert in range(4):
        rows = slice(48, 96) if expert % 2 else slice(0, 48)
        want = torch.cat([gate[rows], up[rows]])
        assert torch.equal(new.read(f"{LAYER}experts.gate_up_proj")[expert], want)
        assert torch.equal(new.read(f"{LAYER}experts.down_proj")[expert], 2 * down[:, rows])


def test_a_wrong_scale_is_caught(dense, tmp_path, monkeypatch):
    right = assembly_weights.down
    monkeypatch.setattr(assembly_weights, "down", lambda model, prefix, split: right(model, prefix, split) / split)
    out, _ = make(tmp_path, upcycle(dense, 8, 2, 2))
    assert (logits(load(out)) - logits(load(dense))).abs().max() > 1e-2


def test_slices_with_rows_of_their_own_are_caught(dense, tmp_path, monkeypatch):
    def ungrouped(groups, split, hidden, std, generator):
        return torch.randn(groups * split, hidden, generator=generator) * std

    monkeypatch.setattr(assembly_weights, "group_router", ungrouped)
    out, _ = make(tmp_path, upcycle(dense, 8, 2, 2))
    assert (logits(load(out)) - logits(load(dense))).abs().max() > 1e-2


def test_noise_is_relative_seeded_and_changes_the_model(dense, tmp_path):
    made = [make(tmp_path, upcycle(dense, 4, 2, 1, f"  noise: 0.1\nseed: {seed}\n"))[0] for seed in (1, 1, 2)]
    same, again, other = (load(out) for out in made)
    assert (logits(same) - logits(load(dense))).abs().max() > 1e-2
    names = [name for name, _ in same.named_parameters()]
    assert all(torch.equal(same.get_parameter(name), again.get_parameter(name)) for name in names)
    experts = same.get_parameter(f"{LAYER}experts.down_proj")
    assert not torch.equal(experts, other.get_parameter(f"{LAYER}experts.down_proj"))
    clean = SafetensorsFiles.of_folder(Path(dense)).read(f"{LAYER}down_proj.weight")
    noise = (experts - clean).detach()
    assert noise.std(dim=(1, 2)) == pytest.approx([0.1 * clean.square().mean().sqrt().item()] * 4, rel=0.05)
    assert not torch.equal(noise[0], noise[1])


def test_the_order_in_which_weights_are_made_changes_nothing(dense, tmp_path):
    spec = upcycle(dense, 4, 2, 1, "  noise: 0.1\n")
    _, assembly = make(tmp_path, spec, dry_run=True)
    name = f"{LAYER}experts.gate_up_proj".replace("layers.0", "layers.1")
    first = assembly.weights[name].make()
    for part in assembly.weights.values():
        part.make()
    assert torch.equal(assembly.weights[name].make(), first)


@pytest.mark.parametrize("stored", [False, True], ids=["absent", "stored"])
def test_tied_embeddings_stay_tied(tmp_path, stored):
    source = Path(write_dense(tmp_path / "tied", tie_word_embeddings=True))
    if stored:  # some checkpoints hold the same weight twice
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out, assembly = make(tmp_path, upcycle(str(source), 4, 2))
    assert "lm_head.weight" not in SafetensorsFiles.of_folder(out).shapes
    model = load(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == assembly.parameters
    torch.testing.assert_close(logits(model), logits(load(source)), atol=1e-6, rtol=0)


def test_a_bf16_checkpoint_stays_bf16_and_is_copied_bit_for_bit(tmp_path):
    source = write_dense(tmp_path / "bf16", dtype=torch.bfloat16)
    out, assembly = make(tmp_path, upcycle(source, 4, 2))
    model, down = load(out), SafetensorsFiles.of_folder(Path(source)).read(f"{LAYER}down_proj.weight")
    assert model.dtype == assembly.dtype == torch.bfloat16
    assert torch.equal(model.get_parameter(f"{LAYER}experts.down_proj"), down.expand(4, -1, -1))


def test_counts_and_sizes_are_those_of_the_model(dense, tmp_path):
    out, assembly = make(tmp_path, upcycle(dense, 8, 2))
    model = load(out)
    assert assembly.parameters == sum(parameter.numel() for parameter in model.parameters())
    dense_parameters = sum(parameter.numel() for parameter in load(dense).parameters())
    one_ffn, routers = 3 * 96 * 64, 2 * 8 * 64
    assert assembly.active_parameters == dense_parameters + 2 * one_ffn + routers  # top-2: one FFN more in 2 layers
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert sum(assembly.sizes.values()) == pytest.approx(written, rel=0.02)


def test_the_folder_has_processor_generation_config_and_card(dense, tmp_path):
    out, assembly = make(tmp_path, upcycle(dense, 4, 2), max_shard_bytes=300_000)
    question = "Which digit is this?"
    old, new = load_processor(dense), load_processor(out)
    assert new.tokenizer(question).input_ids == old.tokenizer(question).input_ids
    assert new.image_processor is not None and new.chat_template == old.chat_template
    assert (out / "generation_config.json").read_bytes() == (Path(dense) / "generation_config.json").read_bytes()
    card = (out / "README.md").read_text()
    usage = model_card("", assembly.config, "").partition("## Use it")[2]  # which tests/export runs
    assert usage.count("```python") == 2 and card.endswith(usage)
    assert f"| source | `{dense}` | 255,536 |" in card and "experts: 4" in card and "top-2" in card
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load(out).state_dict())
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())


def test_the_command_says_what_it_writes_and_dry_run_writes_nothing(dense, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text(upcycle(dense, 8, 2))
    out = tmp_path / "out"
    assert main(["assemble", str(tmp_path / "spec.yaml"), str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 layers x 8 experts of width 96, top-2; 514,608 parameters, 293,424 of them active on a token" in said
    assert "GB of float32 in 1 file(s), experts in the hub layout" in said and not out.exists()
    assert main(["assemble", str(tmp_path / "spec.yaml"), str(out), "--layout", "memory"]) == 0
    assert "model.safetensors: 0.002" in capsys.readouterr().out
    assert SafetensorsFiles.of_folder(out).shapes[f"{LAYER}experts.down_proj"] == (8, 64, 96)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["all", "router_only"])
def test_an_upcycled_model_trains(dense, tmp_path, capfd, stage):
    out, _ = make(tmp_path, upcycle(dense, 4, 2, 2, "  noise: 0.01\n"))
    run = f"""\
model: {{path: {out}}}
data: {{train: digits, max_length: 128}}
moe: {{balance: [{{kind: aux}}]}}
train: {{output_dir: {tmp_path / "run"}, stage: {stage}, precision: fp32, steps: 2, micro_batch_size: 8, lr: 1e-3}}
monitor: {{log_every: 1}}
deepspeed: {Path("ds_configs/zero3.json").resolve()}
"""
    (tmp_path / "run.yaml").write_text(run)
    assert main(["train", str(tmp_path / "run.yaml"), "--nproc", "1"]) == 0, capfd.readouterr().err
    export_checkpoint(tmp_path / "run", tmp_path / "trained")
    before, after = load(out), load(tmp_path / "trained")
    moved = {name for name, weight in before.named_parameters() if not torch.equal(weight, after.get_parameter(name))}
    routers = {name for name in moved if name.endswith("mlp.gate.weight")}
    assert len(routers) == 2 and (moved == routers) == (stage == "router_only")
