"""Tiny models that vLLM's kernels for CPUs take, with random weights, as folders in the layout of the hub."""

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.data.processor import Processor
from ds_moe.models.families import TRANSPOSED_ON_HUB, expert_state, family_of
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import save_processor
from ds_moe.weights.files import WEIGHTS, SafetensorsFiles, write_tensors
from ds_moe.weights.layouts import in_layout
from tools.bench.replay.bench import set_weights

HEAD_DIM = 32  # the least that vLLM's attention on CPUs has
SECTIONS = [8, 4, 4]  # of a multimodal rotary embedding, half of the head's numbers together


def tiny_config(preset: str, **text: int) -> PretrainedConfig:
    """A preset with heads of 32 numbers, and other keys of the text model's config, such as num_experts."""
    config = preset_config(preset)
    of_text = config.get_text_config()
    for key, value in {"head_dim": HEAD_DIM, **text}.items():
        setattr(of_text, key, value)
    if hasattr(config, "vision_config"):
        config.vision_config.out_hidden_size = of_text.hidden_size
        of_text.rope_parameters = {**of_text.rope_parameters, "mrope_section": SECTIONS}
    return config


def tiny_model(preset: str, seed: int, router_scale: float = 1.0, **text: int) -> PreTrainedModel:
    """A preset in fp32 with heads of 32 numbers and random weights, those of `tools.bench.replay`.

    Args:
        router_scale: times which the routers' weights are larger.
        text: as of `tiny_config`.
    """
    config = tiny_config(preset, **text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family_of(config).model_class(config).eval()
        set_weights(model, router_scale)
    return model


def write_model(model: PreTrainedModel, processor: Processor, folder: Path) -> Path:
    """Write it as vLLM reads it. transformers itself writes stacked experts as memory holds them."""
    model.save_pretrained(folder)
    save_processor(processor, folder)
    if model.config.model_type in TRANSPOSED_ON_HUB:
        files = SafetensorsFiles.of_folder(folder)
        stored = {name: files.read(name).clone() for name in files.shapes}
        files.close()
        turned = {
            name: in_layout(one, "hub").contiguous() if expert_state(name) else one for name, one in stored.items()
        }
        write_tensors(folder / WEIGHTS, turned)
    return folder
