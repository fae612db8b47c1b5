"""Model families: everything that is known of one by name. A family whose parts are called as Qwen's takes one row.

Other rooms ask `family_of` a model or a config. Of a parameter whose model is not at hand, such as one in a checkpoint,
`expert_state` and `BIAS_SUFFIX` tell by its name what it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_moe.errors import UserError

NOTHING = r"(?!)"  # a pattern that matches no name
INDEXER = r"\.indexer\."


@dataclass(frozen=True)
class MoEBlock:
    """The MoE block of a decoder layer: a router `gate` (`weight`) and fused `experts` (`gate_up_proj`, `down_proj`,
    `act_fn`).

    Attributes:
        class_name: of the block, in transformers, if a layer of ours takes its place; empty: the block stays.
        path: of the block, in a decoder layer; empty: the layer itself.
        transposed_on_hub: whether checkpoints on the hub store the stacked experts transposed.
        stacked_on_hub: whether they store them as they are in memory, though `save_pretrained` does not.
        gate: what the block calls its router.
    """

    class_name: str
    path: str = "mlp"
    transposed_on_hub: bool = False
    stacked_on_hub: bool = False
    gate: str = "gate"

    @property
    def _prefix(self) -> str:
        return rf"\.{re.escape(self.path)}" if self.path else r"\.layers\.\d+"

    @property
    def router(self) -> str:
        """Pattern of the names of router parameters, ours included."""
        return rf"{self._prefix}\.{self.gate}\."

    @property
    def experts(self) -> str:
        """Pattern of the names of expert parameters, ours included."""
        return rf"{self._prefix}\.experts\."

    @property
    def lora_parameters(self) -> list[str]:
        """The stacked weights, as PEFT's `target_parameters` names them."""
        path = f"{self.path}." if self.path else ""
        return [f"{path}experts.{stacked}" for stacked in ("gate_up_proj", "down_proj")]


@dataclass(frozen=True)
class Family:
    """What a model's modules do not say of themselves.

    Attributes:
        class_name: of the model, in transformers.
        decoder: path of the text decoder, which is given the padding mask and the positions of image tokens.
        moe: its MoE blocks; None: the family is dense.
        vision: path of the vision tower; None: it takes no images.
        projector: path of what gives the tower's features the decoder's width; None: the tower itself.
        images: how the tower is given images, a key of `ds_moe.models.vision.BLANKS`.
        processors: names of the processors that read its images.
        texts: types of the decoder's config, where only some that transformers builds are supported; empty: all.
        from_parts: whether the card of an export shows how its processor is put together without torchvision.
        gates: whether a gate over adapters has been held against PEFT, or is refused.
        frozen: pattern of weights that no loss of ours reaches, such as those that choose what sparse attention sees;
            weight decay would shrink them.
        preset: name of its tiny preset.
        tiny: what that has of the family's own: keys of its "text" and its "vision" config.
        dense: `model_type` whose checkpoints can be assembled into a model of this family.
        packs: whether a packed row is exactly its samples, each by itself: all layers attend through transformers'
            attention functions and carry nothing else from token to token, and the processor knows the positions.
        layers: names of the lists whose members are layers, of the decoder and of the vision tower.
        embeddings, head: names of the input embedding and of the output layer.
        measured: whether replay and the prediction of memory have been held against runs of this family. Where they
            have not, replay is refused, and of the memory only that of weights, gradients and optimizer is predicted.
        readers: for each kind of module in a layer, a pattern of the weights that make it keep its input for the
            backward pass if they are trained.
    """

    class_name: str
    decoder: str
    moe: MoEBlock | None = None
    vision: str | None = None
    projector: str | None = None
    images: str = "patches"
    processors: tuple[str, ...] = ("Qwen3VLProcessor",)
    texts: tuple[str, ...] = ()
    from_parts: bool = True
    gates: bool = True
    frozen: str = INDEXER
    preset: str | None = None
    tiny: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    dense: str | None = None
    packs: bool = False
    layers: tuple[str, ...] = ("layers", "blocks")
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
    measured: bool = True
    readers: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention": r"\.self_attn\.[qkvo]_proj\.",
            "mlp": r"\.mlp\.(gate|gate_proj|up_proj|down_proj)\.",
            "norms": r"layernorm\.|[qk]_norm\.",
        }
    )

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.class_name)

    @property
    def parts(self) -> dict[str, str]:
        """Part that a run may freeze -> pattern of its parameters' names. Embedding and head may be one weight, so they
        are one part."""
        of_vision = "|".join(re.escape(path) for path in self.vision_paths)
        return {
            "vision": rf"^({of_vision})\." if of_vision else NOTHING,
            "router": self.moe.router if self.moe else NOTHING,
            "experts": self.moe.experts if self.moe else NOTHING,
            "embeddings": rf"{self.embeddings}\.|^{self.head}\.",
        }

    @property
    def vision_paths(self) -> list[str]:
        """Of the tower and its projector."""
        return [path for path in (self.vision, self.projector) if path]

    def is_vision(self, name: str) -> bool:
        """Whether a parameter or module is of the vision tower or its projector."""
        return any(name.startswith(f"{path}.") for path in self.vision_paths)


