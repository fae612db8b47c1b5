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
from transformers.image_transforms import divide_to_patches
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.step3p7.image_processing_step3p7 import Step3p7ImageProcessor as WithTorchvision
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

    @property
    def pixels_a_token(self) -> int:
        """See `ds_moe.data.prepared.make`."""
        return self.size["height"] * self.size["width"] // self.tile_tokens

    def __call__(self, images: list[Image.Image], **kwargs: Any) -> BatchFeature:
        made = super().__call__(images, **{**kwargs, "return_tensors": "pt", "crop_to_patches": True})
        tiles_I = torch.as_tensor(made["num_patches"])
        grid = torch.stack([tiles_I, torch.full_like(tiles_I, self.tile_tokens), torch.ones_like(tiles_I)], dim=-1)
        return BatchFeature({"pixel_values": made["pixel_values"].float(), "image_grid_thw": grid})

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        tiles = super().get_number_of_image_patches(height, width, {"crop_to_patches": True})
        return tiles * self.tile_tokens


class Step3p7ImagesKwargs(ImagesKwargs, total=False):
    """What may be set of `Step3p7ImageProcessor`: the side of a tile, and the longest of an image, in pixels."""

    patch_size: int
    max_image_size: int


class Step3p7ImageProcessor(PilBackend):
    """Makes each image a square of one size and, if it is large or long, cuts tiles of another size from it too.

    `__call__` gives the numbers of an image's tiles and of the square behind them, as they lie in memory, in rows of as
    many as a patch of the tower has.
    """

    do_resize = True
    resample = PILImageResampling.BILINEAR
    size = {"height": 728, "width": 728}
    patch_size = 504  # of a tile, not of the tower's patches
    max_image_size = 3024
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    vision_patch_size = 14
    downsampler_stride = 4
    valid_kwargs = Step3p7ImagesKwargs
    model_input_names = ["pixel_values", "pixel_values_local", "num_local_patches"]
    _is_extreme_aspect = staticmethod(WithTorchvision._is_extreme_aspect)
    _plan_patches = WithTorchvision._plan_patches

    @property
    def merge_size(self) -> int:
        """Patches a side that become one image token."""
        return self.downsampler_stride

    @property
    def pixels_a_token(self) -> int:
        """See `ds_moe.data.prepared.make`."""
        return (self.merge_size * self.vision_patch_size) ** 2

    @property
    def patches(self) -> tuple[int, int]:
        """Patches of the square, and of a tile."""
        return (self.size["height"] // self.vision_patch_size) ** 2, (self.patch_size // self.vision_patch_size) ** 2

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of the tiles that are cut from an image; (0, 0): none is."""
        return self._plan_patches(width, height, self.size["height"], self.patch_size)[3:5]

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        (columns, rows), (of_view, of_tile) = self.tiles(width, height), self.patches
        return of_view + columns * rows * of_tile

    def __call__(self, images: list[Image.Image], **kwargs: Any) -> BatchFeature:
        made = super().__call__(images, **{**kwargs, "return_tensors": "pt"})
        views, counts = made["pixel_values"], made["num_local_patches"].tolist()
        width, (of_view, of_tile) = views.shape[1] * self.vision_patch_size**2, self.patches
        tiles = made["pixel_values_local"].split(counts) if any(counts) else [views[:0]] * len(counts)
        rows = [one.reshape(-1, width) for pair in zip(tiles, views, strict=True) for one in pair]
        grid = torch.tensor([[1, 1, of_view + count * of_tile] for count in counts])
        return BatchFeature({"pixel_values": torch.cat(rows), "image_grid_thw": grid})

    def _preprocess(self, images: list[np.ndarray], return_tensors: str | None = None, **settings: Any) -> BatchFeature:
        """What transformers' own gives to the model: squares, tiles of all images, and how many of them each has."""
        side, of_tile = self.size["height"], self.patch_size
        views, tiles, counts = [], [], []
        for image in images:
            height, width = image.shape[-2:]
            shown, cut, window, *_, narrow = self._plan_patches(width, height, side, of_tile)
            if narrow:
                longest = max(height, width)
                image = self.pad([image], SizeDict(height=longest, width=longest))[0]
            views.append(self._numbers(self._resized(self._resized(image, *shown), side, side)))
            own = divide_to_patches(self._resized(image, *cut), window) if window else []
            tiles += [self._numbers(self._resized(one, of_tile, of_tile)) for one in own]
            counts.append(len(own))
        data = {"pixel_values": np.stack(views), "num_local_patches": np.array(counts, dtype=np.int64)}
        data |= {"pixel_values_local": np.stack(tiles)} if tiles else {}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _resized(self, image: np.ndarray, width: int, height: int) -> np.ndarray:
        return self.resize(image, SizeDict(height=height, width=width), self.resample)

    def _numbers(self, image: np.ndarray) -> np.ndarray:
        image = self.rescale(image, self.rescale_factor) if self.do_rescale else image
        image = self.normalize(image, self.image_mean, self.image_std) if self.do_normalize else image
        return np.asarray(image, np.float32)
