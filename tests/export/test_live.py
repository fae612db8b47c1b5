"""Folders of weights for an engine that follows a training: of one process, and of ranks against their checkpoint."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from ds_moe.checkpoint import room
from ds_moe.config.run_file import load_run
from ds_moe.config.sections import LoRAConfig
from ds_moe.distributed import Topology
from ds_moe.errors import UserError
from ds_moe.export import live
from ds_moe.export.live import LiveExport, folder_bytes
from ds_moe.export.model import export_checkpoint
from ds_moe.models.convert import convert
from ds_moe.models.load import build_outline
from ds_moe.models.lora import add_lora
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.models.stored_names import Carried
from ds_moe.weights.files import SafetensorsFiles
from tests.distributed.test_family_runs import SPECULATES, SPECULATION, folder_of
from tests.launcher import run_ranks

NOTHING = Carried(build_outline(build_preset("tiny-moe").config), None)
LORA = "lora={rank: 4, targets: [q_proj], alpha: 4}"


def exported(model, overrides, dtype, folder):
    config = load_run("tests/runs/online.yaml", ["model={preset: tiny-moe}", "moe.ep_size=1", *overrides])
    topology = Topology(0, 1, 0, 1, torch.device("cpu"))
    LiveExport(model, topology, config, tiny_processor("text"), dtype).write(folder)
    files = SafetensorsFiles.of_folder(folder)
    assert folder_bytes(model, 1, dtype, NOTHING) == sum(files.read(name).nbytes for name in files.shapes)
    return files


def test_a_small_update_of_a_bf16_base_is_in_a_folder_in_fp32(tmp_path):
    """It is below what bf16 resolves: what is rounded to the base's dtype first has lost it."""
    config = load_run("tests/runs/online.yaml", ["model={preset: tiny-moe}", "moe.ep_size=1", LORA])
    model = build_preset("tiny-moe").to(torch.bfloat16)
    convert(model, config.moe)
    add_lora(model, config.lora, 0)
    name = next(name for name, _ in model.named_parameters() if ".lora_B." in name)
    base = dict(model.named_parameters())
    for key, parameter in base.items():
        if ".lora_B." in key:
            torch.nn.init.constant_(parameter, 1e-4)
    files = exported(model, [LORA], torch.float32, tmp_path / "step_1")
    stored = name.replace("base_model.model.", "").replace(".lora_B.default", "")
    weight = next(value for key, value in base.items() if key.endswith("base_layer.weight") and "q_proj" in key)
    a, b = (next(value for key, value in base.items() if f".lora_{half}." in key) for half in "AB")
    expected = weight.float() + b.float() @ a.float()
    assert torch.equal(files.read(stored), expected.detach()) and not torch.equal(expected, weight.float())


def test_full_files_are_written_on_the_way_and_a_folder_takes_the_place_of_another(tmp_path, monkeypatch):
    model = build_preset("tiny-moe").to(torch.bfloat16)
    whole = exported(model, [], torch.bfloat16, tmp_path / "step_1")
    monkeypatch.setattr(live, "FILE_BYTES", 2**14)
    (tmp_path / "many/.partial_step_2").mkdir(parents=True)  # of a process that was killed
    for shift in (1.0, 0.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shift  # a folder of other weights, which the next replaces
        if not shift:
            model = build_preset("tiny-moe").to(torch.bfloat16)
        many = exported(model, [], torch.bfloat16, tmp_path / "many/step_2")
    index = json.loads((tmp_path / "many/step_2/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(many.shapes)
    assert all(torch.equal(many.read(name), whole.read(name)) for name in whole.shapes)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["step_2"]
    assert json.loads((tmp_path / "many/step_2/config.json").read_text())["dtype"] == "bfloat16"


def test_weights_that_an_engine_would_tie_are_refused(tmp_path):
    model = build_preset("tiny-moe")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="config.json has tie_word_embeddings: true, but .* are trained apart"):
        exported(model, [], torch.float32, tmp_path / "step_1")
    assert not (tmp_path / "step_1").exists()


def test_an_update_of_a_tied_output_layer_is_refused_by_its_target(tmp_path):
    config = build_preset("tiny-moe").config
    config.tie_word_embeddings = True
    model = type(build_preset("tiny-moe"))(config)
    add_lora(model, LoRAConfig(rank=4, targets=["q_proj", "lm_head"]), 0)
    with pytest.raises(UserError, match="lora.targets updates lm_head.weight, .*leave lm_head out of lora.targets"):
        exported(model, ["lora={rank: 4, targets: [q_proj, lm_head]}"], torch.float32, tmp_path / "step_1")
    without = type(model)(config)
    add_lora(without, LoRAConfig(rank=4, targets=["q_proj"]), 0)
    files = exported(without, ["lora={rank: 4, targets: [q_proj]}"], torch.float32, tmp_path / "step_1")
    assert "lm_head.weight" not in files.shapes and "model.embed_tokens.weight" in files.shapes


def test_a_disk_without_room_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    free = []
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[-1]))
    config, model = load_run("tests/runs/online.yaml", ["moe.ep_size=1"]), build_preset("tiny-moe")
    topology = Topology(0, 1, 0, 1, torch.device("cpu"))
    one = LiveExport(model, topology, config, tiny_processor("text"), torch.bfloat16)
    (tmp_path / ".partial_step_1").mkdir()  # of a process that was killed, which took room
    free.append(one.nbytes - 1)
    with pytest.raises(UserError, match="^rl.engine.weights_dir .*: a version of the weights takes .* choose another"):
        one.write(tmp_path / "step_2")
    assert not list(tmp_path.iterdir())
    free.append(one.nbytes)
    one.write(tmp_path / "step_2")
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