_DEEPSTACK = {"deepstack_visual_indexes": [0]}
FAMILIES = {
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        decoder="model.language_model",
        vision="model.visual",
        moe=MoEBlock("Qwen3VLMoeTextSparseMoeBlock", transposed_on_hub=True),
        preset="tiny-vl-moe",
        tiny={"text": {"norm_topk_prob": True}, "vision": _DEEPSTACK},
        packs=True,
        dense="qwen3_vl",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        decoder="model",
        moe=MoEBlock("Qwen3MoeSparseMoeBlock"),
        preset="tiny-moe",
        tiny={"text": {"norm_topk_prob": True}},
        packs=True,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        decoder="model.language_model",
        vision="model.visual",
        preset="tiny-vl-dense",
        tiny={"vision": _DEEPSTACK},
        packs=True,
    ),
}
# What models with images have in common whose blocks stay: those with a tower like Qwen's, and others.
_VISUAL = Family("", decoder="model.language_model", vision="model.visual", moe=MoEBlock(""), measured=False)
_TOWER = replace(
    _VISUAL, vision="model.vision_tower", projector="model.multi_modal_projector", from_parts=False, gates=False
)
FAMILIES |= {
    "qwen3_5_moe": replace(  # also Qwen3.6's name
        _VISUAL,
        class_name="Qwen3_5MoeForConditionalGeneration",
        moe=MoEBlock("", stacked_on_hub=True),
        preset="tiny-qwen3.5-moe",
        tiny={
            "text": {
                **{"layer_types": ["linear_attention", "full_attention", "full_attention"], "num_hidden_layers": 3},
                "shared_expert_intermediate_size": 40,
                **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
                **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "partial_rotary_factor": 1.0},
            },
        },
    ),
    "glm4v_moe": replace(  # GLM-4.5V and GLM-4.6V
        _VISUAL, class_name="Glm4vMoeForConditionalGeneration", processors=("Glm4vProcessor", "Glm46VProcessor")
    ),
    "glm5_next": replace(
        _VISUAL, class_name="Glm5NextForConditionalGeneration", processors=("Glm5NextProcessor",), gates=False
    ),
    "qwen4_exp": replace(_VISUAL, class_name="Qwen4ExpForConditionalGeneration", gates=False),
    "qwen3_omni_moe_thinker": replace(
        _VISUAL,
        class_name="Qwen3OmniMoeThinkerForConditionalGeneration",
        processors=("Qwen3OmniMoeProcessor",),
        frozen=rf"{INDEXER}|^model\.audio_tower\.",
        from_parts=False,
        gates=False,
    ),
    "kimi_k25": replace(  # Kimi-K2.5 and K2.6
        _TOWER,
        class_name="Kimi_K25ForConditionalGeneration",
        projector="model.mm_projector",
        images="squares",
        processors=("Kimi_K25Processor",),
    ),
    "minimax_m3_vl": replace(
        _TOWER, class_name="MiniMaxM3SparseForConditionalGeneration", processors=("MiniMaxM3VLProcessor",)
    ),
    "gemma4": replace(
        _TOWER,
        class_name="Gemma4ForConditionalGeneration",
        projector="model.embed_vision",
        images="places",
        processors=("Gemma4Processor",),
        moe=MoEBlock("", "", gate="router"),
        frozen=rf"{INDEXER}|^model\.(audio_tower|embed_audio)\.",
    ),
    "internvl": replace(  # InternVL 3.5 over Qwen3-MoE
        _TOWER,
        class_name="InternVLForConditionalGeneration",
        images="tiles",
        processors=("InternVLProcessor",),
        texts=("qwen3_moe",),
        layers=("layers", "layer"),
    ),
    "step3p7": replace(  # Step-3.7
        _TOWER,
        class_name="Step3p7ForConditionalGeneration",
        vision="model.vision_model",
        images="views",
        processors=("Step3p7Processor",),
    ),
}
# Causal language models that keep their block: the block's path in a layer, what it calls its router -> model types.
_KEPT = {
    ("mlp", "gate"): "axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 "
    "ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa hunyuan_v1_moe hy_v3 hy_v4 "
    "inkling2_text inkling_text kimi_linear kolibri1 laguna mellum mimo_v2_flash minimax minimax_m2 "
    "minimax_m3_vl_text mistral4 mixtral olmoe qwen2_moe qwen3_5_moe_text qwen3_next qwen4_exp_text solar_open zaya",
    ("mlp", "router"): "afmoe aria_text gpt_oss phimoe",
    ("block_sparse_moe", "router"): "granitemoe granitemoe_swa granitemoehybrid granitemoeshared",
    ("feed_forward", "router"): "jamba",
    ("feed_forward", "gate"): "lfm2_moe",
    ("mixer", "gate"): "nemotron_h",
    ("", "router"): "gemma4_text",
}
TRAINED_BLOCKS = {name: block for block, names in _KEPT.items() for name in names.split()}
_CLASSES = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | {"mistral4": "Mistral4ForCausalLM"}  # among those with images elsewhere
FAMILIES |= {
    name: Family(_CLASSES[name], "model", MoEBlock("", path, gate=gate), measured=False)
    for name, (path, gate) in TRAINED_BLOCKS.items()
}
FAMILIES["nemotron_h"] = replace(FAMILIES["nemotron_h"], embeddings="embeddings")
TRANSPOSED_ON_HUB = [name for name, family in FAMILIES.items() if family.moe and family.moe.transposed_on_hub]
PRESETS = {family.preset: name for name, family in FAMILIES.items() if family.preset}  # preset -> model_type
ASSEMBLED = {family.dense: name for name, family in FAMILIES.items() if family.dense}  # dense model_type -> MoE's


