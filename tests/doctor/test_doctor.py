"""The doctor: broken runs get one correct line each and a non-zero exit, the shipped demo gets none."""

import io
import json
from pathlib import Path

import pytest

from ds_moe.cli import main
from ds_moe.doctor.case import Finding
from ds_moe.doctor.report import report
from ds_moe.doctor.run import versions
from tests.doctor.broken_run import checkpoint, doctor, edit, packed_rows, records, square_in_hub_layout, zero

DEMO = Path("ds_configs/runs/demo.yaml").resolve()


def missing_shard() -> None:
    checkpoint()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    Path("model/model.safetensors").unlink()  # it would be read, whatever the index says


def broken_shard() -> None:
    checkpoint()
    Path("model/model.safetensors").write_bytes(b"\xff" * 20)


def other_family() -> None:
    checkpoint()
    Path("model/config.json").write_text('{"model_type": "llama", "hidden_size": 64}')


# name -> (what to break, world size, the line)
BROKEN = {
    "unknown key": (
        lambda: edit("ep_size", "ep_sise"),
        2,
        "run.yaml:7: unknown key moe.ep_sise (did you mean moe.ep_size?)",
    ),
    "broken YAML": (lambda: edit("steps: 100", "steps: [100"), 2, "run.yaml:11: not valid YAML"),
    "wrong value": (lambda: edit("fp32", "fp64"), 2, "run.yaml:9: train.precision is 'fp64'; must be 'fp32' or 'bf16'"),
    "unused key": (
        lambda: edit("steps: 100", "steps: 100\n  eval_every: 5"),
        2,
        "run.yaml:11: train.eval_every would not be used: data.eval is not set",
    ),
    "no DeepSpeed JSON": (
        lambda: Path("zero.json").unlink(),
        2,
        "run.yaml:13: deepspeed is 'zero.json', which is neither",
    ),
    "broken JSON": (lambda: Path("zero.json").write_text("{\n'a': 1}"), 2, "zero.json:2: not valid JSON"),
    "conflict": (
        lambda: zero(train_micro_batch_size_per_gpu=8),
        2,
        "zero.json:5: train_micro_batch_size_per_gpu is 8, but run.yaml:11 train.micro_batch_size is 4;",
    ),
    "AutoEP": (
        lambda: zero(expert_parallel={"enabled": True}),
        2,
        "zero.json:5: expert_parallel is not supported: ds_moe installs",
    ),
    "leaf module": (
        lambda: zero(zero_optimization={"stage": 3, "leaf_module": {"classes": ["Qwen3VLMoeTextSparseMoeBlock"]}}),
        2,
        "zero.json:4: zero_optimization.leaf_module is not supported: ds_moe marks its layers itself",
    ),
    "EP and experts": (
        lambda: (edit("ep_size: 2", "ep_size: 3"), edit("global_batch_size: 16", "global_batch_size: 12")),
        3,
        "run.yaml:7: moe.ep_size 3 does not divide the model's 8",
    ),
    "EP and ranks": (
        lambda: edit("ep_size: 2", "ep_size: 4"),
        2,
        "run.yaml:7: moe.ep_size 4 does not divide the 2 ranks (1, 2 do, and the model's 8 experts)",
    ),
    "batch": (
        lambda: edit("global_batch_size: 16", "global_batch_size: 12"),
        2,
        "run.yaml:12: train.global_batch_size 12 is not a multiple of micro_batch_size 4 x 2 ranks = 8;",
    ),
    "no moe section": (
        lambda: edit("moe:\n  ep_size: 2\n", ""),
        2,
        "run.yaml: a qwen3_vl_moe model has experts but the run",
    ),
    "unknown preset": (
        lambda: edit("tiny-vl-moe", "tiny"),
        2,
        "run.yaml:2: model.preset 'tiny' is unknown; choose one of",
    ),
    "no such model": (
        lambda: edit("preset: tiny-vl-moe", "path: nowhere"),
        2,
        "run.yaml:2: model.path nowhere is no folder",
    ),
    "other family": (
        other_family,
        2,
        "run.yaml:2: model.path model: model_type 'llama' is not supported; supported: ",
    ),
    "frozen nothing": (
        lambda: edit("tiny-vl-moe", "tiny-vl-moe\n  freeze: [adapter]"),
        2,
        "run.yaml:3: model.freeze pattern 'adapter' matches no parameter",
    ),
    "frozen experts": (
        lambda: (edit("tiny-vl-moe", "tiny-vl-moe\n  freeze: [experts]"), zero(zero_optimization={"stage": 2})),
        2,
        "run.yaml:3: model.freeze freezes all experts, which DeepSpeed cannot do at ZeRO stage 2; use stage 3",
    ),
    "square experts": (
        square_in_hub_layout,
        2,
        "run.yaml:2: experts are square (hidden_size 64 = 2 x 32) and in hub layout",
    ),
    "missing shard": (
        missing_shard,
        2,
        "run.yaml:2: model lacks model-00001-of-00002.safetensors, which model.safetensors.index.json names",
    ),
    "broken shard": (broken_shard, 2, "run.yaml:2: model/model.safetensors is broken"),
    "missing data": (
        lambda: edit("train: digits", "train: none.jsonl"),
        2,
        "run.yaml:4: data: none.jsonl does not exist",
    ),
    "bad record": (lambda: records("{"), 2, "bad/data.jsonl:31: broken JSON"),
    "missing image": (
        lambda: records('{"messages": [{"role": "user", "content": "<image>"}], "images": ["x.png"]}'),
        2,
        "bad/data.jsonl:31: missing image 'x.png'",
    ),
    "over-long": (lambda: (records(), edit("max_length: 64", "max_length: 8")), 2, "bad/data.jsonl:1: over-long:"),
    "no checkpoint": (
        lambda: edit("steps: 100", "steps: 100\n  resume: runs/none"),
        2,
        "run.yaml:11: train.resume is 'runs/none'; must be auto, never or a checkpoint folder",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_gets_one_correct_line_and_a_non_zero_exit(healthy, capsys, name):
    break_it, world, expected = BROKEN[name]
    break_it()
    code, lines, _ = doctor(capsys, world=world)
    errors = [line.removeprefix("error").strip() for line in lines if line.startswith("error")]
    assert code == 1
    assert errors[0].startswith(expected)
    assert len(errors) == 1 or name == "over-long"  # there every record looked at is


def test_the_diagnoses_differ():
    lines = [expected for _, _, expected in BROKEN.values()]
    assert len(set(lines)) == len(lines) >= 10


def test_the_healthy_run_is_clean(healthy, capsys):
    code, lines, output = doctor(capsys)
    assert code == 0 and lines == [] and output.endswith("0 errors, 0 warnings\n")


def test_the_demo_is_clean(capsys):
    assert main(["doctor", str(DEMO), "--world", "2", "--samples", "4"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("0 errors, 0 warnings\n")
    assert "EP 2 x EDP 1, ZeRO 3" in output and "\033" not in output


def test_a_checkpoint_in_memory_layout_is_clean(healthy, capsys):
    shape = {"model.language_model.layers.0.mlp.experts.down_proj": (8, 64, 48)}
    checkpoint(shape)
    code, lines, output = doctor(capsys)
    assert code == 0 and lines == [] and "memory layout" in output


def test_overrides_are_examined_too(healthy, capsys):
    code, lines, _ = doctor(capsys, "train.lr=-1")
    assert code == 1 and lines == ["error    override train.lr=-1: train.lr is -1; must be greater than 0"]


def test_a_named_json_and_a_section_are_examined(healthy, capsys):
    Path("zero.json").unlink()
    edit("deepspeed: zero.json", "deepspeed: zero2")
    code, lines, output = doctor(capsys)
    assert code == 0 and lines == [] and "ZeRO 2" in output
    edit("deepspeed: zero2", "deepspeed:\n  zero_optimization: {stage: 3}\n  gradient_cliping: 1")
    code, lines, _ = doctor(capsys)
    wrong = "error    run.yaml:15: deepspeed: unknown key gradient_cliping (did you mean gradient_clipping?)"
    assert code == 1 and lines == [wrong]


WARNINGS = {
    "an offload on CPUs": (
        lambda: edit("steps: 100", "steps: 100\n  gradient_checkpointing: true\n  offload_activations: true"),
        "run.yaml:12: train.offload_activations moves nothing here: ranks on CPUs compute in host memory already",
    ),
    "a hub id that is not here": (
        lambda: edit("preset: tiny-vl-moe", "path: someone/a-model-not-here"),
        "run.yaml:2: model.path someone/a-model-not-here is not on this machine",
    ),
    "bf16 on CPUs": (lambda: edit("fp32", "bf16"), "run.yaml:9: train.precision bf16 is about 11 times slower"),
    "routing that plain transformers cannot repeat": (
        lambda: edit("ep_size: 2", "ep_size: 2\n  router: {scores: sigmoid}\n  balance: [{kind: loss_free}]"),
        "run.yaml:6: plain transformers cannot repeat moe.router.scores sigmoid, moe.balance loss_free: it sends",
    ),
    "the loop over experts": (
        lambda: edit("ep_size: 2", "ep_size: 2\n  experts: {backend: reference}"),
        "run.yaml:8: moe.experts.backend reference loops over the experts",
    ),
    "an interval beyond the run": (
        lambda: edit("deepspeed:", "checkpoint: {every: 500}\ndeepspeed:"),
        "run.yaml:13: checkpoint.every 500 is longer than the run of 100 steps",
    ),
    "samples beyond the model's positions": (
        lambda: edit("max_length: 64", "max_length: 5000"),
        "run.yaml:5: data.max_length 5000 exceeds the 4096 positions",
    ),
    "fewer records than a batch": (
        lambda: (records(), edit("global_batch_size: 16", "global_batch_size: 64")),
        "run.yaml:4: data.train bad/data.jsonl: 30 records do not fill one global batch of 64",
    ),
    "rows that are nearly empty": (
        lambda: edit("max_length: 64", "max_length: 64\n  packing: true") or packed_rows(4096),
        "run.yaml:13: packing: 2.0 rows a step (1.0 micro-batches a rank), ",
    ),
    "hardly any token an expert": (
        lambda: edit("micro_batch_size: 4\n  global_batch_size: 16", "micro_batch_size: 1\n  global_batch_size: 2"),
        "run.yaml:12: an expert sees about",
    ),
    "a short run": (lambda: edit("steps: 100", "steps: 2"), "run.yaml:10: an expert sees about 90 tokens a step"),
    "bad records to skip": (
        lambda: (records("{"), edit("max_length: 64", "max_length: 64\n  on_bad_record: skip")),
        "bad/data.jsonl:31: broken JSON",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_slow_or_odd_is_a_warning_and_no_error(healthy, capsys, name):
    break_it, expected = WARNINGS[name]
    break_it()
    code, lines, _ = doctor(capsys)
    assert code == 0, lines
    assert [line for line in lines if line.startswith(f"warning  {expected}")], lines


def test_this_machine_s_disk_is_no_error_for_a_job_elsewhere(healthy, capsys, monkeypatch):
    monkeypatch.setattr("ds_moe.checkpoint.room.free_bytes", lambda folder: 10**4)
    code, lines, _ = doctor(capsys)
    assert code == 1 and lines[-1].startswith("error ") and "10 kB are free" in lines[-1]
    _, lines, _ = doctor(capsys, "--device-memory", "3GB")
    [line] = [line for line in lines if "10 kB are free" in line]
    assert line.startswith("warning ")


def test_versions_outside_the_range_are_warned_about(monkeypatch):
    needs = ["torch>=99", "pyyaml>=1", "not-a-package>=1", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr("ds_moe.doctor.run.metadata.requires", lambda name: needs)
    found = list(versions())
    assert [finding.level for finding in found] == ["warning", "error", "ok"]
    assert "torch" in found[0].text and "not-a-package is not installed" in found[1].text


def test_colour_only_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    for out, coloured in ((Terminal(), True), (io.StringIO(), False)):
        assert report(iter([Finding("error", "no", ["more"])]), out) == 1
        assert ("\033[31merror" in out.getvalue()) is coloured and "more" in out.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    report(iter([Finding("ok", "yes")]), out := Terminal())
    assert "\033" not in out.getvalue()
