"""Model families: everything that is known of one by name. A family whose parts are called as Qwen's takes one row.

Other rooms ask `family_of` a model or a config. Of a parameter whose model is not at hand, such as one in a checkpoint,
`expert_state` and `BIAS_SUFFIX` tell by its name what it is.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.errors import UserError
from ds_moe.weights.layouts import Projections

NOTHING = r"(?!)"  # a pattern that matches no name


@dataclass(frozen=True)
class MoEBlock:
    """The MoE block of a decoder layer: a router `gate` (`weight`) and fused `experts` (`gate_up_proj`, `down_proj`,
    `act_fn`).

    Attributes:
        class_name: of the block, in transformers.
        normalizes: whether the router of a (text) config renormalises the top-k weights.
        path: of the block, in a decoder layer.
        projections: what files with one tensor an expert call the parts of the stacked weights.
        transposed_on_hub: whether checkpoints on the hub store the stacked experts transposed.
        selection_bias: the name, in memory, of the bias that transformers' router adds to select experts, in place of
            `BIAS_SUFFIX`. None: it has none, so weights with one would not load.
    """

    class_name: str
    normalizes: Callable[[PretrainedConfig], bool]
    path: str = "mlp"
    projections: Projections = field(
        default_factory=lambda: {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    )
    transposed_on_hub: bool = False
    selection_bias: str | None = None

    @property
    def router(self) -> str:
        """Pattern of the names of router parameters, ours included."""
        return rf"\.{re.escape(self.path)}\.gate\."

    @property
    def experts(self) -> str:
        """Pattern of the names of expert parameters, ours included."""
        return rf"\.{re.escape(self.path)}\.experts\."

    @property
    def lora_parameters(self) -> list[str]:
        """The stacked weights, as PEFT's `target_parameters` names them."""
        return [f"{self.path}.experts.{stacked}" for stacked in self.projections]


@dataclass(frozen=True)
class Family:
    """What a model's modules do not say of themselves.

    Attributes:
        class_name: of the model, in transformers.
        decoder: path of the text decoder, which is given the padding mask and the positions of image tokens.
        moe: its MoE blocks; None: the family is dense.
        vision: path of the vision tower; None: it takes no images. Every family that has one reads and writes boxes in
            thousandths of an image's sides, which `ds_moe.data.grounding` takes for granted; Qwen2.5-VL would not.
        preset: name of its tiny preset.
        dense: `model_type` whose checkpoints can be assembled into a model of this family.
        packs: whether a packed row is exactly its samples, each by itself: all layers attend through transformers'
            attention functions and carry nothing else from token to token, and the processor knows the positions.
        layers: names of the lists whose members are layers, of the decoder and of the vision tower.
        embeddings, head: names of the input embedding and of the output layer.
        readers: for each kind of module in a layer, a pattern of the weights that make it keep its input for the
            backward pass if they are trained.
    """

    class_name: str
    decoder: str
    moe: MoEBlock | None = None
    vision: str | None = None
    preset: str | None = None
    dense: str | None = None
    packs: bool = False
    layers: tuple[str, ...] = ("layers", "blocks")
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
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
        return {
            "vision": rf"^{re.escape(self.vision)}\." if self.vision else NOTHING,
            "router": self.moe.router if self.moe else NOTHING,
            "experts": self.moe.experts if self.moe else NOTHING,
            "embeddings": rf"{self.embeddings}\.|^{self.head}\.",
        }

    @property
    def projections(self) -> Projections:
        """See `MoEBlock`; empty for a dense family."""
        return self.moe.projections if self.moe else {}

    def is_vision(self, name: str) -> bool:
        """Whether a parameter or module is of the vision tower."""
        return self.vision is not None and name.startswith(f"{self.vision}.")


FAMILIES = {
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        decoder="model.language_model",
        vision="model.visual",
        moe=MoEBlock("Qwen3VLMoeTextSparseMoeBlock", lambda config: True, transposed_on_hub=True),
        preset="tiny-vl-moe",
        packs=True,
        dense="qwen3_vl",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        decoder="model",
        moe=MoEBlock("Qwen3MoeSparseMoeBlock", lambda config: config.norm_topk_prob),
        preset="tiny-moe",
        packs=True,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        decoder="model.language_model",
        vision="model.visual",
        preset="tiny-vl-dense",
        packs=True,
    ),
}
TRANSPOSED_ON_HUB = [name for name, family in FAMILIES.items() if family.moe and family.moe.transposed_on_hub]
PRESETS = {family.preset: name for name, family in FAMILIES.items() if family.preset}  # preset -> model_type
ASSEMBLED = {family.dense: name for name, family in FAMILIES.items() if family.dense}  # dense model_type -> MoE's


def family_of(model: nn.Module | PretrainedConfig) -> Family:
    """The family of a model of transformers, or of its config. Raises `UserError` for one that is not supported."""
    model_type = getattr(model, "config", model).model_type
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def moe_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every MoE block of an unconverted model, in order; none if it is dense or not known."""
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None or family.moe is None:
        return []
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ == family.moe.class_name]


def moe_layers_of(config: PretrainedConfig) -> tuple[int, ...]:
    """Indices of the decoder layers that have experts, as every family here says it in its text config."""
    step = getattr(config, "decoder_sparse_step", 1)
    dense = getattr(config, "mlp_only_layers", None) or ()
    experts = getattr(config, "num_experts", None)
    return tuple(i for i in range(config.num_hidden_layers) if experts and i not in dense and (i + 1) % step == 0)


BIAS_SUFFIX = ".gate.balancing.bias_E"  # ends the name of a loss-free bias of ours

_EXPERTS = re.compile("|".join(sorted({family.moe.experts for family in FAMILIES.values() if family.moe})))


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
