"""What the data need of a processor, whichever model it belongs to; `ds_moe.models.processor` makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from transformers import BatchFeature, PreTrainedTokenizerBase

    from ds_moe.config.sections import VideoConfig
    from ds_moe.data.videos import Film, VideoPlan

Inputs: TypeAlias = "dict[str, Any]"  # arguments of a model's forward


class ImageProcessor(Protocol):
    """Turns images into patches: "pixel_values" (P, D) and "image_grid_thw" (I, 3)."""

    merge_size: int  # patches a side that become one image token
    patch_size: int  # pixels a side
    do_resize: bool  # whether an image is resized to a whole number of patches; it is refused otherwise

    def __call__(self, *, images: list[Image.Image], return_tensors: str) -> BatchFeature: ...

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        """Of an image of that size in pixels, which is resized."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


class VideoReader(Protocol):
    """Chooses frames of videos and turns them into patches; `ds_moe.models.video_reader` has one."""

    def plan(self, film: Film, name: str) -> VideoPlan:
        """Raises `RecordError` for a video that the model cannot read; `name` it has in messages."""
        ...

    def patches(self, frames: Iterable[np.ndarray], plan: VideoPlan) -> Tensor:
        """(P, D) of the frames that the plan takes, each given once, (height, width, 3) uint8."""
        ...


class Processor(Protocol):
    """A tokenizer with a chat template, and for a vision-language model an image processor beside it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def image_processor(self) -> ImageProcessor | None:
        """None: the model reads text only."""
        ...

    @property
    def image_token_id(self) -> int | None:
        """Stands in `input_ids` once for each token of an image; None: the model reads text only."""
        ...

    takes_types: ClassVar[bool]  # whether the model is told which tokens are of images
    resizes: ClassVar[bool]  # whether images are resized to whole patches and otherwise left as they are
    cuts: ClassVar[bool]  # whether something else may stand for an image that is turned by 90 degrees
    grounds: ClassVar[bool]  # whether the model writes boxes as `ds_moe.data.grounding` does

    @property
    def seen_ids(self) -> tuple[int, ...]:
        """What stands in `input_ids` for tokens of images, and of videos where they are read."""
        ...

    @property
    def video_tokens(self) -> tuple[str, str, str]:
        """Of a video, and what stands before and behind each group of its frames."""
        ...

    @property
    def chat_template(self) -> str | dict[str, str] | None: ...

    def apply_chat_template(
        self, conversation: list[dict], *, tokenize: bool, add_generation_prompt: bool, tools: list[dict] | None = None
    ) -> str: ...

    def batch_decode(self, sequences: Tensor, *, skip_special_tokens: bool) -> list[str]: ...

    def position_ids(self, input_ids_S: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """The positions of one sample by itself: (S,), or (4, S) for a model whose rotation has three dimensions.

        Of the four the first counts the tokens, and the others are those of time, height and width.
        """
        ...

    def image_ids(self, tokens: int, size: tuple[int, int] | None) -> list[int]:
        """What stands in `input_ids` for an image of so many tokens: these, and what frames them.

        Args:
            size: (width, height) in pixels, as the image is shown. Where `cuts` is False it may be another, or None.
        """
        ...

    def image_inputs(self, pixels_PD: Tensor, image_grid_thw: Tensor) -> Inputs:
        """The patches of a micro-batch's images, and their sizes, as arguments of the model."""
        ...

    def video_reader(self, settings: VideoConfig) -> VideoReader:
        """What makes patches of the model's videos. Raises `RecordError` where it takes none."""
        ...

    def tower_inputs(self, image_grid_thw: Tensor) -> Inputs:
        """What the vision tower makes of the sizes of its images, as arguments of the model; {}: it makes it itself."""
        ...

    def save_pretrained(self, save_directory: str) -> object: ...