def family_of(model: nn.Module | PretrainedConfig) -> Family:
    """The family of a model of transformers, or of its config. Raises `UserError` for one that is not supported."""
    model_type = getattr(model, "config", model).model_type
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} {unsupported(model_type)}")
    return FAMILIES[model_type]


def unsupported(model_type: str) -> str:
    """Why `ds-moe` takes no models of a type that is none of `FAMILIES`; the caller begins the sentence."""
    known = f"supported: {', '.join(sorted(FAMILIES))}"
    if model_type in REFUSED:
        return f"is not supported, because {REFUSED[model_type]}; {known}"
    if model_type in TEXT_BLOCKS | IMAGE_BLOCKS:
        why = f", because {UNREAD[model_type]}" if model_type in UNREAD else ""
        return f"is not supported by ds-moe{why}; ds_moe.models.convert takes it in a loop of your own; {known}"
    return f"is not supported; {known}"


def image_edges(config: PretrainedConfig) -> tuple[int, int]:
    """Ids of the tokens before and after an image's: Qwen's configs call them a vision's start and end, GLM's an
    image's."""
    kind = "vision" if hasattr(config, "vision_start_token_id") else "image"
    return getattr(config, f"{kind}_start_token_id"), getattr(config, f"{kind}_end_token_id")


def moe_layers_of(config: PretrainedConfig) -> tuple[int, ...]:
    """Indices of the decoder layers that have experts, as text configs of Qwen3-MoE and Qwen3-VL-MoE say it. Others may
    say it in other keys; replay, which asks, refuses them."""
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or ()
    experts = getattr(config, "num_experts", None)
    return tuple(i for i in range(config.num_hidden_layers) if experts and i not in dense and (i + 1) % step == 0)


