"""A short run file, and what is said of it."""

import pytest

from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError

BASE = """\
model:
  preset: tiny-vl-moe
data:
  train: digits
moe:
  ep_size: 2
train:
  steps: 10
deepspeed: zero.json
"""


def complaint(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_run(path, list(overrides))
    message = str(raised.value)
    assert "\n" not in message
    return message
