"""The doctor: broken runs get one correct line each and a non-zero exit, the shipped demo gets none."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from ds_moe.cli import main
from ds_moe.config.check import warmup_problem
from ds_moe.config.run_file import load_run
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.data.stream import TrainStream
from ds_moe.doctor.case import Case, Device, Finding
from ds_moe.doctor.memory import _loading
from ds_moe.doctor.model import check_experts, check_files
from ds_moe.doctor.report import report
from ds_moe.doctor.run import check_intervals, versions
from ds_moe.memory.predict import LoadingMemory, predict_loading
from ds_moe.models.load import build_outline
from ds_moe.models.presets import PRESETS, build_preset, preset_config
from ds_moe.models.processor import CHAT_TEMPLATE, save_processor, tiny_processor
from ds_moe.weights.files import SafetensorsFiles
from tests.data.templates import with_template

DEMO = Path("ds_configs/runs/demo.yaml").resolve()
ZERO3 = {"zero_optimization": {"stage": 3}}
BASE = """\
model:
  preset: tiny-vl-moe
data:
  train: digits
  max_length: 64
moe:
  ep_size: 2
train:
  precision: fp32
  steps: 100
  micro_batch_size: 4
  global_batch_size: 16
deepspeed: zero.json
"""


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    """A run that the doctor finds nothing wrong with, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(BASE)
    Path("zero.json").write_text(json.dumps(ZERO3, indent=1))
    return tmp_path


def doctor(capsys, *arguments: str, world: int = 2) -> tuple[int, list[str], str]:
    """(exit code, lines of errors and warnings, everything printed)."""
    code = main(["doctor", "run.yaml", "--world", str(world), "--samples", "2", *arguments])
    output = capsys.readouterr().out
    return code, [line for line in output.splitlines() if line.startswith(("error", "warning"))], output


def edit(old: str, new: str) -> None:
    text = Path("run.yaml").read_text()
    assert old in text
    Path("run.yaml").write_text(text.replace(old, new))


def packed_rows(tokens: int) -> None:
    edit("micro_batch_size: 4", f"tokens_per_micro_batch: {tokens}")


def zero(**sections) -> None:
    Path("zero.json").write_text(json.dumps({**ZERO3, **sections}, indent=1))


def checkpoint(tensors: dict[str, tuple[int, ...]] | None = None, **text) -> None:
    """A folder `model` with the tiny preset's config (fields of its text model changed), processor and tensors."""
    config = preset_config("tiny-vl-moe")
    for key, value in text.items():
        setattr(config.get_text_config(), key, value)
    config.save_pretrained("model")
    save_processor(tiny_processor("vl"), "model")
    arrays = {name: np.zeros(shape, np.float32) for name, shape in (tensors or {"a": (1,)}).items()}
    save_file(arrays, "model/model.safetensors")
    edit("preset: tiny-vl-moe", "path: model")


def records(*lines: str) -> None:
    """bad/data.jsonl: thirty good records of one image, then `lines`."""
    Path("bad").mkdir()
    Image.new("RGB", (16, 16)).save("bad/gray.png")
    turns = [{"role": "user", "content": "<image>Which digit is this?"}, {"role": "assistant", "content": "7"}]
    good = json.dumps({"messages": turns, "images": ["gray.png"]})
    Path("bad/data.jsonl").write_text("\n".join([*[good] * 30, *lines]) + "\n")
    edit("train: digits", "train: bad/data.jsonl")


