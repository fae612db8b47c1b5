"""The benchmark's model: a Qwen3-VL-MoE small enough for two cores, in which the parts weigh as in the real one.

Its widths are those of Qwen3-VL-30B-A3B over 8 (128 experts and 8 of them a token stay), its layers 4 instead of 48.
Vocabulary and vision tower are then chosen so that head, decoder and tower have the real model's shares of the FLOPs
of the benchmark's own records; `flops.py` counts them.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Qwen3VLMoeForConditionalGeneration

from ds_moe.data.processor import Processor
from ds_moe.models.processor import save_processor, special_token_ids

ROPE = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True}
REAL_TEXT = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 262144},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    **{"rope_parameters": ROPE | {"mrope_section": [24, 20, 20]}, "tie_word_embeddings": False},
}
REAL_VISION = {
    **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048},
    **{"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
    **{"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
}
SMALL_TEXT = REAL_TEXT | {
    **{"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 1920},
    **{"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 8192},
    **{"moe_intermediate_size": 96, "rope_parameters": ROPE | {"mrope_section": [12, 10, 10]}},
}
SMALL_VISION = REAL_VISION | {
    **{"depth": 1, "hidden_size": 112, "intermediate_size": 416, "num_heads": 2, "out_hidden_size": 256},
    **{"deepstack_visual_indexes": [0]},
}


def real_config() -> PretrainedConfig:
    """Qwen3-VL-30B-A3B's, as far as FLOPs depend on it."""
    return AutoConfig.for_model("qwen3_vl_moe", text_config=dict(REAL_TEXT), vision_config=dict(REAL_VISION))


def small_config(processor: Processor | None = None) -> PretrainedConfig:
    """The benchmark's, with the ids of a processor's special tokens."""
    ids = special_token_ids(processor) if processor is not None else {}
    text = SMALL_TEXT | {key: ids.pop(key) for key in ("pad_token_id", "eos_token_id") if key in ids}
    return AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=dict(SMALL_VISION), **ids)


def save_model(folder: Path, processor: Processor) -> None:
    """Random weights, the same in every call, and the processor."""
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(small_config(processor))
    model.save_pretrained(folder)
    save_processor(processor, folder)


def plain_model(folder: Path) -> PreTrainedModel:
    """transformers' own, with grouped_mm experts, ready for training."""
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="grouped_mm"
    ).train()
