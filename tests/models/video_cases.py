"""What transformers' own processor makes of videos, held in `video_values.json` and `.safetensors` beside this file.

transformers needs torchvision for it, which the environment of the tests has not. To write the values anew, with
transformers and torchvision in an environment:

    python -m tests.models.video_cases
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ds_moe.models.processor import tiny_processor
from tests.data.clips import drawn

VALUES, PIXELS = (Path(__file__).with_name(f"video_values.{end}") for end in ("json", "safetensors"))
LARGE = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "patch_size": 16}  # as Qwen3-VL's folders have it
TEXT = "<|im_start|>user\nIn {}, what! {}moves?<|im_end|>\n"  # with a token of a video in each place


@dataclass(frozen=True)
class Case:
    """Videos of so many frames, height, width and frames a second; `chosen`: all frames are taken."""

    videos: tuple[tuple[int, int, int, float], ...]
    chosen: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = False  # whether all pixels are kept, not only their digest


CASES = {
    "every frame of four": Case(((4, 16, 24, 2.0),), whole=True),
    "sampled": Case(((24, 40, 24, 8.0),)),
    "enlarged": Case(((4, 8, 12, 2.0),), settings={"size": {"shortest_edge": 4096, "longest_edge": 32768}}),
    "shrunk": Case(((9, 90, 160, 4.0),)),
    "an odd number": Case(((5, 33, 47, 30.0),), chosen=True, whole=True),
    "two frames": Case(((2, 16, 16, 1.0),), chosen=True),
    "fewer than min_frames would be": Case(((40, 20, 20, 25.0),)),
    "more than max_frames": Case(((64, 16, 16, 4.0),), settings={"max_frames": 7}),
    "another rate": Case(((30, 16, 16, 29.97),), settings={"fps": 5}),
    "two videos": Case(((6, 24, 24, 3.0), (12, 16, 40, 6.0))),
    "capped": Case(((6, 64, 64, 3.0),), settings={"cap_pixels_per_frame": True, "max_video_tokens": 9}),
    "as large as the real ones": Case(((9, 96, 130, 3.0),), settings=LARGE),
    "other means": Case(
        ((4, 16, 24, 2.0),), settings={"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    ),
}


def processor_of(case: Case):
    processor = tiny_processor("vl", patch_size=case.settings.get("patch_size", 4))
    processor.video_config = {**processor.video_config, **case.settings}
    return processor


def frames_of_case(case: Case) -> list[np.ndarray]:
    return [drawn(frames, height, width, seed) for seed, (frames, height, width, _) in enumerate(case.videos)]


def by_transformers(case: Case) -> dict[str, torch.Tensor]:
    """The inputs of a model, by transformers' Qwen3VLProcessor. Needs torchvision."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    ours = processor_of(case)
    settings = {key: value for key, value in ours.video_config.items() if key != "video_processor_type"}
    theirs = Qwen3VLProcessor(ours.image_processor, ours.tokenizer, Qwen3VLVideoProcessor(**settings))
    videos = frames_of_case(case)
    metadata = [
        {"total_num_frames": frames, "fps": fps, "frames_indices": list(range(frames))}
        for frames, _, _, fps in case.videos
    ]
    return theirs(
        text=[prompt(case)],
        videos=videos,
        video_metadata=metadata,
        do_sample_frames=not case.chosen,
        return_tensors="pt",
    )


def prompt(case: Case) -> str:
    """With the bare token, which transformers 5 needs to write what 4.57 and vLLM write."""
    return TEXT.format("<|video_pad|>", "<|video_pad|>" if len(case.videos) > 1 else "")


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def rope(made: dict[str, torch.Tensor]) -> list:
    """Positions of a Qwen3-VL-MoE of transformers."""
    from ds_moe.models.presets import build_preset

    positions, _ = build_preset("tiny-vl-moe").model.get_rope_index(
        made["input_ids"], mm_token_type_ids=made["mm_token_type_ids"], video_grid_thw=made["video_grid_thw"]
    )
    return positions.squeeze(1).tolist()


def facts(case: Case) -> dict[str, Any]:
    made = by_transformers(case)
    return {
        "ids": made["input_ids"][0].tolist(),
        "types": made["mm_token_type_ids"][0].tolist(),
        "grid": made["video_grid_thw"].tolist(),
        "rope": rope(made),
        "sha256": digest(made["pixel_values_videos"]),
    }


def stored() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads(VALUES.read_text()), load_file(PIXELS)


def main() -> None:
    """Write the values."""
    VALUES.write_text(json.dumps({name: facts(case) for name, case in CASES.items()}) + "\n")
    save_file(
        {name: by_transformers(case)["pixel_values_videos"].contiguous() for name, case in CASES.items() if case.whole},
        PIXELS,
    )


if __name__ == "__main__":
    main()
