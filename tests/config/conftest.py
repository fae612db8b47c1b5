import json
from pathlib import Path

import pytest
import yaml

from ds_moe.config.run_file import load_run
from tests.config import deepspeed_run
from tests.config.run_text import BASE


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(text)` writes run.yaml beside a zero.json and goes to their folder, so that places read "run.yaml:3"."""
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text("{}")

    def write(text: str = BASE) -> str:
        Path("run.yaml").write_text(text)
        return "run.yaml"

    return write


@pytest.fixture
def with_json(tmp_path, monkeypatch):
    """`with_json(json, *overrides)`: a config whose zero.json holds `json`, text, or values with ZeRO stage 3 added."""
    monkeypatch.chdir(tmp_path)

    def make(values: dict | str, *overrides: str):
        if isinstance(values, dict):
            values = json.dumps({"zero_optimization": {"stage": 3}, **values}, indent=2)
        Path("zero.json").write_text(values)
        Path("run.yaml").write_text(deepspeed_run.BASE)
        return load_run("run.yaml", list(overrides))

    return make


@pytest.fixture
def with_section(with_json):
    """`with_section(values, *overrides)`: a config with these values in the section `deepspeed`, from line 10 on."""

    def make(values: dict, *overrides: str):
        with_json({})
        section = yaml.safe_dump({"deepspeed": {"zero_optimization": {"stage": 3}, **values}}, sort_keys=False)
        Path("run.yaml").write_text(deepspeed_run.BASE.replace("deepspeed: zero.json\n", section))
        return load_run("run.yaml", list(overrides))

    return make
