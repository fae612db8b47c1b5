"""The frozen model that a run builds on, which its checkpoints leave out: they go with no other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from ds_moe.config.run import RunConfig

SAMPLE = 2**16  # bytes read at the start, in the middle and at the end of a weight file


def base_identity(config: RunConfig, adapters: Mapping[str, Sequence[Path]] | None = None) -> dict[str, object]:
    """JSON-able, equal for equal weights: of model and adapters, each weight file's size and a hash of samples of it.

    Args:
        adapters: files of each adapter that the run takes as they are, by name, in the order of the gate's outputs.

    Hashing every byte of a large model would take minutes at every save; another checkpoint, dtype or layout of the
    same model differs in its samples.
    """
    if config.model.preset is not None:
        found: dict[str, object] = {"preset": config.model.preset, "seed": config.train.seed}
    else:
        path = Path(str(config.model.path))
        folder = path if path.is_dir() else Path(snapshot_download(str(config.model.path), local_files_only=True))
        found = {"files": {file.name: _sampled(file) for file in sorted(folder.glob("*.safetensors"))}}
    if adapters is not None:
        found["adapters"] = {name: [_sampled(file) for file in files] for name, files in adapters.items()}
        found["order"] = list(adapters)  # dicts are equal whatever the order of their keys
    return found


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, max(size // 2, 0), max(size - SAMPLE, 0)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
