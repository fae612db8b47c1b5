"""What processors of images and text have in common here: they work without transformers' video half, which cannot be
built without torchvision."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ds_moe.config.sections import VideoConfig
from ds_moe.data.images import RecordError
from ds_moe.data.processor import Inputs
from ds_moe.models.tower import tower_inputs
from ds_moe.models.video_reader import Qwen3VLVideoReader, with_settings


class ImagesOnly:
    """A processor that reads images as patches, of which squares of `merge_size` a side become one token each, of a
    model that rotates in three dimensions: time, height and width.

    Attributes:
        tokens: what the model's vocabulary calls an image's token, a video's, and the edges of both.
        takes_types: whether the model is told which tokens are of images.
        grounds: whether the model writes boxes in thousandths of an image's sides, as `ds_moe.data.grounding` does.
        resizes: whether an image is resized to whole patches and otherwise left as it is.
        cuts: whether something else may stand for an image that is turned by 90 degrees.
        ahead: whether what the tower derives from the sizes of images is made where data are loaded.
        tower: of the run's model, without storage; None: not known.
        video_config: what the folder says of videos, for the next save.
    """

    tokens: ClassVar[Mapping[str, str]]
    takes_types: ClassVar[bool] = True
    grounds: ClassVar[bool] = True
    resizes: ClassVar[bool] = True
    cuts: ClassVar[bool] = False
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

    def image_ids(self, tokens: int, size: tuple[int, int] | None) -> list[int]:
        """See `ds_moe.data.processor.Processor`."""
        return [self.image_token_id] * tokens

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> Inputs:
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

    def tower_inputs(self, image_grid_thw: Tensor) -> Inputs:
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