def square_in_hub_layout() -> None:
    shapes = {"gate_up_proj": (8, 64, 64), "down_proj": (8, 32, 64)}
    names = {f"model.language_model.layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
    checkpoint(names, moe_intermediate_size=32)


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


def test_too_little_memory_is_an_error_with_the_table_and_what_helps(healthy, capsys):
    code, lines, output = doctor(capsys, "--device-memory", "102.4MB")
    assert code == 1 and "0.1 GiB are there (--device-memory); try train.gradient_checkpointing true" in lines[-1]
    assert "activations" in output and "runtime" in output and "accelerators of 0.1 GiB (--device-memory)" in output


def test_this_machine_s_disk_is_no_error_for_a_job_elsewhere(healthy, capsys, monkeypatch):
    monkeypatch.setattr("ds_moe.checkpoint.room.free_bytes", lambda folder: 10**4)
    code, lines, _ = doctor(capsys)
    assert code == 1 and lines[-1].startswith("error ") and "10 kB are free" in lines[-1]
    _, lines, _ = doctor(capsys, "--device-memory", "3GB")
    [line] = [line for line in lines if "10 kB are free" in line]
    assert line.startswith("warning ")


def test_the_longest_packed_rows_are_named(healthy, capsys):
    """In place of rows that do not fit, and beside those that do; a run with the rows that are named fits."""
    edit("  max_length: 64", "  max_length: 64\n  packing: true")
    edit("micro_batch_size: 4", "tokens_per_micro_batch: 128")
    edit("precision: fp32", "precision: bf16\n  gradient_checkpointing: true")
    code, lines, output = doctor(capsys, "--device-memory", "3GB")
    fits = int(re.search(r"; rows of up to (\d+) tokens fit \(train.tokens_per_micro_batch\)", output)[1])
    assert code == 0 and fits > 128
    longer = f"train.tokens_per_micro_batch={fits + 256}"
    code, lines, _ = doctor(capsys, "--device-memory", "3GB", longer)
    [line] = (line for line in lines if line.startswith("error"))
    assert code == 1 and line.startswith(f"error    override {longer}: memory: about 2.7 GiB a rank; 3.0 GiB")
    knobs = f"try train.offload_activations true, train.tokens_per_micro_batch {fits}, the most that fits, deepspeed"
    assert knobs in line
    assert doctor(capsys, "--device-memory", "3GB", f"train.tokens_per_micro_batch={fits}")[0] == 0
    [line] = (line for line in doctor(capsys, "--device-memory", "102.4MB")[1] if line.startswith("error"))
    assert "true, deepspeed" in line and "the most that fits" not in line


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


def test_special_tokens_in_texts_are_named_with_the_key_that_keeps_them_whole(healthy, capsys, monkeypatch):
    processor = with_template(CHAT_TEMPLATE, "vl", special=("<|box_start|>", "<|box_end|>"))
    monkeypatch.setattr("ds_moe.models.processor.tiny_processor", lambda kind: processor)
    records()
    path = Path("bad/data.jsonl")
    path.write_text(path.read_text().replace('"7"', '"<|box_start|>7<|box_start|>"', 1))
    code, lines, _ = doctor(capsys)
    assert code == 0 and len(lines) == 1
    assert "<|box_start|> 2 times (first at bad/data.jsonl:1)" in lines[0]
    assert lines[0].endswith('; data.content_tokens: ["<|box_start|>"] keeps them whole')
    edit("max_length: 64", 'max_length: 64\n  content_tokens: ["<|box_start|>"]')
    assert doctor(capsys)[:2] == (0, [])
    path.write_text(path.read_text().replace("Which digit", "<|im_start|>Which digit", 1))
    _, [line], _ = doctor(capsys)
    assert "<|im_start|> 1 times" in line and line.endswith("; the chat template uses them, so they stay text")
    edit('["<|box_start|>"]', '["<|im_end|>"]')
    code, lines, _ = doctor(capsys)
    assert code == 1 and "data.content_tokens: '<|im_end|>' is a control token of the chat template" in lines[0]


def test_lines_about_bad_records_name_what_helps(healthy, capsys):
    skip = "; data.on_bad_record: skip goes on without"
    image = '{"messages": [{"role": "user", "content": "<image>"}], "images": ["%s.png"]}'
    records("{", *(image % number for number in range(6)), image % "../outside")
    _, lines, _ = doctor(capsys)
    assert len(lines) == 6 and all(line.endswith(skip) for line in lines)
    assert all("; set data.root)" in line for line in lines[1:5]) and "and 3 more bad records" in lines[5]
    edit("max_length: 64", "max_length: 64\n  on_bad_record: skip")
    code, lines, _ = doctor(capsys)
    assert code == 0 and len(lines) == 6 and not any(skip in line for line in lines)


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
    case = _case(folder=str(healthy), model=preset_config("tiny-vl-moe"))
    assert [finding.level for finding in check_files(case)] == ["ok"]
    assert "hub layout" in next(check_files(case)).text


GATES = {  # what stands in section gate, from line 13 -> how the complaint begins
    "adapters_in: nowhere": "run.yaml:13: nowhere: no such folder of adapters",
    "adapters: {one: x, two: y}": "run.yaml:13: adapter 'one': x holds no adapter_config.json",
    "width: 8\n  adapters_in: nowhere\n  adapters: {'a/b': x}": "run.yaml:15: adapter name 'a/b' cannot name a folder",
}


@pytest.mark.parametrize("model", ["tiny-vl-dense", "not/here"])
@pytest.mark.parametrize("section, expected", GATES.items())
def test_a_gates_mistake_is_reported_once_and_at_its_own_key(healthy, capsys, section, expected, model):
    edit("preset: tiny-vl-moe", f"preset: {model}" if model in PRESETS else f"path: {model}")
    edit("moe:\n  ep_size: 2\n", "task: gate\n")
    edit("train: digits", "train: routed.jsonl")
    edit("deepspeed: zero.json", f"gate:\n  {section}\ndeepspeed: zero.json")
    code, lines, _ = doctor(capsys)
    [error] = [line for line in lines if line.startswith("error")]
    assert code == 1 and error.startswith(f"error    {expected}")


def test_a_text_layer_that_a_gates_model_lacks_is_reported_at_its_key(healthy, capsys):
    edit("tiny-vl-moe", "tiny-vl-dense")
    edit("moe:\n  ep_size: 2\n", "task: gate\n")
    edit("deepspeed: zero.json", "gate:\n  adapters_in: x\n  text: layer\n  text_layer: 9\ndeepspeed: zero.json")
    _, lines, _ = doctor(capsys)
    assert "error    run.yaml:15: gate.text_layer 9 exceeds the model's 2 layers" in lines


@pytest.mark.parametrize(("gate_up", "level"), [((8, 64, 128), "error"), ((8, 128, 64), "warning")])
def test_a_square_down_proj_is_told_by_the_other_matrix(healthy, gate_up, level):
    shapes = {"x.experts.down_proj": (8, 64, 64), "x.experts.gate_up_proj": gate_up}
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, "model.safetensors")
    model = preset_config("tiny-vl-moe")
    model.text_config.moe_intermediate_size = 64
    finding = next(check_files(_case(folder=str(healthy), model=model)))
    assert finding.level == level and "hidden_size 64 = moe_intermediate_size" in finding.text


