"""`ds-moe plan`: plans and tables, and what it refuses."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from ds_moe import cli
from ds_moe.doctor import plans
from ds_moe.memory.predict import GIB
from ds_moe.models.presets import preset_config

SMALL = "qwen3-vl-30b-a3b"


def command(capsys, *words) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    status = cli.main(["plan", *map(str, words)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(("name", "billions"), [(SMALL, 31.07), ("qwen3-vl-235b-a22b", 235.7)])
def test_bundled_models_have_their_parameters(name, billions):
    model = plans.read_model(name)
    config = plans.run_of(plans.Plan(8, 8, 3), name, model, {})
    outline = plans.outline_of(config, model)
    assert sum(p.numel() for p in outline.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)
    assert {p.device.type for p in outline.parameters()} == {"meta"}


def test_one_plan(capsys, tmp_path):
    file = tmp_path / "plan.json"
    status, out, err = command(capsys, SMALL, "--gpus", "8,16", "--ep-size", 8, "--checkpointing", "--json", file)
    assert status == 0 and not err
    eight, sixteen = json.loads(file.read_text())["plans"]
    assert eight["fits"] and eight["total_bytes"] > sixteen["total_bytes"]
    assert sum(eight["device_bytes"].values()) == eight["total_bytes"]
    assert eight["device_bytes"]["optimizer"] == pytest.approx(12 * 31.07e9 / 8, rel=2e-3)
    assert "EP 8, ZeRO-3; predicted:" in out and "layer at work" in out
    assert "DOES NOT FIT" in command(capsys, SMALL, "--ep-size", 8, "--checkpointing", "--memory", "70GB")[1]


def test_muon_needs_one_moment_of_hidden_matrices(capsys, tmp_path):
    file, found = tmp_path / "plan.json", {}
    for optimizer in ("adamw", "muon"):
        words = (SMALL, "--ep-size", 8, "--checkpointing", "--optimizer", optimizer, "--json", file)
        assert command(capsys, *words)[0] == 0
        found[optimizer] = json.loads(file.read_text())["plans"][0]["device_bytes"]["optimizer"]
    tables = 2 * 151_936 * 2048  # embedding and output layer, which AdamW trains
    saved = found["adamw"] - found["muon"]
    assert saved == pytest.approx(4 * (31.07e9 - tables) / 8, rel=2e-3)
    assert "train.optimizer is muon" in command(capsys, SMALL, "--offload", "--optimizer", "muon")[2]
    assert command(capsys, SMALL, "--gpus", 8, "--sweep", "--optimizer", "muon", "--json", file)[0] == 0
    plans_of_8 = json.loads(file.read_text())["gpus"]["8"]
    assert len(plans_of_8) == 4 * 4 and not any(one["plan"]["offload"] for one in plans_of_8)


def test_packed_rows_and_the_longest_that_fit(capsys, tmp_path):
    """The row that is named fits, and one 256 tokens longer does not."""
    usual = (SMALL, "--ep-size", 8, "--checkpointing", "--memory", "100GB")
    rows, file = [], tmp_path / "plan.json"
    for more in ((), ("--offload-activations",)):
        status, out, err = command(capsys, *usual, *more, "--rows", 8192, "--json", file)
        assert status == 0 and not err and "\nfits\n" in out
        plan = json.loads(file.read_text())["plans"][0]
        rows.append(plan["longest_row"])
        assert out.endswith(f"rows of up to {rows[-1]} tokens fit (train.tokens_per_micro_batch)\n")
        assert ("inputs of layers" in plan["host_bytes"]) == bool(more)
        assert "\nfits\n" in command(capsys, *usual, *more, "--rows", rows[-1])[1]
        assert "DOES NOT FIT" in command(capsys, *usual, *more, "--rows", rows[-1] + 256)[1]
    assert 8192 < rows[0] < rows[1]
    out = command(capsys, SMALL, "--ep-size", 8, "--checkpointing", "--memory", "60GB", "--rows", 8192)[1]
    assert out.endswith("no row for a whole sample fits (train.tokens_per_micro_batch)\n")
    shared = command(capsys, *usual, "--rows", 8192, "--sequence-parallel", 4)[1]
    assert 3 * rows[0] < int(shared.split("rows of up to ")[1].split()[0]) < 4 * rows[0] + 1024
    assert "give --rows too" in command(capsys, SMALL, "--sequence-parallel", 4)[2]
    assert "does not divide 32 attention heads" in command(capsys, *usual, "--rows", 8192, "--sequence-parallel", 3)[2]
    memory = plans.Memory({"weights": 1}, {}, "the loss goes back")
    found = [plans.Forecast(plans.Plan(8, 8, stage), memory, stage == 3, 10_240 * (stage == 3)) for stage in (2, 3)]
    Console(width=170).print(plans.sweep_table(8, found, "rows"))
    assert "fits, recommended; rows up to 10,240" in capsys.readouterr().out


def test_a_folder_and_a_run_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset_config("tiny-vl-moe").save_pretrained("model")
    (tmp_path / "run.yaml").write_text(
        "model: {path: model}\ndata: {train: x.jsonl}\nmoe: {ep_size: 2}\ndeepspeed: zero2\n"
        "train: {steps: 1, global_batch_size: 8, precision: bf16}\n"
    )
    status, out, err = command(capsys, "model", "--config", "run.yaml", "--gpus", 4)
    assert status == 0 and not err and "run.yaml; predicted:" in out and "fits" in out
    assert command(capsys, "model", "--gpus", 4, "--ep-size", 2, "--lora", 4)[0] == 0


@pytest.mark.parametrize("model", ["preset: tiny-vl-dense", "path: folder"])
def test_a_run_file_alone_is_about_its_own_model(capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    preset_config("tiny-vl-dense").save_pretrained("folder")
    (tmp_path / "run.yaml").write_text(
        f"model: {{{model}}}\ndata: {{train: x.jsonl}}\ndeepspeed: zero2\n"
        "train: {steps: 1, global_batch_size: 8, precision: bf16}\n"
    )
    status, out, err = command(capsys, "--config", "run.yaml", "--json", "plan.json")
    assert status == 0 and not err and out.startswith(f"{model.split()[1]} on 8 GPUs") and "\nfits\n" in out
    found = json.loads(Path("plan.json").read_text())
    assert found["model"] == model.split()[1] and found["plans"][0]["device_bytes"]["weights"] < 2**21


@pytest.mark.parametrize("place", [".", "missing/plan.json"])
def test_a_report_that_cannot_be_written_is_one_line(capsys, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(capsys, SMALL, "--json", place)
    assert status == 2 and err.startswith(f"error: cannot write --json {place}: ") and err.count("\n") == 1


def test_the_shipped_run_of_eight_gpus_fits_and_would_not_with_eight_times_the_tokens(capsys, tmp_path):
    shipped = Path(plans.__file__).parents[1] / "ds_configs/runs/qwen3_vl_30b_a3b_ep8.yaml"
    longer = tmp_path / "longer.yaml"
    longer.write_text(shipped.read_text().replace("max_length: 2048", "max_length: 16384"))
    for file, said in ((shipped, "\nfits\n"), (longer, "\nDOES NOT FIT\n")):
        assert said in command(capsys, SMALL, "--config", file, "--gpus", 8)[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--gpus", "8,x"), "--gpus 8,x: must be whole numbers above 0"),
        (("--gpus", 6, "--ep-size", 4), "EP 4 does not suit 6 GPUs and the model's 128 experts; use 1 or 2"),
        (("--zero", 2, "--offload"), "--offload with ZeRO-2"),
        (("--offload-activations",), "--offload-activations moves what --checkpointing keeps: give both"),
        (("--rows", 8192, "--micro-batch", 2), "--rows packs samples"),
        (("--rows", 2048), "--rows 2048 is less than --sequence 4096: a sample is never cut"),
        (("no-such-folder",), "no-such-folder"),
        (("--config", "run.yaml", "--sweep"), "give one of them"),
    ],
)
def test_mistakes_are_one_line(capsys, words, complaint):
    status, _, err = command(capsys, *words)
    assert status == 2 and err.startswith("error: ") and complaint in err and err.count("\n") == 1


def test_sweep_has_every_plan_and_one_recommendation(capsys, tmp_path):
    file = tmp_path / "plans.json"
    status, out, _ = command(capsys, SMALL, "--gpus", "8,16", "--sweep", "--checkpointing", "--json", file)
    assert status == 0 and out.count("fits, recommended") == 2 and "does not fit" in out
    report = json.loads(file.read_text())["gpus"]
    assert [len(report[count]) for count in ("8", "16")] == [4 * 5, 5 * 5]
    for forecasts in report.values():
        assert all(one["fits"] == (one["total_bytes"] <= 0.9 * 80 * GIB) for one in forecasts)


def forecast(total: float, fits: bool = True, **plan) -> plans.Forecast:
    memory = plans.Memory({"weights": int(total)}, {}, "the loss goes back")
    return plans.Forecast(plans.Plan(**{"gpus": 16, "ep_size": 8, "stage": 3, **plan}), memory, fits)


def test_recommended_trains_all_without_offload_within_a_node_if_it_can():
    best = forecast(1, stage=1)
    others = [forecast(1, lora=16, stage=1), forecast(1, offload=True), forecast(1), forecast(1, ep_size=4, stage=1)]
    others += [forecast(1, ep_size=16, stage=1), forecast(1, fits=False, stage=1)]
    assert plans.recommended([*others, best]) is best
    assert plans.recommended(others[:2]) is others[1]
    assert plans.recommended([forecast(1, fits=False)]) is None
