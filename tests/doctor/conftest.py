import json
from pathlib import Path

import pytest

from tests.doctor.broken_run import BASE, ZERO3


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    """A run that the doctor finds nothing wrong with, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(BASE)
    Path("zero.json").write_text(json.dumps(ZERO3, indent=1))
    return tmp_path