def test_epochs_and_records_give_the_steps(healthy):
    case = _case("train.steps=null", "train.epochs=2", "monitor.log_every=9", records=64, tokens_a_sample=1)
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


class _Accelerator:
    """Stands for torch's module of a device that does, or does not, tell its memory."""

    def __init__(self, memory: int | None):
        if memory is not None:
            self.get_device_properties = lambda index: SimpleNamespace(total_memory=memory, name="Model 9")


@pytest.mark.parametrize(
    "kind, memory, expected",
    [
        ("xpu", 2**34, "this machine's Model 9"),
        ("mps", None, "this machine's accelerator (mps) does not tell its memory; give --device-memory GIB, or set"),
        (None, None, "DS_ACCELERATOR is 'cuda', but this machine has no accelerator; give --device-memory GIB, or set"),
    ],
)
def test_accelerators_other_than_cuda_end_in_a_line(healthy, capsys, monkeypatch, kind, memory, expected):
    monkeypatch.setenv("DS_ACCELERATOR", kind or "cuda")
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr("torch.get_device_module", lambda device: _Accelerator(memory))
    code, lines, output = doctor(capsys)
    if memory is None:
        assert code == 1 and len(lines) == 1 and lines[0].startswith(f"error    {expected}")
    else:
        assert f"16.0 GiB are there ({expected})" in output


