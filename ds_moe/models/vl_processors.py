"""Processors of images, videos and text, one a family.

They keep their parents' names: `save_pretrained` writes the class name, and a saved folder must name a class that plain
transformers knows. Their image processors resize with PIL: AutoProcessor would take one that resizes with torchvision,
to other pixels, wherever that is installed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma4Processor as HFGemma4Processor
from transformers import Glm4vProcessor as HFGlm4vProcessor
from transformers import Glm5NextProcessor as HFGlm5NextProcessor
from transformers import Glm46VProcessor as HFGlm46VProcessor
from transformers import InternVLProcessor as HFInternVLProcessor
from transformers import Kimi_K25Processor as HFKimi_K25Processor
from transformers import MiniMaxM3VLProcessor as HFMiniMaxM3VLProcessor
from transformers import Qwen3OmniMoeProcessor as HFQwen3OmniMoeProcessor
from transformers import Qwen3VLProcessor as HFQwen3VLProcessor
from transformers import Step3p7Processor as HFStep3p7Processor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ds_moe.config.sections import VideoConfig
from ds_moe.data.images import RecordError
from ds_moe.data.processor import Inputs
from ds_moe.errors import one_line
from ds_moe.models.image_processors import (
    Gemma4ImageProcessor,
    GotOcr2ImageProcessor,
    Kimi_K25ImageProcessor,
    MiniMaxM3VLImageProcessor,
    Step3p7ImageProcessor,
)
from ds_moe.models.images_only import ImagesOnly
from ds_moe.models.video_reader import Qwen3VLVideoReader

PAD, EOS, IMAGE, VIDEO = "<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
COLORS = 3


class Qwen3VLProcessor(ImagesOnly, HFQwen3VLProcessor):
    """Of Qwen3-VL, Qwen3.5 and Qwen3.6."""

    tokens = {
        **{"image": IMAGE, "video": VIDEO},
        **{"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"},
    }

    @property
    def seen_ids(self) -> tuple[int, ...]:
        return self.image_token_id, self.video_token_id

    def video_reader(self, settings: VideoConfig) -> Qwen3VLVideoReader:
        if self.video_config is None:
            fix = "copy video_preprocessor_config.json of the original model into it"
            raise RecordError(f"the record has a video, and the model's folder says nothing of videos ({fix})")
        try:
            reader = Qwen3VLVideoReader.of(self.video_config)
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(f"the record has a video, but of the model {one_line(error)} (correct that)") from error
        images = self.image_processor
        sizes = [(one.patch_size, one.merge_size, one.temporal_patch_size) for one in (reader, images)]
        if sizes[0] != sizes[1]:
            raise RecordError(f"the model's videos have patches of {sizes[0]}, its images {sizes[1]} (correct that)")
        return reader.set_to(settings)


class GLMImagesOnly(ImagesOnly):
    """What the processors of GLM's models have in common."""

    tokens = {
        **{"image": "<|image|>", "video": "<|video|>"},
        **{"vision_start": "<|begin_of_image|>", "vision_end": "<|end_of_image|>"},
    }

    @property
    def video_start_id(self) -> int:
        """Its parent looks for it, to tell images from videos, whose token is the same."""
        return self.tokenizer.convert_tokens_to_ids("<|begin_of_video|>")

    @property
    def video_end_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<|end_of_video|>")


class Glm4vProcessor(GLMImagesOnly, HFGlm4vProcessor):
    """Of GLM-4.5V."""


class Glm46VProcessor(GLMImagesOnly, HFGlm46VProcessor):
    """Of GLM-4.6V."""