_UNPROVEN = "nobody has held it against transformers yet"
REFUSED = {  # every other family with experts -> why
    "dbrx": "its experts are one matrix, whose gate no module describes, and transformers cannot build its config",
    "deepseek_ocr2": _UNPROVEN,
    "deepseek_ocr2_text": _UNPROVEN,
    "deepseek_v4": "its own loss depends on the ids of padding, and its first layers route by a hash of token ids",
    "diffusion_gemma": "it is no causal language model",
    "diffusion_gemma_text": "it is no causal language model",
    "doge": "its experts are found by product keys, one embedding each, and its own loss depends on padding",
    "dots3_note": "its vision tower has experts too",
    "dots3_note_text": "its vision tower has experts too",
    "ernie4_5_vl_moe": "text and image tokens have experts of two widths, and a rank without images runs half",
    "ernie4_5_vl_moe_text": "text and image tokens have experts of two widths",
    "hy_v4_vl": _UNPROVEN,
    "hy_v4_vl_text": _UNPROVEN,
    "inkling2": _UNPROVEN,
    "inkling2_loop": _UNPROVEN,
    "inkling2_loop_text": _UNPROVEN,
    "inkling_mm_model": _UNPROVEN,
    "jetmoe": "its attention has experts too, and no module describes them",
    "lara_mini": _UNPROVEN,
    "llama4": "its block multiplies every token with every expert and weighs what experts get",
    "llama4_text": "its block multiplies every token with every expert and weighs what experts get",
    "longcat_flash": "some of its experts are the identity and have rows in one of two matrices only",
    "mistral_large4": _UNPROVEN,
    "mistral_large4_text": _UNPROVEN,
    "muse_spark": "a norm follows each expert, whose weight all experts share",
    "muse_spark_text": "a norm follows each expert, whose weight all experts share",
    "nemotron_h_omni": _UNPROVEN,
    "nllb-moe": "it is an encoder and a decoder with one module an expert and a capacity",
    "openai_privacy_filter": "it is no causal language model",
    "qwen3_omni_moe": "it is several models; load the thinker alone",
    "switch_transformers": "it is an encoder and a decoder with one module an expert and a capacity",
    "unlimited_ocr": _UNPROVEN,
    "unlimited_ocr_text": _UNPROVEN,
}
UNREAD = {  # families with images whose blocks stay -> why no run takes them
    "aria": "its images are tiles with masks of their padding, which it does not read",
    "mistral3": "the rows of an image's tokens end by tokens of their own, which it does not write",
}
# Families whose experts become layers of ours, held against transformers itself by loss and every gradient: causal
# language models, then models with images. All of them but `UNREAD` are trained.
TEXT_BLOCKS = frozenset(name for name, family in FAMILIES.items() if family.moe and not family.vision)
IMAGE_BLOCKS = frozenset(name for name, family in FAMILIES.items() if family.moe and family.vision) | UNREAD.keys()
# How the weights of experts lie that transformers does not describe on the module.
DESCRIBED = {
    "Step3p7Experts": {
        **{"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True},
        "has_post_expert_norm": False,
    }
}
REPLACED = {family.moe.class_name for family in FAMILIES.values() if family.moe and family.moe.class_name}
IMAGE_TOKENS = ("image_token_id", "image_token_index")  # keys of a config, of the token that stands for image features

BIAS_SUFFIX = ".gate.balancing.bias_E"  # ends the name of a loss-free bias of ours

# The weights of experts as every family in transformers calls them, and our updates of them; `models/blocks.py` holds
# each model that is converted against it.
_EXPERTS = re.compile(r"\.experts\.(?:(?:gate_up_proj|up_proj|down_proj)(?:_bias)?|lora\.\w+)$")


def expert_state(name: str) -> bool:
    """Whether a parameter of a converted model belongs to the sharded experts, by its name."""
    return _EXPERTS.search(name) is not None


def full_shape(name: str, parameter: Tensor, ep_size: int) -> torch.Size:
    """The shape of a parameter over all ranks (ZeRO-3's `ds_shape` is the shape on one EP rank)."""
    shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
    return torch.Size([shape[0] * ep_size, *shape[1:]]) if expert_state(name) else shape


def in_vision_tower(name: str) -> bool:
    """Whether a module or parameter of this name is of any family's vision tower; for models of others too."""
    return any(family.is_vision(name) for family in FAMILIES.values())