def test_memory_at_the_start_is_compared_before_anything_is_sharded(healthy, monkeypatch):
    """Of a preset, by hand: the host holds every weight of every rank, the device the rest and half of the experts."""
    config = load_run("run.yaml")
    model = build_outline(preset_config("tiny-vl-moe"))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    assert predict_loading(model, config, ZeroPlan(stage=3, bf16=True), 4) == LoadingMemory(
        host=2 * total, device=2 * (total - experts // 2)
    )

    def findings(device: Device, stage: int = 3, free: int = 2**40) -> list[Finding]:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
        case = Case(config, 16, device, samples=2)
        return list(_loading(case, ZeroPlan(stage, bf16=True), LoadingMemory(host=40 * 2**30, device=10 * 2**30)))

    small, large = Device(False, 11 * 2**30, "test"), Device(False, 12 * 2**30, "test")
    assert [one.level for one in findings(large)] == ["ok"]
    assert [one.level for one in findings(small)] == ["error", "ok"] and "raise moe.ep_size" in findings(small)[0].text
    assert [one.level for one in findings(small, stage=2)] == ["ok"]  # there the peak is what exceeds
    [host] = findings(large, free=350 * 2**30)
    assert host.level == "warning" and "40.0 GiB x 8 ranks of a host = 320.0 GiB; 350.0 GiB are free" in host.text
    assert "x 16 ranks of a host" in findings(Device(True, 1, "test"))[0].text


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


def _case(*overrides: str, **known) -> Case:
    return Case(load_run("run.yaml", list(overrides)), 2, Device(True, 2**33, "test"), samples=2, **known)


SECTION = "moe:\n  ep_size: 2\n"
MIXED = {  # section moe, the model -> the complaint, its place before it
    "experts, no section": ("", "tiny-vl-moe", "run.yaml: a qwen3_vl_moe model has experts but the run has no moe"),
    "a dense model and the section": (SECTION, "tiny-vl-dense", "run.yaml:6: section moe would not be used"),
    "a text model": (SECTION, "tiny-moe", "run.yaml:2: task gate needs a vision-language model"),
}


def gated_run(section, model):
    """A run of task gate, whose adapters do nothing."""
    for name in ("one", "two"):
        settings = peft.LoraConfig(target_modules=r".*language_model.*q_proj")
        peft.get_peft_model(build_preset("tiny-vl-moe"), settings).save_pretrained(Path("adapters", name))
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    Path("routed.jsonl").write_text((json.dumps({"messages": chat, "adapter": "one"}) + "\n") * 16)
    edit("tiny-vl-moe", model)
    edit(SECTION, section)
    edit("train: digits", "train: routed.jsonl")
    edit("deepspeed: zero.json", "task: gate\ngate:\n  adapters_in: adapters\ndeepspeed: zero.json")


@pytest.mark.parametrize(("section", "model", "complaint"), MIXED.values(), ids=MIXED)
def test_a_gate_and_its_model_must_agree_on_experts(healthy, capsys, section, model, complaint):
    gated_run(section, model)
    code, lines, _ = doctor(capsys)
    errors = [line for line in lines if line.startswith("error")]
    assert code == 1 and len(errors) == 1 and errors[0].startswith(f"error    {complaint}")
    assert main(["gate", "eval", "run.yaml"]) == 2  # and where it is loaded
    assert capsys.readouterr().err.startswith(f"error: {complaint}")


def test_a_gate_over_experts_needs_zero_3(healthy, capsys):
    gated_run(SECTION, "tiny-vl-moe")
    zero(zero_optimization={"stage": 3})
    code, lines, _ = doctor(capsys)
    assert code == 0 and not any("barely train" in line for line in lines)  # its experts learn nothing
    zero(zero_optimization={"stage": 2})
    code, lines, _ = doctor(capsys)
    text = "task gate freezes all experts, which DeepSpeed cannot do at ZeRO stage 2; use stage 3"
    assert [line for line in lines if line.startswith("error")] == [f"error    run.yaml:13: {text}"]


@pytest.mark.parametrize("rewards, level", [([1, 1, 0, 0], "warning"), ([1, 0, 0, 1], "ok")])
def test_rollouts_that_teach_nothing_are_warned_of(healthy, capsys, rewards, level):
    record = {"tokens": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "logprobs": [-0.5, -1.5]}
    outcomes = zip("aabb" * 8, rewards * 8, strict=True)
    lines = [json.dumps(record | {"group": group, "reward": reward}) for group, reward in outcomes]
    Path("rollouts.jsonl").write_text("\n".join(lines))
    edit("train: digits", "train: rollouts.jsonl")
    edit("deepspeed: zero.json", "task: rl\ndeepspeed: zero.json")
    _, lines, everything = doctor(capsys)
    equal = 2 if level == "warning" else 0
    assert f"rewards   mean 0.5, std 0.5, 0 to 1 over 32 rollouts; equal in {equal} of 2 groups" in everything
    warned = [line for line in lines if "teaches nothing" in line]
    assert len(warned) == (level == "warning")
    assert all(line.startswith("warning  run.yaml:4: data.train: a group of equal rewards") for line in warned)


def test_packed_rows_are_told_from_some_records_or_from_all_that_a_run_has_counted(healthy, capsys):
    edit("max_length: 64", "max_length: 64\n  packing: true")
    packed_rows(128)
    edit("global_batch_size: 16", "global_batch_size: 64\n  output_dir: out")
    code, lines, output = doctor(capsys)
    assert code == 0 and not lines, lines
    batch = next(line for line in output.splitlines() if "batch: packed into rows of 128 tokens: 64 samples" in line)
    found = next(line for line in output.splitlines() if "packing:" in line)
    assert batch and "% full" in found and "% of the critical path are real tokens (by the tokens of 2 records" in found
    config = load_run("run.yaml")
    TrainStream(config, tiny_processor("vl"), rank=0, world_size=2)
    assert "(by the tokens of all records" in doctor(capsys)[2]
    edit("tokens_per_micro_batch: 128", "tokens_per_micro_batch: 32")
    code, lines, _ = doctor(capsys)
    assert code == 1 and "train.tokens_per_micro_batch 32 is less than data.max_length 64" in lines[0]


def test_streamed_data_are_looked_at_without_a_pass(healthy, capsys):
    records("{broken")
    edit("max_length: 64", "max_length: 64\n  streaming: true")
    code, lines, output = doctor(capsys)
    assert code == 0 and not lines and "data.train: streamed: 0.0 MB in 1 file, about 31 records" in output
    edit("micro_batch_size: 4", "tokens_per_micro_batch: 512")
    code, lines, output = doctor(capsys, "data.packing=true")
    assert code == 0 and "packing: " in output


def test_what_an_epoch_has_of_each_source_is_said(healthy, capsys):
    line = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]})
    Path("some.jsonl").write_text(f"{line}\n" * 40)
    edit(
        "  train: digits\n",
        "  train: [{path: digits, weight: 1}, {path: some.jsonl, weight: 3}]\n  mixture: {epoch: shortest}\n",
    )
    code, found, output = doctor(capsys)
    assert (code, found) == (0, [])
    assert "an epoch has 53 records: digits 13 (24.5%; has 4,311), some 40 (75.5%; has 40)" in " ".join(output.split())
    edit("weight: 1}", "weight: 0.001}")
    code, [complaint], _ = doctor(capsys)
    assert code == 1 and "run.yaml:4: data: an epoch of 40 records has none of 'digits'" in complaint
