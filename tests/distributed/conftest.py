"""The model that is trained on any number of ranks."""

from pathlib import Path

import pytest
from transformers import Qwen3VLMoeForConditionalGeneration

from ds_moe.models.presets import preset_config
from ds_moe.models.processor import save_processor, tiny_processor

EXPERTS = 30  # which EP 3 and 5 divide too


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tiny Qwen3-VL-MoE of 30 experts."""
    folder = tmp_path_factory.mktemp("model")
    config = preset_config("tiny-vl-moe")
    config.text_config.num_experts = EXPERTS
    Qwen3VLMoeForConditionalGeneration._from_config(config).save_pretrained(folder)
    save_processor(tiny_processor("vl"), folder)
    return folder
