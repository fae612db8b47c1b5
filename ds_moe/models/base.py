"""Which frozen model a run builds on: its checkpoints hold only what it trains, and go with no other base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ds_moe.config import RunConfig

SAMPLE = 2**16  # bytes read at the start, in the middle and at the end of a weight file


def keeps_base_apart(config: RunConfig) -> bool:
    """Whether this run's checkpoints leave out the frozen model."""
    return config.lora is not None


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """JSON-able, equal for equal weights: of a checkpoint, every weight file's size and a hash of samples of it.

    Hashing every byte of a large model would take minutes at every save; another checkpoint, dtype or layout of the
    same model differs in its samples.
    """
    if config.model.preset is not None:
        return {"preset": config.model.preset, "seed": config.train.seed}
    path = Path(str(config.model.path))
    folder = path if path.is_dir() else Path(snapshot_download(str(config.model.path), local_files_only=True))
    return {"files": {file.name: _sampled(file) for file in sorted(folder.glob("*.safetensors"))}}


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, max(size // 2, 0), max(size - SAMPLE, 0)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
