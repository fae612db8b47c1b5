"""Activation offload under ZeRO and expert parallelism; alone, in tests/engine."""

import pytest

from ds_moe.models.presets import preset_config
from tests.launcher import run_ranks

TEXT_LAYERS = preset_config("tiny-vl-moe").get_text_config().num_hidden_layers


@pytest.mark.slow
def test_a_step_is_the_same_to_the_last_bit():
    rows = run_ranks("tests/distributed/activation_offload_ranks.py", 2).json["rows"]
    assert list(rows) == ["ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3, frozen vision", "ZeRO 3, LoRA"]
    for name, (equal, tensors, moved, restored, kept) in rows.items():
        assert equal and tensors > 8, name
        assert moved == restored >= TEXT_LAYERS - 1 and kept == 1, name
