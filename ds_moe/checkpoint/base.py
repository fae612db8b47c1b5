"""Identifies the frozen model that a run builds on: its checkpoints leave it out, and fit no other model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from ds_moe.config.run import RunConfig

SAMPLE = 2**16  # bytes to read at the start, in the middle and at the end of a weight file


def base_identity(config: RunConfig, adapters: Mapping[str, Sequence[Path]] | None = None) -> dict[str, object]:
    """Identify the weights of model and adapters: a JSON-able value that is equal for equal weights.

    It holds a hash of the size and of samples of each weight file; to hash every byte would take minutes at every save.
    Another checkpoint, dtype or layout of the same model has other samples.

    Args:
        adapters: files of each adapter that the run uses unchanged, by name, in the order of the gate's outputs.
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
        for start in (0, size // 2, max(size - SAMPLE, 0)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
