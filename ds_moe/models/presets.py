"""Tiny models built from a config, for the demo, the tests and first steps: no download is needed.

Their experts are not square, so that no mistake in the layout of a weight goes unnoticed.
"""

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_moe.errors import UserError
from ds_moe.models.families import FAMILIES, PRESETS, family_of
from ds_moe.models.processor import special_token_ids, tiny_processor

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_VISION = {
    "depth": 2,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}


def preset_config(name: str) -> PretrainedConfig:
    """The transformers config of a preset. Raises `UserError` for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} is unknown; choose one of {sorted(PRESETS)}")
    model_type = PRESETS[name]
    family = FAMILIES[model_type]
    processor = tiny_processor("vl" if family.vision else "text")
    ids = special_token_ids(processor)
    text = {**_TEXT, **(_MOE if family.moe else {}), **family.tiny.get("text", {})}
    text["vocab_size"] = len(processor.tokenizer)
    text |= {key: ids.pop(key) for key in ("pad_token_id", "eos_token_id")}
    if family.vision is None:
        return AutoConfig.for_model(model_type, **text)
    text["rope_parameters"] = _ROPE
    return AutoConfig.for_model(
        model_type, text_config=text, vision_config={**_VISION, **family.tiny.get("vision", {})}, **ids
    )


def build_preset(name: str, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A freshly initialised fp32 model, the same on every rank for one seed."""
    config = preset_config(name)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family_of(config).model_class(config)