class Glm5NextProcessor(GLMImagesOnly, HFGlm5NextProcessor):
    """Of GLM-5-Next, whose decoder knows no positions."""

    grounds, resizes, cuts = False, False, True

    def position_ids(self, input_ids_S: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        return torch.arange(len(input_ids_S))


class Qwen3OmniMoeProcessor(ImagesOnly, HFQwen3OmniMoeProcessor):
    """Of Qwen3-Omni's thinker, without sound."""

    tokens = Qwen3VLProcessor.tokens
    takes_types, grounds, ahead = False, False, False


class _Counting(ImagesOnly):
    """Of a model whose positions count tokens, be they of images or not."""

    takes_types, grounds, ahead = False, False, False

    def position_ids(self, input_ids_S: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        return torch.arange(len(input_ids_S))


class Kimi_K25Processor(_Counting, HFKimi_K25Processor):
    """Of Kimi-K2.5 and K2.6."""

    resizes = False
    tokens = {"image": "<|media_pad|>", "video": "<|kimi_k25_video_placeholder|>"}


class _Framed(_Counting):
    """Of a model that has a token before and behind each image, which its chat template does not write."""

    def image_ids(self, tokens: int, size: tuple[int, int] | None) -> list[int]:
        return [self.vision_start_token_id, *[self.image_token_id] * tokens, self.vision_end_token_id]


class MiniMaxM3VLProcessor(_Framed, HFMiniMaxM3VLProcessor):
    """Of MiniMax-M3."""

    tokens = {
        **{"image": HFMiniMaxM3VLProcessor.IMAGE_TOKEN, "video": HFMiniMaxM3VLProcessor.VIDEO_TOKEN},
        **{"vision_start": HFMiniMaxM3VLProcessor.VISION_START_TOKEN},
        **{"vision_end": HFMiniMaxM3VLProcessor.VISION_END_TOKEN},
    }


def _named(tokenizer: PreTrainedTokenizerBase | None, keys: Mapping[str, str]) -> Mapping[str, str]:
    """Tokens by the tokenizer's own names of them. Raises `ValueError` for one that it lacks."""
    missing = [key for key in keys.values() if getattr(tokenizer, key, None) is None]
    if missing:
        raise ValueError(f"the tokenizer has no {missing[0]}")
    return {name: getattr(tokenizer, key) for name, key in keys.items()}


class InternVLProcessor(_Framed, HFInternVLProcessor):
    """Of InternVL."""

    resizes, cuts = False, True
    image_seq_length = 256

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, str]:
        edges = {"vision_start": "start_image_token", "vision_end": "end_image_token"}
        return _named(tokenizer, {"image": "context_image_token", "video": "video_token", **edges})

    def read_settings(self, settings: Mapping[str, Any]) -> None:
        self.image_seq_length = self.image_processor.tile_tokens = int(settings.get("image_seq_length", 256))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_seq_length": self.image_seq_length}

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> Inputs:
        return {"pixel_values": pixels_PD}


class Gemma4Processor(_Framed, HFGemma4Processor):
    """Of Gemma 4, whose image tokens see all of their image."""

    takes_types, resizes = True, False

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, str]:
        return _named(tokenizer, {"image": "image_token", "vision_start": "boi_token", "vision_end": "eoi_token"})

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> Inputs:
        """Patches of each image, padded to the most of any, and their places (x, y), -1 for padding."""
        sizes = image_grid_thw.prod(-1).tolist()
        places = [
            torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), -1).view(-1, 2)
            for _, rows, columns in image_grid_thw.tolist()
        ]
        return {
            "pixel_values": pad_sequence(list(pixels_PD.split(sizes)), batch_first=True),
            "image_position_ids": pad_sequence(places, batch_first=True, padding_value=-1),
        }


class Step3p7Processor(_Counting, HFStep3p7Processor):
    """Of Step-3.7, which sees an image whole, and cut into rows of tiles before that if it is large or long."""

    resizes, cuts = False, True
    tokens = {
        **{"image": "<im_patch>", "vision_start": "<im_start>", "vision_end": "<im_end>"},
        **{"tile_start": "<patch_start>", "tile_end": "<patch_end>", "row_end": "<patch_newline>"},
    }

    def image_ids(self, tokens: int, size: tuple[int, int] | None) -> list[int]:
        assert size is not None  # `cuts` is true
        columns, rows = self.image_processor.tiles(*size)
        of_view, of_tile = (patches // self.image_processor.merge_size**2 for patches in self.image_processor.patches)
        tile = [self.tile_start_token_id, *[self.image_token_id] * of_tile, self.tile_end_token_id]
        ids = ([*tile * columns, self.row_end_token_id] * rows)[:-1]
        return [*ids, self.vision_start_token_id, *[self.image_token_id] * of_view, self.vision_end_token_id]

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> Inputs:
        """Images as a whole, the tiles of all of them, if there are any, and how many tiles each has."""
        images = self.image_processor
        (of_view, _), side, side_of_tile = images.patches, images.size["height"], images.patch_size
        views, tiles, counts = [], [], []
        for own_pD in pixels_PD.split(image_grid_thw.prod(-1).tolist()):
            views.append(own_pD[-of_view:].reshape(1, COLORS, side, side))
            tiles.append(own_pD[:-of_view].reshape(-1, COLORS, side_of_tile, side_of_tile))
            counts.append(len(tiles[-1]))
        given = {"pixel_values": torch.cat(views), "num_local_patches": counts}
        return {**given, "pixel_values_local": torch.cat(tiles)} if any(counts) else given


# What folders call an image processor, without the end of the name that says with what it resizes -> its class that
# resizes with PIL, and the processor around it.
VL_PROCESSORS: dict[str, tuple[Any, type[ImagesOnly]]] = {
    "Qwen2VLImageProcessor": (Qwen2VLImageProcessorPil, Qwen3VLProcessor),
    "Glm4vImageProcessor": (Glm4vImageProcessorPil, Glm4vProcessor),
    "Glm46VImageProcessor": (Glm46VImageProcessorPil, Glm46VProcessor),
    "Glm5NextImageProcessor": (Glm5NextImageProcessorPil, Glm5NextProcessor),
    "Kimi_K25ImageProcessor": (Kimi_K25ImageProcessor, Kimi_K25Processor),
    "MiniMaxM3VLImageProcessor": (MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor),
    "Gemma4ImageProcessor": (Gemma4ImageProcessor, Gemma4Processor),
    "GotOcr2ImageProcessor": (GotOcr2ImageProcessor, InternVLProcessor),
    "Step3p7ImageProcessor": (Step3p7ImageProcessor, Step3p7Processor),
}
# What folders call a processor whose images another family reads too -> the processor.
BY_NAME: dict[str, type[ImagesOnly]] = {"Qwen3OmniMoeProcessor": Qwen3OmniMoeProcessor}
