"""A tiny model of every family of transformers with experts, and a batch for it: padding, and an image if it takes any.

Only what differs between families stands here: a config takes of `COMMON` the keys that it has. Experts are not square,
and heads, groups and layers are as few as the family allows.
"""

import importlib
import re

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from ds_moe.models.processor import tiny_processor
from ds_moe.models.vl_processors import Glm4vProcessor

IMAGE, VIDEO, START, END = 150, 151, 152, 153  # token ids; words are below 140
COMMON = {
    **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160},
    **{"max_position_embeddings": 512, "model_max_length": 512, "sliding_window": 16, "attention_dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 40),
    **{"n_group": 2, "num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1},
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_head_dim": 16, "linear_num_heads": 4, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8},
    **{"num_nextn_predict_layers": 0, "num_mtp_layers": 0, "router_hidden_size": 16},
    **{"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_chunk_size": 16},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16},
}
DROPPED = object()
ALL_HEADS = {"num_key_value_heads": 4}
OWN = {
    **dict.fromkeys(
        ("axk1", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "mistral4"),
        ALL_HEADS,
    ),
    "axk2": {**ALL_HEADS, "n_group": None, "topk_group": None},
    "deepseek_v2": {**ALL_HEADS, "topk_method": "greedy"},
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 160},
    "glm5_next_text": {
        **ALL_HEADS,
        **{"index_kpool": 4, "qk_rope_head_dim": 0, "head_dim": 0, "linear_lower_bound": -5.0},
    },
    "jetmoe": {"kv_channels": 16, "num_key_value_heads": 4, "num_attention_heads": DROPPED, "head_dim": DROPPED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        **{**ALL_HEADS, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48},
        **{"moe_intermediate_size": DROPPED, "intermediate_size": DROPPED},
    },
    "minimax_m3_vl_text": {"dense_intermediate_size": 96, "rotary_dim": 8},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
        **{"moe_shared_expert_intermediate_size": 40, "num_hidden_layers": DROPPED, "hybrid_override_pattern": "ME*E"},
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
        **{"indexer_compress_ratio": 4, "hc_lowrank": 8, "hc_count": 2, "n_group": DROPPED},
    },
    "step3p5": {
        **{"n_routed_experts": 8, "num_local_experts": DROPPED, "mlp_layer_types": ["dense", *["sparse"] * 3]},
        **{"swiglu_limits": [None, None, 7.0, 7.0], "swiglu_limits_shared": [None, None, 7.0, 7.0]},
    },
    "zaya": {"num_experts_per_tok": 1},
}


def text_config(model_type: str, **keys: object) -> PretrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    known = {key for parent in kind.__mro__ for key in getattr(parent, "__annotations__", {})}
    values = {**{key: value for key, value in COMMON.items() if key in known}, **OWN.get(model_type, {}), **keys}
    return kind(**{key: value for key, value in values.items() if value is not DROPPED})


def _rope(**keys: object) -> dict[str, object]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], **keys}
    return {"rope_parameters": rope}


TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 4}
SQUARE = {**TOWER, "image_size": 16}  # sees images of 16 x 16 pixels
QWEN_TOWER = {
    **{"depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "patch_size": 4},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64},
}
GLM_TOWER = {key: value for key, value in QWEN_TOWER.items() if key != "num_position_embeddings"} | {"image_size": 16}
AUDIO_TOWER = {
    **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 16},
    **{"output_dim": 64, "n_window": 4, "n_window_infer": 8, "downsample_hidden_size": 8},
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
INDICES = {"image_token_index": IMAGE}
EDGES = {"vision_start_token_id": START, "vision_end_token_id": END}
GLM_EDGES = {
    **{"image_start_token_id": START, "image_end_token_id": END},
    **{"video_start_token_id": 154, "video_end_token_id": 155},
}
INTERLEAVED = {"mrope_interleaved": True}
# Family -> class, its text tower, its other keys, and what its processor gives the model beside tokens (below).
WITH_IMAGES = {
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        ("qwen3_vl_moe_text", {**_rope(**INTERLEAVED), "norm_topk_prob": True}),
        {**IDS, **EDGES, "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]}},
        "patches types",
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        ("qwen3_5_moe_text", _rope(**INTERLEAVED, partial_rotary_factor=1.0)),
        {**IDS, **EDGES, "vision_config": QWEN_TOWER},
        "patches types",
    ),
    "qwen4_exp": (
        "Qwen4ExpForConditionalGeneration",
        ("qwen4_exp_text", _rope(**INTERLEAVED, partial_rotary_factor=1.0)),
        {**IDS, **EDGES, "vision_config": QWEN_TOWER},
        "patches types",
    ),
    "glm4v_moe": (
        "Glm4vMoeForConditionalGeneration",
        ("glm4v_moe_text", _rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1])),
        {**IDS, **GLM_EDGES, "vision_config": GLM_TOWER},
        "patches types",
    ),
    "glm5_next": (
        "Glm5NextForConditionalGeneration",
        ("glm5_next_text", {}),
        {**IDS, "vision_config": GLM_TOWER},
        "patches types",
    ),
    "qwen3_omni_moe_thinker": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        ("qwen3_omni_moe_text", _rope(**INTERLEAVED)),
        {
            **{**IDS, **EDGES, "vision_config": {**QWEN_TOWER, "deepstack_visual_indexes": [0]}},
            **{"audio_config": AUDIO_TOWER, "audio_token_id": 156, "audio_start_token_id": 157},
        },
        "patches",
    ),
    "kimi_k25": (
        "Kimi_K25ForConditionalGeneration",
        ("deepseek_v3", {}),
        {
            **{**IDS, **EDGES, "projection_hidden_size": 48, "tie_word_embeddings": False},
            "vision_config": {**TOWER, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4},
        },
        "square_patches",
    ),
    "aria": (
        "AriaForConditionalGeneration",
        ("aria_text", {}),
        {
            **{**INDICES, "projector_patch_to_query_dict": {16: 4}},
            "vision_config": {**SQUARE, "model_type": "idefics3_vision"},
        },
        "pixels pixel_mask",
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        (
            "gemma4_text",
            {
                **{"layer_types": ["sliding_attention", "full_attention"] * 2},
                **{"use_bidirectional_attention": "vision"},
            },
        ),
        {
            **{**IDS, "boi_token_id": START, "eoi_token_id": END, "audio_config": None, "audio_token_id": 156},
            **{"boa_token_id": 157, "eoa_token_index": 158, "tie_word_embeddings": False},
            "vision_config": {
                **{**TOWER, "num_key_value_heads": 4, "head_dim": 12},
                **{"pooling_kernel_size": 2, "position_embedding_size": 64},
            },
        },
        "flat_patches types",
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        ("mistral4", {}),
        {
            **{**INDICES, "spatial_merge_size": 2, "tie_word_embeddings": False},
            "vision_config": {**SQUARE, "model_type": "pixtral", "head_dim": 12},
        },
        "pixels image_sizes",
    ),
    "minimax_m3_vl": (
        "MiniMaxM3SparseForConditionalGeneration",
        ("minimax_m3_vl_text", {}),
        {
            **{**INDICES, "video_token_index": VIDEO, "projector_hidden_size": 64},
            "vision_config": {**SQUARE, "temporal_patch_size": 2, "spatial_merge_size": 2},
        },
        "patches",
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        ("qwen3_moe", {"norm_topk_prob": True}),
        {
            **{"image_token_id": IMAGE, "image_seq_length": 4, "tie_word_embeddings": False},
            "vision_config": {**SQUARE, "model_type": "internvl_vision"},
        },
        "pixels",
    ),
    "step3p7": (
        "Step3p7ForConditionalGeneration",
        ("step3p5", {}),
        {"image_token_id": IMAGE, "vision_config": {**SQUARE, "max_position_embeddings": 16}},
        "pixels tiles",
    ),
}
# Causal language models that AutoModelForCausalLM does not know by their text config.
CLASSES = {"mistral4": "transformers.models.mistral4.modeling_mistral4.Mistral4ForCausalLM"}


# As GLM's: a token a role begins each turn, and nothing ends one.
GLM_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|begin_of_image|><|image|><|end_of_image|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def glm_processor() -> Glm4vProcessor:
    """Images of 16 x 16 pixels become 4 tokens."""
    tokenizer = tiny_processor("text").tokenizer
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    edges = ["<|begin_of_video|>", "<|end_of_video|>"]
    tokens = ["[gMASK]", "<sop>", *roles, *edges, *Glm4vProcessor.tokens.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    images = Glm4vImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 8192}, patch_size=4)
    return Glm4vProcessor(images, tokenizer, chat_template=GLM_TEMPLATE)


