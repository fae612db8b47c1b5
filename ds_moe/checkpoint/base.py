"""What a run trains, and the frozen base it builds on: checkpoints leave that out, and go with no other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ds_moe.config.run import RunConfig
from ds_moe.tasks.gate.adapters import CONFIG, WEIGHTS, find_adapters

SAMPLE = 2**16  # bytes read at the start, in the middle and at the end of a weight file


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """JSON-able, equal for equal weights: of model and adapters, each weight file's size and a hash of samples of it.

    Hashing every byte of a large model would take minutes at every save; another checkpoint, dtype or layout of the
    same model differs in its samples.
    """
    if config.model.preset is not None:
        found: dict[str, Any] = {"preset": config.model.preset, "seed": config.train.seed}
    else:
        path = Path(str(config.model.path))
        folder = path if path.is_dir() else Path(snapshot_download(str(config.model.path), local_files_only=True))
        found = {"files": {file.name: _sampled(file) for file in sorted(folder.glob("*.safetensors"))}}
    if config.task == "gate":
        adapters = find_adapters(config.gate.adapters, config.gate.adapters_in)
        files = (WEIGHTS, CONFIG)  # the second has the scale of the first
        found["adapters"] = {name: [_sampled(path / file) for file in files] for name, path in adapters.items()}
        found["order"] = list(adapters)  # of the router's outputs; dicts are equal in any
    return found


def _sampled(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start in (0, max(size // 2, 0), max(size - SAMPLE, 0)):
            stream.seek(start)
            digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
