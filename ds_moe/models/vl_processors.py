"""Processors of images, videos and text, without transformers' video half, which cannot be built without torchvision.

They keep their parents' names: `save_pretrained` writes the class name, and a saved folder must name a class that plain
transformers knows. Their image processors resize with PIL: AutoProcessor would take one that resizes with torchvision,
to other pixels, wherever that is installed.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
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
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ds_moe.config.sections import VideoConfig
from ds_moe.data.images import RecordError
from ds_moe.errors import one_line
from ds_moe.models.image_processors import (
    Gemma4ImageProcessor,
    GotOcr2ImageProcessor,
    Kimi_K25ImageProcessor,
    MiniMaxM3VLImageProcessor,
)
from ds_moe.models.tower import tower_inputs
from ds_moe.models.video_reader import Qwen3VLVideoReader, with_settings

PAD, EOS, IMAGE, VIDEO = "<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"


class ImagesOnly:
    """A processor that reads images as patches, of which squares of `merge_size` a side become one token each, of a
    model that rotates in three dimensions: time, height and width.

    Attributes:
        tokens: what the model's vocabulary calls an image's token, a video's, and the edges of both.
        takes_types: whether the model is told which tokens are of images.
        grounds: whether the model writes boxes in thousandths of an image's sides, as `ds_moe.data.grounding` does.
        resizes: whether an image is resized to whole patches and otherwise left as it is.
        ahead: whether what the tower derives from the sizes of images is made where data are loaded.
        tower: of the run's model, without storage; None: not known.
        video_config: what the folder says of videos, for the next save.
    """

    tokens: ClassVar[Mapping[str, str]]
    takes_types: ClassVar[bool] = True
    grounds: ClassVar[bool] = True
    resizes: ClassVar[bool] = True
    ahead: ClassVar[bool] = True
    image_processor: Any

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        for name, token in self.tokens_of(tokenizer).items():
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None
        self.video_config: dict[str, object] | None = None
        self.tower: nn.Module | None = None

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, str]:
        """`tokens` of a model with this tokenizer."""
        return self.tokens

    def read_settings(self, settings: Mapping[str, Any]) -> None:
        """Take what the folder says of the processor itself."""

    def image_ids(self, tokens: int) -> list[int]:
        """See `ds_moe.data.processor.Processor`."""
        return [self.image_token_id] * tokens

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> dict[str, Any]:
        """See `ds_moe.data.processor.Processor`."""
        return {"pixel_values": pixels_PD, "image_grid_thw": image_grid_thw}

    @property
    def seen_ids(self) -> tuple[int, ...]:
        """See `ds_moe.data.processor.Processor`."""
        return (self.image_token_id,)

    def keep_settings(self, videos: VideoConfig) -> None:
        """Have the folders that are saved say what a run says of videos instead of the model's folder."""
        if self.video_config is not None:
            self.video_config = with_settings(self.video_config, videos)

    @property
    def video_tokens(self) -> tuple[str, str, str]:
        return self.video_token, self.vision_start_token, self.vision_end_token

    def video_reader(self, settings: VideoConfig) -> Qwen3VLVideoReader:
        """See `ds_moe.data.processor.Processor`."""
        raise RecordError("the record has a video, and those of this model's family are not read (remove the record)")

    def tower_inputs(self, image_grid_thw: Tensor) -> dict[str, Any]:
        """See `ds_moe.data.processor.Processor`. `transformers` hands on to the tower what begins with "image_"."""
        made = tower_inputs(self.tower, image_grid_thw) if self.tower is not None else {}
        return {f"image_{name}": value for name, value in made.items() if name != "grid_thw"}

    def position_ids(self, input_ids_S: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """(4, S): see `ds_moe.data.processor.Processor`. Qwen3-VL's method computes them, without a model; those of
        the other families here give the same."""
        of = transformers.Qwen3VLModel
        merge = SimpleNamespace(spatial_merge_size=self.image_processor.merge_size)
        stand_in = SimpleNamespace(
            config=SimpleNamespace(vision_config=merge),
            get_vision_position_ids=lambda *args, **kwargs: of.get_vision_position_ids(None, *args, **kwargs),
        )
        seen_S = torch.isin(input_ids_S, torch.tensor(self.seen_ids))
        images_1S = seen_S.long().unsqueeze(0)
        rope, _ = of.get_rope_index(
            stand_in, input_ids_S.unsqueeze(0), mm_token_type_ids=images_1S, image_grid_thw=image_grid_thw
        )
        return torch.cat([torch.arange(len(input_ids_S)).unsqueeze(0), rope.squeeze(1)])


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

    grounds, resizes = False, False

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

    def image_ids(self, tokens: int) -> list[int]:
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

    resizes = False
    image_seq_length = 256

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, str]:
        edges = {"vision_start": "start_image_token", "vision_end": "end_image_token"}
        return _named(tokenizer, {"image": "context_image_token", "video": "video_token", **edges})

    def read_settings(self, settings: Mapping[str, Any]) -> None:
        self.image_seq_length = self.image_processor.tile_tokens = int(settings.get("image_seq_length", 256))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_seq_length": self.image_seq_length}

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> dict[str, Any]:
        return {"pixel_values": pixels_PD}


class Gemma4Processor(_Framed, HFGemma4Processor):
    """Of Gemma 4, whose image tokens see all of their image."""

    takes_types, resizes = True, False

    def tokens_of(self, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, str]:
        return _named(tokenizer, {"image": "image_token", "vision_start": "boi_token", "vision_end": "eoi_token"})

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> dict[str, Any]:
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
}
# What folders call a processor whose images another family reads too -> the processor.
BY_NAME: dict[str, type[ImagesOnly]] = {"Qwen3OmniMoeProcessor": Qwen3OmniMoeProcessor}
