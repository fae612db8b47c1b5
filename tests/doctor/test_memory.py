"""What the doctor says of memory: of a step, at the start, and on accelerators of any kind."""

import re
from types import SimpleNamespace

import pytest
import torch

from ds_moe.config.run_file import load_run
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.doctor.case import Case, Device, Finding
from ds_moe.doctor.memory import _loading
from ds_moe.memory.predict import LoadingMemory, predict_loading
from ds_moe.models.load import build_outline
from ds_moe.models.presets import preset_config
from tests.doctor.broken_run import doctor, edit


def test_too_little_memory_is_an_error_with_the_table_and_what_helps(healthy, capsys):
    code, lines, output = doctor(capsys, "--device-memory", "102.4MB")
    assert code == 1 and "0.1 GiB are there (--device-memory); try train.gradient_checkpointing true" in lines[-1]
    assert "activations" in output and "runtime" in output and "accelerators of 0.1 GiB (--device-memory)" in output


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