def build(family: str, std: float = 0.06, **keys: object) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model in training and its batch, the same in every call; `keys` are of its text config.

    Every matrix is drawn with `std`, so that experts matter and tokens differ, and every bias away from 0.
    """
    torch.manual_seed(0)
    if family in WITH_IMAGES:
        class_name, (text, own), others, given = WITH_IMAGES[family]
        kind = getattr(transformers, class_name)
        config = kind.config_class(text_config=text_config(text, **{**own, **keys}).to_dict(), **others)
        model, batch = kind(config), _with_image(given)
    else:
        module, _, name = CLASSES.get(family, "").rpartition(".")
        config = text_config(family, **keys)
        model = (
            getattr(importlib.import_module(module), name)(config) if name else AutoModelForCausalLM.from_config(config)
        )
        batch = _tokens(0)
    _fill(model, std)
    _fill_as_trained(model)
    if family == "zaya":  # `from_pretrained` gives the bias of the expert that skips this value, whatever files hold
        for layer in model.model.layers:
            layer.mlp.gate.balancing_biases[-1] = -1.0
    return model.train(), batch


def _fill(model: PreTrainedModel, std: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            bias = value.is_floating_point() and re.search(r"bias(es)?$", name)
            if bias or (value.dim() > 1 and isinstance(value, torch.nn.Parameter)):
                scale = 0.1 if bias else 0.5 if "embed" in name else std
                value.copy_(torch.randn(value.shape, generator=generator) * scale)


def _fill_as_trained(model: PreTrainedModel) -> None:
    """Vectors whose gradients would else be small sums of large terms, of which rounding is much.

    States of linear attention and of Mamba decay by a few percent a token, as in trained models, and not to nothing.
    The streams of hyper-connections differ, and a router's one scale is large.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            drawn = torch.rand(value.shape, generator=generator)
            if name.endswith("A_log"):
                value.copy_((1 + drawn).log())
            elif name.endswith("dt_bias"):
                step = 0.03 * 10**drawn
                value.copy_(step.expm1().log())  # the inverse of softplus
            elif re.search(r"(attn_hc|ffn_hc|hc_head)\.(hc_)?base$", name):
                value.copy_(torch.randn(value.shape, generator=generator))
            elif re.search(r"(attn_hc|ffn_hc|hc_head)\.(hc_)?scale$", name):
                value.fill_(1.0)
            elif name.endswith("gate.global_scale"):
                value.fill_(4.0)


def _tokens(images: int) -> dict[str, torch.Tensor]:
    """Two samples: one with `images` image tokens between their edges, and one that is padded on the left."""
    ids = torch.randint(3, 140, (2, 32), generator=torch.Generator().manual_seed(3))
    if images:
        ids[0, 4 : 6 + images] = torch.tensor([START, *[IMAGE] * images, END])
    mask = torch.ones_like(ids)
    mask[1, :5] = ids[1, :5] = 0
    labels = ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)
    labels[1, 5] = -100  # else the last token of padding would predict it
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _with_image(given: str) -> dict[str, torch.Tensor]:
    batch = _tokens(4)
    generator = torch.Generator().manual_seed(7)
    xy = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    forms = {
        "patches": {"pixel_values": (16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        "square_patches": {"pixel_values": (16, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 4]])},
        "flat_patches": {"pixel_values": (1, 16, 48), "image_position_ids": xy.reshape(1, 16, 2)},
        "pixels": {"pixel_values": (1, 3, 16, 16)},
        "types": {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()},
        "pixel_mask": {"pixel_mask": torch.ones(1, 16, 16, dtype=torch.bool)},
        "image_sizes": {"image_sizes": torch.tensor([[16, 16]])},
        "tiles": {"pixel_values_local": (3, 3, 16, 16), "num_local_patches": torch.tensor([3])},
    }
    for form in given.split():
        for key, value in forms[form].items():
            batch[key] = torch.randn(value, generator=generator) if isinstance(value, tuple) else value
    return batch
