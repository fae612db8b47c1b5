"""Processors, which turn chat text and images into a model's inputs.

The processor of a vision-language (VL) model is one of `vl_processors.py`. The tokenizer of a text-only model is
wrapped in a `TextProcessor`, so that callers read `.tokenizer`, `.image_processor` and `.chat_template` of either.
Those of the tiny presets are built from code, offline.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file

from ds_moe.config.sections import VideoConfig
from ds_moe.data.digits import ANSWERS, QUESTIONS
from ds_moe.data.images import RecordError
from ds_moe.data.processor import Inputs, Processor, VideoReader
from ds_moe.errors import UserError
from ds_moe.models.images_only import ImagesOnly
from ds_moe.models.vl_processors import (
    BY_NAME,
    EOS,
    IMAGE,
    PAD,
    VIDEO,
    VL_PROCESSORS,
    Qwen3VLProcessor,
)

SPECIAL_TOKENS = [PAD, "<|im_start|>", EOS, "<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO]
VIDEO_CONFIG = "video_preprocessor_config.json"
TINY_PATCH = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
TINY_VIDEO_PIXELS = {"shortest_edge": 512, "longest_edge": 32768}  # of all frames of a video together: 4 to 256 tokens
TINY_PIXELS = {"shortest_edge": 64, "longest_edge": 4096}  # least and most pixels of a resized image: 1 to 64 tokens

# ChatML as Qwen3-VL writes it (without its tool calls): images keep their place in a user turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(eq=False)
class TextProcessor:
    """A tokenizer with the attributes of a VL processor; an `image_processor` of None says that it takes no images."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: None = None
    image_token_id: None = None
    seen_ids: tuple[int, ...] = ()

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        return self.tokenizer.chat_template

    def apply_chat_template(self, conversation: list[dict], **kwargs) -> str:
        return cast(str, self.tokenizer.apply_chat_template(conversation, **kwargs))  # its callers do not tokenize

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str | list[str]:
        return self.tokenizer.decode(*args, **kwargs)

    takes_types: ClassVar[bool] = False
    grounds: ClassVar[bool] = True
    resizes: ClassVar[bool] = True
    cuts: ClassVar[bool] = False

    def position_ids(self, input_ids_S: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        return torch.arange(len(input_ids_S))

    def image_ids(self, tokens: int, size: tuple[int, int] | None) -> list[int]:
        raise NotImplementedError("text only")

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> Inputs:
        raise NotImplementedError("text only")

    @property
    def video_tokens(self) -> tuple[str, str, str]:
        raise TypeError("a text-only model has no such tokens")

    def video_reader(self, settings: VideoConfig) -> VideoReader:
        text = "the record has a video, but the model reads text only (use a vision-language model)"
        raise RecordError(text)

    def tower_inputs(self, image_grid_thw: Tensor) -> Inputs:
        return {}

    def save_pretrained(self, save_directory: str | Path) -> None:
        self.tokenizer.save_pretrained(save_directory)


def _digits_texts() -> tuple[str, ...]:
    words = [wording for wordings in QUESTIONS.values() for wording in wordings]
    return (*words, *(answer(digit) for answer in ANSWERS.values() for digit in range(10)))


@lru_cache(maxsize=2)
def _tiny_vocabulary(texts: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE trained on `texts`: it encodes any text, and these in few tokens."""
    blank = Qwen2Tokenizer(vocab={PAD: 0}, merges=[])._tokenizer  # made for its normalizer and pre-tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=448, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet()))
    tokenizer.train_from_iterator([*texts, "system", "user", "assistant"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _tiny_tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerBase:
    vocabulary, merges = _tiny_vocabulary(texts)
    # The class that folders of these families name on the hub; AutoTokenizer gives back the class that a folder names.
    tokenizer = Qwen2Tokenizer(
        vocab=dict(vocabulary), merges=list(merges), unk_token=None, eos_token=EOS, pad_token=PAD
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_processor(
    kind: Literal["vl", "text"] = "vl", texts: tuple[str, ...] | None = None, patch_size: int = 4
) -> Processor:
    """The processor of the tiny presets, built offline and the same in every process: "vl" or "text".

    A 16x16 image becomes 4x4 patches of 4x4 pixels, merged 2x2 into 4 image tokens.

    Args:
        texts: what the vocabulary is made for; None: the questions and answers about digits.
        patch_size: pixels a side.
    """
    tokenizer = _tiny_tokenizer(texts or _digits_texts())
    if kind == "text":
        return TextProcessor(tokenizer)
    if kind != "vl":
        raise ValueError(f"tiny_processor: kind {kind!r} is neither 'vl' nor 'text'")
    half = [0.5, 0.5, 0.5]
    patch = {**TINY_PATCH, "patch_size": patch_size}
    images = Qwen2VLImageProcessorPil(size=dict(TINY_PIXELS), image_mean=half, image_std=half, **patch)
    processor = Qwen3VLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
    of_videos = {"size": dict(TINY_VIDEO_PIXELS), "image_mean": half, "image_std": half, "fps": 2}
    processor.video_config = {"video_processor_type": "Qwen3VLVideoProcessor", **of_videos, **patch}
    return processor


def load_processor(path: str | Path) -> Processor:
    """Processor of a local folder or hub id: a VL one where the folder describes images, else a `TextProcessor`.

    Raises `UserError` where neither can be read, or where there is no chat template to train with.
    """
    if str(path).startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise UserError(f"{path}: no such folder (give the folder of a saved model, or a hub id)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        images = _image_settings(path)
        processor = TextProcessor(tokenizer) if images is None else _vl_processor(path, images, tokenizer)
    except Exception as error:  # transformers looks into values before it looks at their types
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: no processor or tokenizer could be loaded from it ({reason})") from error
    if not processor.chat_template:
        raise UserError(f"{path}: its processor has no chat template (add chat_template.jinja to the folder)")
    return cast("Processor", processor)


def _image_settings(path: str | Path) -> dict[str, object] | None:
    """What the folder says of images; None: nothing, so that the model reads text only."""
    try:
        return Qwen2VLImageProcessorPil.get_image_processor_dict(str(path))[0]
    except OSError:
        return None


def _vl_processor(path: str | Path, images: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> ImagesOnly:
    """A processor put together from its parts: AutoProcessor cannot build the video half without torchvision."""
    name = str(images.get("image_processor_type", "Qwen2VLImageProcessor"))
    kind = name.removesuffix("Fast").removesuffix("Pil")
    if kind not in VL_PROCESSORS:
        raise ValueError(f"image_processor_type {name!r} is not read; ds_moe reads images with {list(VL_PROCESSORS)}")
    image_processor, processor_class = VL_PROCESSORS[kind]
    settings, _ = ProcessorMixin.get_processor_dict(str(path))
    named = settings.get("processor_class") or images.get("processor_class")
    processor = BY_NAME.get(str(named), processor_class)(
        image_processor.from_pretrained(str(path)),
        tokenizer,
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
    )
    processor.read_settings(settings)
    file = cached_file(str(path), VIDEO_CONFIG, _raise_exceptions_for_missing_entries=False)
    processor.video_config = settings.get("video_processor") or (json.loads(Path(file).read_text()) if file else None)
    return processor


def save_processor(processor: Processor, path: str | Path) -> None:
    """Write all that `load_processor` or plain transformers needs; reloaded, it gives identical ids and pixels."""
    processor.save_pretrained(str(path))
    video_config = getattr(processor, "video_config", None)
    if video_config:
        (Path(path) / VIDEO_CONFIG).write_text(json.dumps(video_config, indent=2) + "\n")


def special_token_ids(processor: Processor) -> dict[str, int]:
    """The ids that a model's config repeats: image, video, vision start and end, eos (<|im_end|>), pad.

    The keys of vision tokens are absent where the vocabulary, of a text-only model, has no such tokens.
    """
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    names = {"image": IMAGE, "video": VIDEO, "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": vocabulary[token] for name, token in names.items() if token in vocabulary}
    return {**ids, "eos_token_id": cast(int, tokenizer.eos_token_id), "pad_token_id": cast(int, tokenizer.pad_token_id)}
