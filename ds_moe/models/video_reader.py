"""Frames of videos become patches as Qwen3-VL's processor makes them, without torchvision, which that one needs.

What torchvision would do is one call of torch: the frames are resized by its antialiased bicubic interpolation of
8-bit values. Sampling, sizes, patches and timestamps are transformers' own functions, called without their classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata

from ds_moe.config.sections import VideoConfig
from ds_moe.data.images import RecordError
from ds_moe.data.videos import Film, VideoPlan
from ds_moe.errors import one_line, shown

KIND = "Qwen3VLVideoProcessor"
BICUBIC = 3
# What the settings of a folder must say, if they say it: how its videos are read here.
FIXED = {
    **{"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_sample_frames": True},
    **{"resample": BICUBIC, "rescale_factor": 1 / 255, "num_frames": None, "do_center_crop": (None, False)},
    **{"crop_size": None, "do_pad": (None, False), "pad_size": None},
}


@dataclass(frozen=True)
class Qwen3VLVideoReader:
    """The settings of `video_preprocessor_config.json`, and what is made of a video by them.

    Attributes:
        min_pixels, max_pixels: of all frames together, resized.
    """

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    cap_pixels_per_frame: bool
    max_video_tokens: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Qwen3VLVideoReader:
        """Raises `ValueError` for settings that are not read."""
        kind = config.get("video_processor_type")
        if kind != KIND:
            raise ValueError(f"its video_processor_type is {shown(kind)}, not {KIND}")
        for key, expected in FIXED.items():
            known = expected if isinstance(expected, tuple) else (expected,)
            if key in config and config[key] not in known:
                raise ValueError(f"its video settings have {key} {shown(config[key])}, which is not read")
        for key in ("min_pixels", "max_pixels"):
            if config.get(key) is not None:  # transformers passes over them
                raise ValueError(f"its video settings have {key}, where transformers reads size")
        own = Qwen3VLVideoProcessor
        size = dict(config.get("size") or own.size)
        names = ("fps", "min_frames", "max_frames", "patch_size", "merge_size", "temporal_patch_size")
        values = {name: config[name] if config.get(name) is not None else getattr(own, name) for name in names}
        mean, std = (tuple(config.get(name) or getattr(own, name)) for name in ("image_mean", "image_std"))
        return cls(
            **values,
            **{"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]},
            **{"image_mean": mean, "image_std": std},
            cap_pixels_per_frame=bool(config.get("cap_pixels_per_frame")),
            max_video_tokens=config.get("max_video_tokens") or own.max_video_tokens,
        )

    def set_to(self, settings: VideoConfig) -> Qwen3VLVideoReader:
        """With what a run file says instead."""
        given = {name: value for name, value in settings if value is not None}
        return replace(self, **{one.name: given[one.name] for one in fields(self) if one.name in given})

    def plan(self, film: Film, name: str) -> VideoPlan:
        """Which frames are taken, and what they become. Raises `RecordError` for a video that cannot be read so."""
        if film.chosen and film.frames > self.max_frames:
            reason = f"has {film.frames} frames, beyond data.video.max_frames {self.max_frames}"
            raise RecordError(f"video {shown(name)} {reason} (leave some out, or raise the limit)")
        fps = film.fps or self.fps
        indices = list(range(film.frames)) if film.chosen else self._sampled(film.frames, fps)
        if len(indices) == 1:  # a group has two; of an odd number, transformers itself repeats the last
            indices *= 2
        try:
            height, width = smart_resize(
                num_frames=len(indices),
                height=film.height,
                width=film.width,
                temporal_factor=self.temporal_patch_size,
                factor=self.patch_size * self.merge_size,
                min_pixels=self.min_pixels,
                max_pixels=self._most_pixels(len(indices)),
            )
        except ValueError as error:
            reason = f"is refused by the model's processor: {one_line(error)} (crop it)"
            raise RecordError(f"video {shown(name)} {reason}") from error
        groups = -(-len(indices) // self.temporal_patch_size)
        grid = (groups, height // self.patch_size, width // self.patch_size)
        # transformers' function appends to the list that it is given.
        times = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, self.temporal_patch_size)
        said = tuple(f"<{time:.1f} seconds>" for time in times)
        return VideoPlan(tuple(indices), height, width, grid, said, grid[1] * grid[2] // self.merge_size**2)

    def _sampled(self, frames: int, fps: float) -> list[int]:
        limits = SimpleNamespace(fps=self.fps, min_frames=self.min_frames, max_frames=self.max_frames)
        metadata = VideoMetadata(total_num_frames=frames, fps=fps)
        return Qwen3VLVideoProcessor.sample_frames(limits, metadata).tolist()

    def _most_pixels(self, frames: int) -> int:
        """As `Qwen3VLVideoProcessor.resize` has it."""
        if not self.cap_pixels_per_frame:
            return self.max_pixels
        of_frame = self.max_video_tokens * (self.patch_size * self.merge_size) ** 2
        return max(min(of_frame, self.max_pixels // frames), int(self.min_pixels * 1.05)) * frames

    def patches(self, frames: Iterable[np.ndarray], plan: VideoPlan) -> Tensor:
        """(P, channels * temporal_patch * patch * patch) float32, of the frames that `plan` takes, each once."""
        resized = dict(zip(dict.fromkeys(plan.indices), (_resized(one, plan) for one in frames), strict=True))
        video_T = torch.stack([resized[index] for index in plan.indices]).float()
        mean, std = (torch.tensor(one) * (1.0 / (1 / 255)) for one in (self.image_mean, self.image_std))
        video_T.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        made, *_ = Qwen3VLVideoProcessor.patchify(
            None,
            video_T.unsqueeze(0),
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
        )
        return made.squeeze(0)


def with_settings(config: Mapping[str, Any], settings: VideoConfig) -> dict[str, Any]:
    """The settings of a folder, with what a run file says instead."""
    given = settings.model_dump(include={"fps", "min_frames", "max_frames"}, exclude_none=True)
    edges = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    changed = {name: value for name, value in edges.items() if value is not None}
    size = {"size": {**(config.get("size") or Qwen3VLVideoProcessor.size), **changed}} if changed else {}
    return {**config, **given, **size}


def _resized(frame: np.ndarray, plan: VideoPlan) -> Tensor:
    """(3, height, width) uint8 of a frame (height, width, 3)."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))
    if pixels.shape[1:] == (plan.height, plan.width):
        return pixels
    size = (plan.height, plan.width)
    return F.interpolate(pixels.unsqueeze(0), size, mode="bicubic", align_corners=False, antialias=True).squeeze(0)
