"""A run whose DeepSpeed JSON is at fault, and what is said of it."""

from pathlib import Path

import pytest

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.errors import UserError

SHIPPED = sorted(Path("ds_configs").resolve().glob("*.json"))
BASE = """\
model: {preset: tiny-vl-moe}
data: {train: digits}
moe: {ep_size: 2}
train:
  steps: 10
  micro_batch_size: 4
  global_batch_size: 32
  lr: 3e-3
  weight_decay: 0.1
deepspeed: zero.json
"""


def complaint(config, world_size: int = 2) -> str:
    with pytest.raises(UserError) as raised:
        resolve_deepspeed(config, world_size, on_cpu=True)
    message = str(raised.value)
    assert "\n" not in message
    return message
