"""Load a model and its processor, freeze parts of it, and keep image-less ranks in step with the others."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_moe.config import ModelConfig, RunConfig
from ds_moe.errors import UserError, one_line
from ds_moe.models.classes import MODEL_CLASSES
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.unread import leave_unread
from ds_moe.models.weight_rows import WeightRows

FREEZE_PATTERNS = {
    "vision": r"^model\.visual\.",
    "router": r"\.mlp\.gate\.",
    "experts": r"\.mlp\.experts\.",
    "embeddings": r"embed_tokens\.|^lm_head\.",
}

STAGE_FREEZES = {"all": [], "router_only": [r"^(?!.*\.mlp\.gate\.)"]}  # by train.stage; a router's noise is trained too


def model_config(config: ModelConfig) -> PretrainedConfig:
    """The transformers config of a run's `model` section; reads no weights.

    Raises:
        UserError: an unknown preset, a path that cannot be read, or an unsupported family.
    """
    if config.preset is not None:
        return preset_config(config.preset)
    try:
        found = AutoConfig.from_pretrained(str(config.path), trust_remote_code=False)
    except Exception as error:  # whatever a config from elsewhere may hold
        raise UserError(
            f"model.path {config.path!r} cannot be read as a transformers checkpoint: {one_line(error)}"
        ) from error
    if found.model_type not in MODEL_CLASSES:
        raise UserError(f"model.path {config.path!r} is a {found.model_type!r}; supported: {sorted(MODEL_CLASSES)}")
    return found


def load_model(config: ModelConfig, dtype: torch.dtype, seed: int = 0, unread: bool = False) -> PreTrainedModel:
    """The model of a run's `model` section on the CPU of this rank, in `dtype`.

    A checkpoint may store experts in either layout; every weight must be there and none may be left over.

    Args:
        unread: leave the weights in their files (see `unread.py`) if `streaming.py` can read them: not those of a
            preset, or under names that only transformers can translate.

    Raises:
        UserError: as `model_config`; a missing, unexpected or misshapen weight, or a file that cannot be read.
    """
    if config.preset is not None:
        model = build_preset(config.preset, seed, config.attention)
        for parameter in model.parameters():  # not .to(): rotary frequencies stay fp32, as from_pretrained keeps them
            parameter.data = parameter.data.to(dtype)
        return model
    model_config(config)  # a path that cannot be read ends here
    files = WeightRows.find(str(config.path))
    if files is not None and unread:
        model = _from_pretrained(config, dtype, files, device="meta")
        if all(files.stored(name, parameter.shape) for name, parameter in model.named_parameters()):
            leave_unread(model)
            return model
    return _from_pretrained(config, dtype, files)


def _from_pretrained(
    config: ModelConfig, dtype: torch.dtype, files: WeightRows | None, device: str | None = None
) -> PreTrainedModel:
    """A checked model; on the meta device all is as ever, names and shapes compared too, but no weight is read."""
    model_class = MODEL_CLASSES[model_config(config).model_type]()
    try:
        loaded: Any = model_class.from_pretrained(
            str(config.path),
            dtype=dtype,
            attn_implementation=config.attention,
            device_map=device,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused here
            output_loading_info=True,
        )
    except OSError as error:
        raise UserError(
            f"model.path {config.path!r} has no weights in safetensors files that can be read: {one_line(error)}"
        ) from error
    except RuntimeError as error:  # of single experts that cannot be stacked; its message names none
        uneven = files.uneven_experts()[:5] if files is not None else []
        what = f"missing or misshapen experts: {uneven}" if uneven else error
        raise UserError(f"model.path {config.path!r} does not fit {model_class.__name__}: {what}") from error
    model, report = loaded
    wrong = {kind: sorted(map(str, keys))[:5] for kind, keys in report.items() if keys}
    if wrong:
        raise UserError(f"model.path {config.path!r} does not fit {model_class.__name__}: {wrong}")
    return model


def frozen(config: RunConfig) -> list[str]:
    """What a run does not train, as patterns for `freeze`."""
    return [*config.model.freeze, *STAGE_FREEZES[config.train.stage]]


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop training the parameters that a pattern names ("vision", "router", "experts", "embeddings" or a regex).

    Raises:
        UserError: a pattern that matches nothing, or nothing left to train.
    """
    for pattern in patterns:
        expression = re.compile(FREEZE_PATTERNS.get(pattern, pattern))
        matched = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
        if not matched:
            raise UserError(f"model.freeze pattern {pattern!r} matches no parameter of this model")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze {patterns} leaves nothing to train")
    if isinstance(model, PreTrainedModel) and not _embeds_with_grad(model):
        model.enable_input_require_grads()


def _embeds_with_grad(model: PreTrainedModel) -> bool:
    """Whether hidden states carry a gradient from the first layer on.

    Where they do not, ZeRO-3 takes a trained router of that layer away before its gradient has arrived: DeepSpeed's
    hook for the end of a module's backward fires at its beginning when no input of the module needs a gradient.
    """
    return any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())


def has_vision(model: nn.Module) -> bool:
    return hasattr(model.config, "vision_config")


def keep_vision_in_step(model: PreTrainedModel) -> None:
    """Give every forward without an image a vision pass over a blank one, added to the text with weight zero.

    Under data parallelism all ranks must run the same collectives: ZeRO-3 gathers the vision tower, and its gradients
    are reduced, on all of them. The pass runs after the text embedding and before the decoder, where a real one has
    just run, and covers the DeepStack features, so forward and backward visit the parameters in the same order.

    A forward with a cache belongs to `generate`, which encodes images before it: there a rank without an image calls
    `encode_blank` itself.
    """

    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        generating = kwargs.get("past_key_values") is not None
        if generating or kwargs.get("visual_pos_masks") is not None or not parallel():
            return args, kwargs
        embeds_BSD: Tensor = kwargs["inputs_embeds"]
        return args, {
            **kwargs,
            "inputs_embeds": embeds_BSD + encode_blank(model, embeds_BSD.device).to(embeds_BSD.dtype),
        }

    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)


def encode_blank(model: PreTrainedModel, device: torch.device) -> Tensor:
    """A vision pass over one blank image: a zero scalar that depends on every vision parameter."""
    vision = model.config.vision_config
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(side * side, width, device=device, dtype=model.model.visual.dtype)
    grid = torch.tensor([[1, side, side]], device=device)
    features = model.model.visual(pixels, grid_thw=grid, return_dict=True)
    return torch.stack([part.sum() for part in (features.pooler_output, *features.deepstack_features)]).sum() * 0.0


def parallel() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def parameter_table(model: nn.Module, parts: dict[str, str] | None = None) -> list[tuple[str, int, int]]:
    """(part, trainable, all) parameter counts on this rank, in the order of `FREEZE_PATTERNS`, then the rest."""
    compiled = {part: re.compile(pattern) for part, pattern in (parts or FREEZE_PATTERNS).items()}
    totals = {part: [0, 0] for part in [*compiled, "rest"]}
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in compiled.items() if pattern.search(name)), "rest")
        size = getattr(parameter, "ds_numel", parameter.numel())
        totals[part][0] += size if parameter.requires_grad else 0
        totals[part][1] += size
    return [(part, trained, total) for part, (trained, total) in totals.items() if total]
