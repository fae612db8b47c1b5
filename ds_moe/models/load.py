"""Load a model of transformers and check it against its files; or only its config, processor, or an outline of it."""

import re
from collections.abc import Callable
from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.config.check import lacking_kernels
from ds_moe.config.deepspeed import trains_on_cpu
from ds_moe.config.rules.model import expert_count
from ds_moe.config.sections import ModelConfig, VideoConfig
from ds_moe.data.processor import Processor
from ds_moe.errors import UserError, one_line
from ds_moe.models.families import FAMILIES, PRESETS, family_of, unsupported
from ds_moe.models.folder import read_model_config
from ds_moe.models.images_only import ImagesOnly
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.processor import load_processor, tiny_processor
from ds_moe.models.router_forms import selection_biases
from ds_moe.models.stored_names import sources_of
from ds_moe.models.ties import tie_as_stored, untie_config
from ds_moe.models.tower import lighten_tower, outline_tower
from ds_moe.weights.files import SafetensorsFiles
from ds_moe.weights.layouts import stored_rows, uneven_experts
from ds_moe.weights.unread import leave_unread

# What transformers says where an architecture, or this machine, does not have the attention that it is asked for.
OF_ATTENTION = re.compile(r"attn_implementation|attention implementation|Flash ?Attention")


def model_config(config: ModelConfig) -> PretrainedConfig:
    """The transformers config of a run's `model` section; reads no weights.

    Raises:
        UserError: an unknown preset, a path that cannot be read, or an unsupported family.
    """
    if config.preset is not None:
        return preset_config(config.preset)
    where = f"model.path {config.path!r}"
    found = read_model_config(str(config.path), where)
    if found.model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {found.model_type!r} {unsupported(found.model_type)}")
    texts, text = FAMILIES[found.model_type].texts, found.get_text_config().model_type
    if texts and text not in texts:
        raise UserError(f"{where}: {found.model_type} over {text} is not supported; over {', '.join(texts)} it is")
    return found


def processor_of(config: ModelConfig, videos: VideoConfig) -> Processor:
    """The processor of a run's `model` section, which knows the model's vision tower. Raises as `model_config`, and for
    one of another family's images.

    Args:
        videos: what the run says of videos, which the checkpoints and exports of the processor say then too.
    """
    if config.path is not None:
        processor = load_processor(config.path)
    else:
        family = FAMILIES.get(PRESETS.get(str(config.preset), ""))
        processor = tiny_processor("vl" if family is not None and family.vision else "text")
    if isinstance(processor, ImagesOnly):
        found = model_config(config)
        family, name = family_of(found), type(processor).__name__
        if family.vision is not None and name not in family.processors:
            what = f"describes images for {name}, but a {found.model_type} model needs {' or '.join(family.processors)}"
            raise UserError(f"model.path {config.path!r} {what}: correct its preprocessor_config.json")
        processor.tower = outline_tower(found) if processor.ahead else None
        processor.keep_settings(videos)
    return processor


def experts_of(config: ModelConfig) -> int | None:
    """Experts of each MoE block of a run's model; None: it is dense, or its config cannot be read."""
    try:
        return expert_count(model_config(config))
    except UserError:
        return None


def load_model(config: ModelConfig, dtype: torch.dtype, seed: int = 0, unread: bool = False) -> PreTrainedModel:
    """The model of a run's `model` section on the CPU of this rank, in `dtype`, with a light vision tower.

    A checkpoint may store experts in any layout of `weights/layouts.py`; every weight must be there and none may be
    left over.

    Args:
        unread: leave the weights in their files (see `weights/unread.py`) if `streaming.py` can read them from there.
            It cannot read those of a preset, nor those of files whose names only transformers can translate.

    Raises:
        UserError: as `model_config`; no kernels for `model.attention` on this machine; a missing, unexpected or
            misshapen weight, or a file that cannot be read.
    """
    if problem := lacking_kernels(config.attention, trains_on_cpu()):
        raise UserError(problem)
    try:
        model = _load(config, dtype, seed, unread)
    except (ImportError, ValueError) as error:
        if not OF_ATTENTION.search(str(error)):
            raise
        raise UserError(f"model.attention {config.attention}: {one_line(error, 200)} (eager always works)") from error
    lighten_tower(model)
    return model


def _load(config: ModelConfig, dtype: torch.dtype, seed: int, unread: bool) -> PreTrainedModel:
    if config.preset is not None:
        model = build_preset(config.preset, seed, config.attention)
        for parameter in model.parameters():  # not .to(): rotary frequencies stay fp32, as from_pretrained keeps them
            parameter.data = parameter.data.to(dtype)
        return model
    family = family_of(model_config(config))  # refuses a config before any weight is looked for
    files = SafetensorsFiles.find(str(config.path))
    if files is not None and unread:
        model = _from_pretrained(config, family.model_class, dtype, files, device="meta")
        tie_as_stored(model, files)
        if fill_buffers := _readable(model, files):
            leave_unread(model)
            fill_buffers()
            untie_config(model)
            return model
    model = _from_pretrained(config, family.model_class, dtype, files)
    untie_config(model)
    return model


def _readable(model: PreTrainedModel, files: SafetensorsFiles) -> Callable[[], None] | None:
    """How to read what each rank keeps whole of a model on the meta device; None where its files do not hold each of
    its weights and buffers so that a rank could read its rows only."""
    state, parameters = model.state_dict(), dict(model.named_parameters())
    sources = sources_of(model, state, files.shapes)
    kept = state.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()  # buffers
    kept |= {name for name in selection_biases(model) if name in parameters}
    rows = {name: stored_rows(files, sources.get(name), state[name].shape) for name in {*parameters, *kept}}
    if None in rows.values():
        return None

    def fill() -> None:
        for name in kept:
            read, value = rows[name], state[name]
            assert read is not None
            read_value = read(0, max(1, len(value) if value.dim() else 1)).to(value.dtype).clone()
            if name in parameters:
                model.get_parameter(name).data = read_value
            else:
                model.get_buffer(name).copy_(read_value)

    return fill


def _from_pretrained(
    config: ModelConfig,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype,
    files: SafetensorsFiles | None,
    device: str | None = None,
) -> PreTrainedModel:
    """A model whose names and shapes fit its files. On the meta device they are compared too, but no weight is read."""
    try:
        loaded = model_class.from_pretrained(
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
    except RuntimeError as error:  # transformers raises it, naming no tensor, where per-expert tensors differ in shape
        uneven = uneven_experts(files)[:5] if files is not None else []
        what = f"missing or misshapen experts: {uneven}" if uneven else error
        raise UserError(f"model.path {config.path!r} does not fit {model_class.__name__}: {what}") from error
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    wrong = {kind: sorted(map(str, keys))[:5] for kind, keys in report.items() if keys}
    if wrong:
        raise UserError(f"model.path {config.path!r} does not fit {model_class.__name__}: {wrong}")
    return model


def build_outline(config: PretrainedConfig) -> PreTrainedModel:
    """The model with its parameters' names and shapes but no storage (the meta device)."""
    with torch.device("meta"):
        return family_of(config).model_class(config)
