"""What the doctor says of kernels, threads and the allocator, on the shipped demo."""

import os
from pathlib import Path

import pytest

from ds_moe.cli import main
from ds_moe.doctor import model
from ds_moe.moe.backends import optional
from ds_moe.moe.backends.megablocks import Megablocks

DEMO = Path("ds_configs/runs/demo.yaml").resolve()


def doctor(capsys, *overrides: str) -> tuple[int, list[str], str]:
    """(exit code, lines of errors and warnings, everything printed)."""
    code = main(["doctor", str(DEMO), "--world", "2", "--samples", "2", *overrides])
    output = capsys.readouterr().out
    return code, [line for line in output.splitlines() if line.startswith(("error", "warning"))], output


@pytest.mark.parametrize("backend, missing", [("megablocks", "stk"), ("liger", "liger_kernel")])
def test_kernels_that_cannot_run_here_are_an_error_with_the_fix(capsys, monkeypatch, backend, missing):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    override = f"moe.experts.backend={backend}"
    code, [line], _ = doctor(capsys, override)
    assert code == 1 and line.startswith(f"error    override {override}: moe.experts.backend {backend}: ")
    assert line.endswith("; or use auto")
    found = optional.find_spec
    monkeypatch.setattr(optional, "find_spec", lambda name: None if name == missing else found(name))
    _, [line], _ = doctor(capsys, override)
    assert f"{missing} is not installed; pip install --no-deps" in line


def test_the_kernels_that_will_run_are_named(capsys, monkeypatch):
    _, _, output = doctor(capsys)
    assert "experts: backend grouped_mm (auto: torch's grouped GEMM" in output
    monkeypatch.setattr(Megablocks, "obstacle", lambda device: None)
    _, lines, output = doctor(capsys, "moe.experts.backend=megablocks")
    assert not lines
    assert "experts: backend megablocks: megablocks 0.10.0 with torch ops in place of megablocks_ops, torch" in output


def test_what_cpu_ranks_get_is_shown_and_too_many_threads_are_a_warning(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    code, lines, output = doctor(capsys)
    assert code == 0 and not lines
    assert "CPU ranks get OMP_NUM_THREADS=4, MALLOC_MMAP_THRESHOLD_=4294967296" in output
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    code, [line], _ = doctor(capsys)
    assert code == 0 and line.startswith("warning  OMP_NUM_THREADS=8 x 2 ranks is more than 8 cores")


def test_linear_attention_without_its_kernels_is_a_warning_where_they_could_run(capsys, monkeypatch):
    preset = "model.preset=tiny-qwen3.5-moe"
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    code, [line], _ = doctor(capsys, preset)
    assert code == 0 and "GiB a rank and activations, which are not predicted of qwen3_5_moe models" in line
    _, lines, _ = doctor(capsys, preset, "--device-memory", "80GB")
    [line] = [line for line in lines if "linear attention" in line]
    assert "1 of 3 layers have linear attention; flash-linear-attention and causal-conv1d cannot be imported" in line
    monkeypatch.setattr(model, "find_spec", lambda name: object())
    _, lines, _ = doctor(capsys, preset, "--device-memory", "80GB")
    assert not [line for line in lines if "linear attention" in line]


def test_packed_rows_of_a_family_with_linear_attention_are_refused_by_name(capsys):
    code, lines, _ = doctor(capsys, "model.preset=tiny-qwen3.5-moe", "data.packing=true")
    assert code == 1 and any(
        "data.packing: samples in one row of a qwen3_5_moe model may mix" in line for line in lines
    )
