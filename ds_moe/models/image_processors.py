"""Image processors that resize with PIL, where transformers has one for torchvision alone, or gives patches in another
form than `ds_moe.data.processor.ImageProcessor` asks for.

They have the names of transformers' own, which a saved folder must name, and are held against those with torchvision.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ImagesKwargs


class MiniMaxM3VLImageProcessor(Qwen2VLImageProcessorPil):
    """Qwen2-VL's with other limits of an image's pixels."""

    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 451_584}

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("size") == [672, 672]:  # stands in released folders, and means nothing to transformers' own
            del kwargs["size"]
        super().__init__(**kwargs)


class KimiImagesKwargs(ImagesKwargs, total=False):
    """What may be set of `Kimi_K25ImageProcessor`: the most patches of an image, and sides of both kinds of squares."""

    max_patches: int
    patch_size: int
    merge_size: int


class Kimi_K25ImageProcessor(PilBackend):
    """Images are made smaller, never larger, and padded below and on the right to whole squares of merged patches."""

    do_resize = True
    resample = PILImageResampling.BICUBIC
    size = {"max_height": 512, "max_width": 512}  # patches a side
    max_patches = 16384
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    do_convert_rgb = True
    patch_size = 14
    merge_size = 2
    valid_kwargs = KimiImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width in pixels, resized and then padded."""
        patch, most = self.patch_size, self.size["max_height"]
        patches = max(1.0, height // patch) * max(1.0, width // patch)
        fits = math.sqrt(self.max_patches / patches), most * patch / height, most * patch / width
        scale = min(1.0, *fits)
        resized = tuple(min(max(1, int(side * scale)), most * patch) for side in (height, width))
        square = self.merge_size * patch
        return resized, tuple(-(-side // square) * square for side in resized)  # type: ignore[return-value]

    def _preprocess(self, images: list[np.ndarray], return_tensors: str | None = None, **settings: Any) -> BatchFeature:
        patches, grids, side = [], [], self.patch_size
        for image in images:
            if self.do_resize:
                resized, padded = self._sizes(*image.shape[-2:])
                image = self.resize(image, SizeDict(height=resized[0], width=resized[1]), self.resample)
                rows, columns = (after - before for before, after in zip(resized, padded, strict=True))
                image = np.pad(image, ((0, 0), (0, rows), (0, columns)))
            if self.do_rescale:
                image = self.rescale(image, self.rescale_factor)
            if self.do_normalize:
                image = self.normalize(image, self.image_mean, self.image_std)
            channels, rows, columns = image.shape[0], image.shape[1] // side, image.shape[2] // side
            squares = np.asarray(image, np.float32).reshape(channels, rows, side, columns, side)
            patches.append(squares.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels, side, side))
            grids.append([1, rows, columns])
        data = {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        _, (rows, columns) = self._sizes(height, width)
        return (rows // self.patch_size) * (columns // self.patch_size)


class Gemma4ImageProcessor(Gemma4ImageProcessorPil):
    """Gives the patches of all images one behind the other, without padding, and how many lie along each side."""

    @property
    def merge_size(self) -> int:
        """Patches a side that become one image token."""
        return self.pooling_kernel_size

    def __call__(self, images: list[Image.Image], **kwargs: Any) -> BatchFeature:
        made = super().__call__(images, **{**kwargs, "return_tensors": "pt"})
        positions_IP2 = made["image_position_ids"]
        kept_IP = positions_IP2[..., 0] >= 0
        columns_I, rows_I = (positions_IP2.amax(1) + 1).unbind(-1)
        grid = torch.stack([torch.ones_like(rows_I), rows_I, columns_I], dim=-1)
        return BatchFeature({"pixel_values": made["pixel_values"][kept_IP].float(), "image_grid_thw": grid})

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        merged = self.pooling_kernel_size
        most = self.max_soft_tokens * merged**2
        rows, columns = get_aspect_ratio_preserving_size(height, width, self.patch_size, most, merged)
        return (rows // self.patch_size) * (columns // self.patch_size)


class GotOcr2ImageProcessor(GotOcr2ImageProcessorPil):
    """Of InternVL, which cuts an image into tiles of one size and adds a small copy of it. A tile takes the place of a
    patch, and its grid says how many tokens each becomes.

    Attributes:
        tile_tokens: tokens of a tile.
    """

    merge_size = 1
    tile_tokens = 256

    def __call__(self, images: list[Image.Image], **kwargs: Any) -> BatchFeature:
        made = super().__call__(images, **{**kwargs, "return_tensors": "pt", "crop_to_patches": True})
        tiles_I = torch.as_tensor(made["num_patches"])
        grid = torch.stack([tiles_I, torch.full_like(tiles_I, self.tile_tokens), torch.ones_like(tiles_I)], dim=-1)
        return BatchFeature({"pixel_values": made["pixel_values"].float(), "image_grid_thw": grid})

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        tiles = super().get_number_of_image_patches(height, width, {"crop_to_patches": True})
        return tiles * self.tile_tokens
