"""Patches of images as the bytes that they are, and the floats that a model's processor makes of them.

Behind its resizing a processor maps each byte to a float by itself (it rescales and normalises), and shows an image
once for each frame of a patch. Loading processes therefore hand on bytes, an eighth of the floats' memory, and the
device looks the floats up in a table that the processor itself has filled: they are its own, to the bit.

Letters: P patches, C channels, A pixels of a patch, F frames of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_moe.data.processor import ImageProcessor, Processor

if TYPE_CHECKING:
    from typing import Any

    from transformers import BatchFeature

VALUES = 256  # of a byte
IN_CACHE = 128  # patches whose floats a CPU makes at a time
PROBE = (83, 61)  # pixels: no whole number of patches


@dataclass(frozen=True)
class PixelTable:
    """The float of each byte.

    Attributes:
        values_CV: (C, 256) float32.
        frames: of a patch, as the model takes them.
        area: pixels of a patch.
    """

    values_CV: Tensor
    frames: int
    area: int

    def __reduce__(self) -> tuple[object, ...]:
        """To another process it goes by value, not as a segment of shared memory."""
        return _table, (self.values_CV.numpy(), self.frames, self.area)

    def floats(self, bytes_PD: Tensor) -> Tensor:
        """(P, C * F * A) float32, on the device of `bytes_PD`: (P, C * A) uint8 of an image, which is shown once for
        each frame, or (P, C * F * A)."""
        patches, channels = len(bytes_PD), len(self.values_CV)
        own_frames = bytes_PD.shape[1] // (channels * self.area)
        device = bytes_PD.device
        first_C1 = torch.arange(0, channels * VALUES, VALUES, dtype=torch.int32, device=device).unsqueeze(1)
        table = self.values_CV.to(device, non_blocking=True).flatten()
        shape, on_cpu = (patches, channels, self.frames, self.area), device.type == "cpu"
        # NumPy asks the system for large pages, without which the first write of each of many small ones takes longer
        # than all else here.
        floats_PCFA = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else torch.empty(shape, device=device)
        size = IN_CACHE if on_cpu else max(patches, 1)
        for bytes_pD, floats_pCFA in zip(bytes_PD.split(size), floats_PCFA.split(size), strict=True):
            index_pCX = bytes_pD.view(len(bytes_pD), channels, own_frames * self.area).int().add_(first_C1)
            found = table.index_select(0, index_pCX.flatten())
            floats_pCFA.copy_(found.view(len(bytes_pD), channels, own_frames, self.area))
        return floats_PCFA.view(patches, channels * self.frames * self.area)


def _table(values_CV: np.ndarray, frames: int, area: int) -> PixelTable:
    return PixelTable(torch.from_numpy(values_CV), frames, area)


class BytePatches:
    """An image processor that stops before it makes floats; satisfies `ImageProcessor`, for images in RGB.

    Its "pixel_values" are (P, C * A) uint8, of which `table` makes those of the processor that it was made of.
    """

    def __init__(self, processor: ImageProcessor) -> None:
        self._processor, self._resized = processor, _resizing(processor)
        self.merge_size, self.patch_size = processor.merge_size, processor.patch_size
        self.do_resize = processor.do_resize
        self.table = self._table()

    def __reduce__(self) -> tuple[object, ...]:
        """Another process makes it anew: the class of `_resizing` has no name."""
        return BytePatches, (self._processor,)

    def __getattr__(self, name: str) -> object:
        """What else the processor says of itself."""
        return getattr(self._processor, name)

    @classmethod
    def of(cls, processor: ImageProcessor) -> BytePatches | None:
        """None for a processor whose floats are not those of a table, as an image of noise shows."""
        try:
            made = cls(processor)
            return made if made._proven() else None
        except Exception:  # it is built in another way, and is used as it is
            return None

    def __call__(self, *, images: list[Image.Image], return_tensors: str) -> BatchFeature:
        return self._resized([_Picture(image) for image in images], self.do_resize, return_tensors)

    def get_number_of_image_patches(self, height: int, width: int) -> int:
        return self._processor.get_number_of_image_patches(height, width)

    def to_dict(self) -> dict[str, object]:
        return self._processor.to_dict()

    def _table(self) -> PixelTable:
        """Of an image that has every value in every channel, and is not resized."""
        side = self.patch_size * self.merge_size
        width = side * -(-VALUES // side**2)
        values = np.arange(side * width, dtype=np.uint8).reshape(side, width, 1).repeat(3, axis=2)
        as_it_is = copy(self._processor)
        cast("Any", as_it_is).do_resize = False
        image = Image.fromarray(values)
        floats_PD = as_it_is(images=[image], return_tensors="pt")["pixel_values"]
        bytes_PD = self._resized([_Picture(image)], False, "pt")["pixel_values"]
        patches, area = len(bytes_PD), self.patch_size**2
        channels, frames = bytes_PD.shape[1] // area, floats_PD.shape[1] // bytes_PD.shape[1]
        bytes_PCA = bytes_PD.view(patches, channels, area).long()
        first_PCA = floats_PD.view(patches, channels, frames, area)[:, :, 0]
        values_CV = torch.full((channels, VALUES), torch.nan)
        for channel in range(channels):
            values_CV[channel, bytes_PCA[:, channel]] = first_PCA[:, channel]
        return PixelTable(values_CV, frames, area)

    def _proven(self) -> bool:
        noise = np.random.default_rng(0).integers(0, VALUES, (*PROBE, 3), dtype=np.uint8)
        side = self.patch_size * self.merge_size
        whole = noise if self.do_resize else noise[: PROBE[0] // side * side, : PROBE[1] // side * side]
        images = [Image.fromarray(whole)]
        floats, made = (one(images=images, return_tensors="pt") for one in (self._processor, self))
        same_grid = torch.equal(floats["image_grid_thw"], made["image_grid_thw"])
        return same_grid and torch.equal(floats["pixel_values"], self.table.floats(made["pixel_values"]))


def with_byte_patches(processor: Processor) -> Processor:
    """The same processor with `BytePatches` as its image processor, where it has one, that is possible, and the model
    takes the rows of patches as they are."""
    images, rows, size = processor.image_processor, torch.zeros(4, 3, dtype=torch.uint8), torch.tensor([[1, 2, 2]])
    made = None if images is None or isinstance(images, BytePatches) else BytePatches.of(images)
    if made is None or processor.image_inputs(rows, size).get("pixel_values") is not rows:
        return processor
    same = copy(processor)
    cast("Any", same).image_processor = made
    return same


def table_of(processor: Processor) -> PixelTable:
    """Of the bytes that an `Encoder` with this processor makes. Raises `TypeError` where it makes none."""
    images = processor.image_processor
    made = images if isinstance(images, BytePatches) or images is None else _made_of(images)
    if made is None:
        raise TypeError("bytes of images are collated with another processor than the one that made them")
    return made.table


@lru_cache(maxsize=16)
def _made_of(processor: ImageProcessor) -> BytePatches | None:
    return BytePatches.of(processor)


class _Picture:
    """An image in RGB where a processor of transformers expects an array (C, height, width)."""

    def __init__(self, image: Image.Image) -> None:
        if image.mode != "RGB":
            raise TypeError(f"an image of mode {image.mode}, not in RGB")
        self.image, self.shape = image, (3, image.height, image.width)


def _resizing(processor: ImageProcessor) -> Callable[[list[_Picture], bool, str], BatchFeature]:
    """What a processor of transformers that resizes with PIL makes of pictures, without floats.

    Its class decides about sizes and calls `resize` of the next one, which is ours: an image of PIL stays one, and
    becomes an array where it is cut into patches.
    """
    from transformers.image_processing_backends import PilBackend
    from transformers.image_utils import SizeDict

    class Resized(PilBackend):
        def resize(self, image: _Picture, size: SizeDict, resample: int | None = None, **_: object) -> _Picture:
            return _Picture(image.image.resize((size.width, size.height), resample))

    of = cast("Any", type(processor))
    one = cast("Any", copy(processor))
    one.__class__ = type(of.__name__, (of, Resized), {"patchify": staticmethod(_patches_of_bytes)})
    one.do_rescale = one.do_normalize = False
    settings = one._standardize_kwargs(**{name: getattr(one, name, None) for name in one._valid_kwargs_names})

    def resized(pictures: list[_Picture], do_resize: bool, return_tensors: str) -> BatchFeature:
        return one._preprocess(pictures, **settings | {"do_resize": do_resize, "return_tensors": return_tensors})

    return resized


def _patches_of_bytes(image: _Picture, patch_size: int, merge_size: int, **_: object) -> tuple[np.ndarray, int, int]:
    """((P, C * A) uint8, patches of the height, of the width), in the order of the processors' own `patchify`: patches
    that become one token are neighbours."""
    pieces = f"V{patch_size}"  # the bytes of a row of a patch, copied as one
    rows, columns = image.image.height // patch_size, image.image.width // patch_size
    cut = np.empty((rows // merge_size, columns // merge_size, merge_size, merge_size, 3, patch_size), dtype=pieces)
    for channel, name in enumerate("RGB"):
        of_channel = np.frombuffer(image.image.tobytes("raw", name), dtype=pieces)
        by_row = of_channel.reshape(rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size)
        cut[..., channel, :] = by_row.transpose(0, 3, 1, 4, 2)
    return cut.view(np.uint8).reshape(rows * columns, 3 * patch_size**2), rows, columns