RUN = """
model: {preset: tiny-moe}
data: {train: qa.jsonl, max_length: 64}
moe: {ep_size: 2}
train: {precision: fp32, steps: 1, lr: 0.01, micro_batch_size: 1, global_batch_size: 4}
monitor: {tensorboard: false}
deepspeed: zero3
"""
BIAS, UPDATED = "glm4_moe", "qwen3_5_moe"


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory):
    """Folder with the runs of 4 ranks that hold two copies of the experts, EP 2, by name; and their bytes."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "eno"}]
    (folder / "qa.jsonl").write_text((json.dumps({"messages": texts}) + "\n") * 8)
    (folder / "run.yaml").write_text(RUN.replace("qa.jsonl", str(folder / "qa.jsonl")))
    cases = {
        "single": (["deepspeed=zero2"], "fp32"),
        BIAS: (["moe.balance=[{kind: loss_free, update_rate: 0.05}]"], "bf16"),
        UPDATED: (["lora={rank: 8, experts: true}"], "fp32"),
    }
    told = []
    for name, (words, dtype) in cases.items():
        where = [f"model={{path: {folder_of(name, folder / name)}}}"] if name != "single" else []
        told.append([[*where, *words, f"train.output_dir={folder / f'run_{name}'}"], dtype])
    run = run_ranks("tests/export/live_ranks.py", 4, [json.dumps(told), str(folder / "run.yaml")])
    assert all(rank["sizes"] == run.json["sizes"] for rank in run.json_by_rank)
    return folder, dict(zip(cases, run.json["sizes"], strict=True))


@pytest.mark.parametrize("name, dtype", [("single", None), (BIAS, torch.bfloat16), (UPDATED, None)])
def test_what_ranks_hand_over_is_what_an_export_holds(handed_over, tmp_path, name, dtype):
    """Single tensors of experts, a bias of the family's own that has moved, weights that the model has no use for."""
    folder, sizes = handed_over
    export_checkpoint(folder / f"run_{name}", tmp_path / "export", note=lambda text: None)
    ours, theirs = (
        SafetensorsFiles.of_folder(folder / f"run_{name}/weights"),
        SafetensorsFiles.of_folder(tmp_path / "export"),
    )
    assert ours.shapes == theirs.shapes
    assert sizes[name] == sum(ours.read(key).nbytes for key in ours.shapes)
    before = SafetensorsFiles.of_folder(folder / name) if name != "single" else None
    for key in theirs.shapes:
        found, expected = ours.read(key), theirs.read(key)
        moved = before is not None and key in before.shapes and not torch.equal(before.read(key), expected)
        if key.endswith("e_score_correction_bias"):
            assert moved and expected.dtype is torch.float32  # whatever the dtype of weights is
        elif dtype is not None:
            expected = expected.to(dtype)
        assert found.dtype == expected.dtype and torch.equal(found, expected), key
    if name == "single":
        assert any(".experts.7.up_proj.weight" in key for key in ours.shapes)
    if name == UPDATED:
        carried = {f"{SPECULATES[UPDATED]}{key}": value for key, value in SPECULATION.items()}
        assert all(torch.equal(ours.read(key), value) for key, value in carried.items())
        assert {ours.dtype(key) for key in carried} == {torch.float32, torch.bfloat16}


def test_what_goes_along_is_lost_with_the_files_of_the_model_in_one_line(tmp_path):
    model = build_preset("tiny-qwen3.5-moe")
    path = folder_of(UPDATED, tmp_path / "model")
    config = load_run(
        "tests/runs/online.yaml", [f"model={{path: {path}}}", "moe.ep_size=1", "moe.replay.enabled=false"]
    )
    topology = Topology(0, 1, 0, 1, torch.device("cpu"))
    one = LiveExport(model, topology, config, tiny_processor("vl"), torch.float32)
    one.write(tmp_path / "step_1")
    assert set(SPECULATION) < set(SafetensorsFiles.of_folder(tmp_path / "step_1").shapes)
    shutil.rmtree(path)
    with pytest.raises(UserError, match="rank 0 could not write weights for the engine to .*step_2: ") as caught:
        one.write(tmp_path / "step_2")
    assert "\n" not in str(caught.value) and not (tmp_path / "step_2").exists()
