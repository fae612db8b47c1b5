import sys

import pytest

from tests.launch.stand_ins import FAKE_TRAIN, ROOT, write_run


@pytest.fixture
def fake_train(tmp_path):
    """Environment in which `ds_moe.train` is FAKE_TRAIN; each rank leaves a file in tmp_path/seen."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for folder in ["ds_moe", "seen", "bin"]:
        (tmp_path / folder).mkdir()
    # The rest of the package is the real one.
    (tmp_path / "ds_moe/__init__.py").write_text(f"__version__ = ''\n__path__.append({str(ROOT / 'ds_moe')!r})")
    (tmp_path / "ds_moe/train.py").write_text(FAKE_TRAIN)
    write_run(tmp_path)
    return {
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
        "THEN": "end",
        "DS_ACCELERATOR": "cpu",
    }
