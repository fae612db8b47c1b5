"""A tiny processor of every family whose images `ds-moe` reads, and what plain transformers is given in its place."""

import re
from collections.abc import Callable
from typing import Any

import transformers
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_processing_utils import BatchFeature
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil

from ds_moe.data.processor import Processor
from ds_moe.models import vl_processors as ours
from ds_moe.models.image_processors import (
    Gemma4ImageProcessor,
    GotOcr2ImageProcessor,
    Kimi_K25ImageProcessor,
    MiniMaxM3VLImageProcessor,
    Step3p7ImageProcessor,
)
from ds_moe.models.processor import tiny_processor
from tests.models.tiny_families import GLM_TEMPLATE, glm_processor

QWEN = ["qwen3_vl_moe", "qwen3_5_moe", "qwen4_exp"]
PIXELS = {"shortest_edge": 64, "longest_edge": 4096}
STEP: dict[str, Any] = {
    **{"size": {"height": 32, "width": 32}, "patch_size": 16, "max_image_size": 96},
    "vision_patch_size": 4,
}
# ChatML with an image's token alone, which the processor frames.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}IMAGE{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def _made(kind: type, images: Any, tokens: dict[str, str], template: str = TEMPLATE, **named: str) -> Processor:
    """`named` are the tokenizer's own names of tokens."""
    tokenizer = tiny_processor("text").tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokens.values()]}, replace_extra_special_tokens=False)
    tokenizer._set_model_specific_special_tokens(special_tokens=named)
    tokenizer.chat_template = None
    return kind(images, tokenizer, chat_template=template.replace("IMAGE", tokens["image"]))


def _kimi() -> Processor:
    kind = ours.Kimi_K25Processor
    images = Kimi_K25ImageProcessor(patch_size=4, size={"max_height": 8, "max_width": 8})
    return _made(kind, images, {**kind.tokens})


def _minimax() -> Processor:
    kind = ours.MiniMaxM3VLProcessor
    return _made(kind, MiniMaxM3VLImageProcessor(patch_size=4, size=dict(PIXELS)), {**kind.tokens})


def _omni() -> Processor:
    images = tiny_processor("vl").image_processor
    tokens = {**ours.Qwen3VLProcessor.tokens}
    written = f"{tokens['vision_start']}{tokens['image']}{tokens['vision_end']}"
    return _made(ours.Qwen3OmniMoeProcessor, images, tokens, TEMPLATE.replace("IMAGE", written))


def _glm5() -> Processor:
    tokenizer = glm_processor().tokenizer
    images = Glm5NextImageProcessorPil(patch_size=4, min_image_tokens=1, max_image_tokens=64)
    return ours.Glm5NextProcessor(images, tokenizer, chat_template=GLM_TEMPLATE)


def _gemma() -> Processor:
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    images = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    return _made(ours.Gemma4Processor, images, {"image": "<|image|>", "a": "<|image>", "b": "<image|>"}, **named)


def _internvl() -> Processor:
    named = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"video_token": "<video>"}
    tokens = {"image": "<IMG_CONTEXT>", "a": "<img>", "b": "</img>", "c": "<video>"}
    images = GotOcr2ImageProcessor(size={"height": 16, "width": 16}, max_patches=4)
    processor = _made(ours.InternVLProcessor, images, tokens, **named)
    processor.read_settings({"image_seq_length": 4})
    return processor


def _step() -> Processor:
    """Images are squares of 32 x 32 pixels, of 4 tokens, and tiles of 16 x 16, of one."""
    kind = ours.Step3p7Processor
    return _made(kind, Step3p7ImageProcessor(**STEP), {**kind.tokens})


class PlainStep(Step3p7ImageProcessor):
    """Gives what transformers' own gives, which needs torchvision: also after which tiles a row ends."""

    def __call__(self, images: list[Image.Image], **kwargs: Any) -> BatchFeature:
        made = super(Step3p7ImageProcessor, self).__call__(images, **{**kwargs, "return_tensors": "pt"})
        sides = [self.tiles(*image.size) for image in images]
        most = max(columns * rows for columns, rows in sides)
        ends = [[*[False] * (columns - 1), True] * rows for columns, rows in sides]
        masks = [[*own[:-1], *[False] * (most - max(len(own) - 1, 0))] for own in ends]
        return BatchFeature({**made, "patch_newline_masks": masks} if most else {**made})


PROCESSORS: dict[str, Callable[[], Processor]] = {
    **dict.fromkeys(QWEN, tiny_processor),
    "glm4v_moe": glm_processor,
    "glm5_next": _glm5,
    "qwen3_omni_moe_thinker": _omni,
    "kimi_k25": _kimi,
    "minimax_m3_vl": _minimax,
    "gemma4": _gemma,
    "internvl": _internvl,
    "step3p7": _step,
}


def adjust(model: PreTrainedModel, processor: Processor) -> None:
    """Give a model's config the tokens of its processor."""
    config: Any = model.config
    image, names = processor.image_token_id, ("video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(processor, name, None) for name in names} | {"image_token_id": image}
    for key in ("image_start_token_id", "image_end_token_id"):
        ids[key] = ids[key.replace("image", "vision")]
    ids |= {"image_token_index": image, "boi_token_id": ids["image_start_token_id"]}
    for key, value in ids.items():
        if value is not None and hasattr(config, key):
            setattr(config, key, value)


def plain_inputs(family: str, processor: Processor, text: str, images: list[Image.Image]) -> dict[str, Any]:
    """What transformers' own processor makes of a text with images and gives to the model."""
    kind: Any = next(one for one in type(processor).__mro__ if one.__module__.startswith("transformers.models."))
    prepare: Any = processor.image_processor
    if family == "gemma4":
        prepare = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    elif family == "internvl":
        sizes = {"size": {"height": 16, "width": 16}, "max_patches": 4}
        prepare = transformers.models.got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil(**sizes)
    elif family == "step3p7":
        prepare = PlainStep(**STEP)
        processor.image_feature_placeholder = processor.image_token * 4
        processor.patch_feature_placeholder = processor.image_token
    for name in ("audio_token", "boa_token", "eoa_token") if family == "gemma4" else ():
        setattr(processor, name, "<none>")
        processor.boi_token, processor.eoi_token = processor.vision_start_token, processor.vision_end_token
    if family == "internvl":
        processor.start_image_token, processor.end_image_token = "<img>", "</img>"
        processor.multimodal_pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    held, processor.image_processor = processor.image_processor, prepare
    try:
        made = kind.__call__(processor, text=[text], images=images, return_tensors="pt")
    finally:
        processor.image_processor = held
    made.pop("num_soft_tokens_per_image", None)
    return dict(made)
