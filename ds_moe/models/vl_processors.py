"""Processors of images and text, without the video half, which cannot be built without torchvision.

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
from transformers import Glm4vProcessor as HFGlm4vProcessor
from transformers import Glm46VProcessor as HFGlm46VProcessor
from transformers import Qwen3VLProcessor as HFQwen3VLProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ds_moe.models.tower import tower_inputs

PAD, EOS, IMAGE, VIDEO = "<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"


class ImagesOnly:
    """A processor that reads images as patches, of which squares of `merge_size` a side become one token each, of a
    model that rotates in three dimensions: time, height and width.

    Attributes:
        tokens: what the model's vocabulary calls an image's token, a video's, and the edges of both.
        tower: of the run's model, without storage; None: not known.
        video_config: what the folder says of videos, for the next save.
    """

    tokens: ClassVar[Mapping[str, str]]
    image_processor: Any

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        for name, token in self.tokens.items():
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = None
        self.video_config: dict[str, object] | None = None
        self.tower: nn.Module | None = None

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
        images_1S = (input_ids_S == self.image_token_id).long().unsqueeze(0)
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


# What folders call an image processor, without the end of the name that says with what it resizes -> its class that
# resizes with PIL, and the processor around it.
VL_PROCESSORS: dict[str, tuple[Any, type[ImagesOnly]]] = {
    "Qwen2VLImageProcessor": (Qwen2VLImageProcessorPil, Qwen3VLProcessor),
    "Glm4vImageProcessor": (Glm4vImageProcessorPil, Glm4vProcessor),
    "Glm46VImageProcessor": (Glm46VImageProcessorPil, Glm46VProcessor),
}
