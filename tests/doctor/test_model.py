"""What the doctor says of a model: its experts, its files, the steps of a run over it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ds_moe.config.check import warmup_problem
from ds_moe.config.run_file import load_run
from ds_moe.doctor.model import check_experts, check_files
from ds_moe.doctor.run import check_intervals
from ds_moe.models.presets import preset_config
from ds_moe.weights.files import SafetensorsFiles
from tests.doctor.broken_run import case_of, checkpoint, doctor, edit


def test_an_ep_size_is_advised_that_divides_ranks_and_experts(healthy, capsys):
    edit("ep_size: 2", "ep_size: 4")
    edit("global_batch_size: 16", "global_batch_size: 24")
    _, [line], _ = doctor(capsys, world=6)
    assert line == "error    run.yaml:7: moe.ep_size 4 does not divide the 6 ranks (1, 2 do, and the model's 8 experts)"
    edit("ep_size: 4", "ep_size: 3")
    code, lines, _ = doctor(capsys, world=6)
    assert code == 1
    assert lines == [
        "error    run.yaml:7: moe.ep_size 3 does not divide the model's 8 experts (1, 2 do, and the 6 ranks)"
    ]
    edit("ep_size: 3", "ep_size: 4")  # of a model of nine, on three: two lines, and one advice
    checkpoint(num_experts=9)
    edit("global_batch_size: 24", "global_batch_size: 12")
    _, lines, _ = doctor(capsys, world=3)
    assert [line.partition("(")[2] for line in lines] == [
        "1, 3 do, and the 3 ranks)",
        "1, 3 do, and the model's 9 experts)",
    ]


def test_slow_expert_implementations_are_warned_about(healthy, capsys):
    checkpoint()
    values = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**values, "experts_implementation": "batched_mm"}))
    _, lines, _ = doctor(capsys)
    assert any("experts_implementation is batched_mm, about 100 times slower" in line for line in lines)


def test_layouts_are_told_by_headers(healthy):
    save_file({"x.experts.down_proj": np.zeros((8, 48, 64), np.float32)}, "model.safetensors")
    assert SafetensorsFiles.of_folder(healthy).shapes == {"x.experts.down_proj": (8, 48, 64)}
    case = case_of(folder=str(healthy), model=preset_config("tiny-vl-moe"))
    assert [finding.level for finding in check_files(case)] == ["ok"]
    assert "hub layout" in next(check_files(case)).text


@pytest.mark.parametrize(("gate_up", "level"), [((8, 64, 128), "error"), ((8, 128, 64), "warning")])
def test_a_square_down_proj_is_told_by_the_other_matrix(healthy, gate_up, level):
    shapes = {"x.experts.down_proj": (8, 64, 64), "x.experts.gate_up_proj": gate_up}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, "model.safetensors")
    model = preset_config("tiny-vl-moe")
    model.text_config.moe_intermediate_size = 64
    finding = next(check_files(case_of(folder=str(healthy), model=model)))
    assert finding.level == level and "hidden_size 64 = moe_intermediate_size" in finding.text


def test_epochs_and_records_give_the_steps(healthy):
    case = case_of("train.steps=null", "train.epochs=2", "monitor.log_every=9", records=64, tokens_a_sample=1)
    assert case.steps == 8
    assert "monitor.log_every 9 is longer than the run of 8 steps" in next(check_intervals(case)).text
    case.model = preset_config("tiny-vl-moe")
    assert next(check_experts(case)).level == "warning"


def test_a_warm_up_longer_than_the_epochs_is_found(healthy, capsys):
    edit("steps: 100", "epochs: 1\n  warmup_steps: 270")
    code, lines, _ = doctor(capsys)
    assert code == 1
    assert lines == ["error    run.yaml:11: train.warmup_steps 270 takes all of the run's 270 steps; make it smaller"]
    config = load_run("run.yaml")
    assert warmup_problem(config, 271) is None
    assert warmup_problem(config, 270) == lines[0].removeprefix("error").strip()
