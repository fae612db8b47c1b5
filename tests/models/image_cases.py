"""What image processors of transformers that need torchvision make of images, held in `image_values.safetensors` beside
this file.

The environment of the tests has no torchvision. To write the values anew, with transformers and torchvision in an
environment:

    python -m tests.models.image_cases
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ds_moe.models.image_processors import Kimi_K25ImageProcessor, MiniMaxM3VLImageProcessor
from tests.models.tiny_processors import PlainStep

VALUES = Path(__file__).with_name("image_values.safetensors")
LEVELS = 255  # of a pixel
FAMILIES = {
    "kimi_k25": Kimi_K25ImageProcessor,
    "minimax_m3_vl": MiniMaxM3VLImageProcessor,
    "step3p7": PlainStep,
}
NAMES = {"kimi_k25": "Kimi_K25ImageProcessor", "minimax_m3_vl": "MiniMaxM3VLImageProcessor"}
NAMES["step3p7"] = "Step3p7ImageProcessor"
TILED = {"size": {"height": 56, "width": 56}, "patch_size": 28, "max_image_size": 112, "vision_patch_size": 7}


@dataclass(frozen=True)
class Case:
    """Images of so many pixels (width, height), of a family's processor."""

    family: str
    sizes: tuple[tuple[int, int], ...]
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "kimi, as they are": Case("kimi_k25", ((56, 84), (28, 28))),
    "kimi, padded": Case("kimi_k25", ((61, 45), (5, 90))),
    "kimi, few patches": Case("kimi_k25", ((150, 100),), {"max_patches": 20}),
    "kimi, short sides": Case("kimi_k25", ((200, 60),), {"size": {"max_height": 6, "max_width": 6}}),
    "minimax, as they are": Case("minimax_m3_vl", ((56, 84),)),
    "minimax, enlarged": Case("minimax_m3_vl", ((30, 20), (5, 60))),
    "minimax, shrunk": Case("minimax_m3_vl", ((150, 100),), {"size": {"shortest_edge": 3136, "longest_edge": 6400}}),
    "minimax, rounded": Case("minimax_m3_vl", ((75, 90),)),
    "step, whole": Case("step3p7", ((56, 56), (40, 50), (7, 9)), TILED),
    "step, long": Case("step3p7", ((56, 30), (20, 50)), TILED),
    "step, in rows": Case("step3p7", ((70, 90), (120, 60)), TILED),
    "step, shrunk": Case("step3p7", ((300, 210),), TILED),
    "step, a line": Case("step3p7", ((60, 10), (9, 70)), TILED),
}


def images_of(case: Case) -> list[Image.Image]:
    """Waves with edges and noise."""
    return [_drawn(width, height, seed) for seed, (width, height) in enumerate(case.sizes)]


def _drawn(width: int, height: int, seed: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(columns / (3 + seed) + channel) + np.cos(rows / 5.0 + columns / 11) for channel in range(3)]
    image = 128 + 50 * np.stack(waves, axis=-1)
    image += 40 * (((rows // 9 + columns // 7) % 2)[..., None] - 0.5)
    image += np.random.default_rng(seed).normal(0, 12, image.shape)
    return Image.fromarray(image.clip(0, LEVELS).astype(np.uint8))


def made(case: Case, kind: Any) -> dict[str, torch.Tensor]:
    """What a processor of this class gives to the model; pixels as the bytes (uint8) of which they were made."""
    processor = kind(**case.settings)
    given = processor(images=images_of(case), return_tensors="pt")
    mean, std = (torch.tensor(one).view(3, *[1] * 2) for one in (processor.image_mean, processor.image_std))
    found = {}
    for name, value in given.items():
        if not name.startswith("pixel_values"):
            found[name] = torch.as_tensor(value)
            continue
        flat = value.dim() == 2  # (P, 3 x frames x height x width)
        levels = (value.view(len(value), 3, -1, 1) if flat else value) * std + mean
        exact = levels * LEVELS
        assert (exact - exact.round()).abs().max() < 1e-3  # else they are no bytes
        found[name] = exact.round().to(torch.uint8).contiguous()
    return found


def by_transformers(case: Case) -> dict[str, torch.Tensor]:
    """Needs torchvision."""
    module = f"transformers.models.{case.family}.image_processing_{case.family}"
    return made(case, getattr(importlib.import_module(module), NAMES[case.family]))


def by_ours(case: Case) -> dict[str, torch.Tensor]:
    return made(case, FAMILIES[case.family])


def stored() -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(VALUES).items():
        name, _, of = key.partition("/")
        found.setdefault(name, {})[of] = value
    return found


def main() -> None:
    """Write the values, and print how far ours are from them."""
    values = {name: by_transformers(case) for name, case in CASES.items()}
    save_file({f"{name}/{of}": value for name, own in values.items() for of, value in own.items()}, VALUES)
    for name, case in CASES.items():
        ours = by_ours(case)
        for of, value in values[name].items():
            apart = (ours[of].int() - value.int()).abs()
            print(f"{name:24} {of:22} most {apart.max()}, in {(apart > 0).float().mean():.2%} of {apart.numel()}")


if __name__ == "__main__":
    main()
