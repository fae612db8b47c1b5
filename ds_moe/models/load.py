"""Load a model and its processor, freeze parts of it, and keep image-less ranks in step with the others."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_moe.config.sections import ModelConfig
from ds_moe.errors import UserError, one_line
from ds_moe.models.families import MODEL_CLASSES
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.weights.rows import WeightRows
from ds_moe.weights.unread import leave_unread


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


def skeleton(model_config: PretrainedConfig) -> PreTrainedModel:
    """The model with its parameters' names and shapes but no storage (the meta device)."""
    with torch.device("meta"):
        return MODEL_CLASSES[model_config.model_type]()(model_config)
