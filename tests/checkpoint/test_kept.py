"""A checkpoint and an output folder that an earlier version wrote still resume, bit for bit, and still export.

`tests/kept/<commit>` holds them, with what that version itself had at the end of the run (`expected.json`). The files
are read here by their format alone: reading them with the package's reader would hide a change of both.
"""

import copy
import hashlib
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.launcher import run_ranks

KEPT = Path(__file__).parents[1] / "kept/e49d3ff"
FIRST, LAST = "step_00000005", "step_00000008"
DRIFT = 1e-6  # of a tensor's norm, relative, on another kind of CPU
# The same kernels on every x86 CPU with AVX2; the expectation was made with them.
KERNELS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# Of the result, compared apart or not at all. Since that version a recompute spares one of six exchanges of rows.
OF_THE_MACHINE = ("loss", "tokens_per_s", "checkpoint", "ep_sent_bytes")


def machine() -> dict[str, str]:
    """What floating-point results depend on beside the program."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = ("vendor_id", "cpu family", "model", "model name")
    pairs = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    found = {key: value for key, value in reversed(pairs) if key in names}
    return {"torch": torch.__version__, "architecture": platform.machine(), **found}


def described(tensor: np.ndarray) -> list:
    """[digest, norm] of a tensor; the norm is a sum, which another kind of CPU may round otherwise."""
    digest = hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
    return [digest, float(np.linalg.norm(tensor.astype(np.float64)))]


def tensors(checkpoint: Path) -> dict[str, list]:
    """kind/name -> [digest, norm] of every tensor, its rows put together from the files of all ranks."""
    files = {file.name: load_file(file) for file in checkpoint.glob("rank-*.safetensors")}
    pieces = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
    return {
        key: described(np.concatenate([files[name][key] for name, *_ in sorted(parts, key=lambda part: part[1])]))
        for key, parts in sorted(pieces.items())
    }


def random_states(checkpoint: Path) -> dict[str, str]:
    files = sorted(checkpoint.glob("rng-*.safetensors"))
    return {file.name: described(load_file(file)["cpu"])[0] for file in files}


def state(checkpoint: Path) -> dict:
    """state.json without what another machine or day has otherwise."""
    state = json.loads((checkpoint / "state.json").read_text())
    result = {key: value for key, value in state["result"].items() if key not in OF_THE_MACHINE}
    return {**{key: value for key, value in state.items() if key != "versions"}, "result": result}


def loss(checkpoint: Path) -> float:
    return json.loads((checkpoint / "state.json").read_text())["result"]["loss"]


def exported(folder: Path) -> dict[str, list]:
    """file/name -> [digest, norm] of every tensor of an exported model; file -> [] of every other file."""
    found: dict[str, list] = {}
    for file in sorted(folder.iterdir()):
        weights = load_file(file) if file.suffix == ".safetensors" else None
        found |= {f"{file.name}/{name}": described(weights[name]) for name in sorted(weights)} if weights else {}
        found |= {} if weights else {file.name: []}
    return found


def differing(found: dict[str, list], expected: dict[str, list]) -> list[str]:
    """Names whose digests differ, or that only one side has."""
    digests, wanted = ({key: value[:1] for key, value in of.items()} for of in (found, expected))
    return sorted(key for key in digests.keys() | wanted.keys() if digests.get(key) != wanted.get(key))


def far_apart(found: dict[str, list], expected: dict[str, list]) -> list[str]:
    """Names whose norms differ by more than rounding, or that only one side has."""
    missing = found.keys() ^ expected.keys()
    norms = {key: (found[key][1], expected[key][1]) for key in found.keys() & expected.keys()}
    return sorted(missing | {key for key, (one, other) in norms.items() if abs(one - other) > DRIFT * abs(other)})


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((KEPT / "expected.json").read_text())


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    return shutil.copytree(KEPT, tmp_path_factory.mktemp("kept") / "copy")


@pytest.fixture(scope="module")
def resumed(copied) -> Path:
    """The last checkpoint of the run, which was resumed from the one that is kept."""
    checkpoints = copied / "output/checkpoints"
    arguments = [copied / "run.yaml", f"model.path={copied / 'model'}", f"train.output_dir={copied / 'output'}"]
    run = run_ranks("ds_moe.train", 2, arguments, env=KERNELS)
    assert f"resumed from {checkpoints / FIRST} at step 5" in run.output
    return checkpoints / LAST


def test_resumes_bit_for_bit(resumed, expected):
    result = {key: value for key, value in expected["state"]["result"].items() if key not in OF_THE_MACHINE}
    assert state(resumed) == {**expected["state"], "result": result}
    assert random_states(resumed) == expected["random_states"]
    found = tensors(resumed)
    assert not far_apart(found, expected["tensors"])
    assert loss(resumed) == pytest.approx(expected["loss"], rel=DRIFT)
    if machine() == expected["machine"]:  # elsewhere sums may round otherwise, whatever the kernels
        assert not differing(found, expected["tensors"])
        assert loss(resumed) == expected["loss"]


def test_exports_the_same_model(copied, expected, tmp_path):
    from ds_moe.export.model import export_checkpoint

    source = shutil.copytree(KEPT / "output", tmp_path / "output")
    export_checkpoint(source, tmp_path / "exported")
    assert not differing(exported(tmp_path / "exported"), expected["exported"])


def test_a_flipped_digest_and_a_changed_norm_are_noticed(expected):
    there, key = expected["tensors"], "exp_avg/lm_head.weight"
    assert not differing(there, there) and not far_apart(there, there)
    wrong = copy.deepcopy(there)
    digest, norm = wrong[key]
    wrong[key] = [digest[::-1], norm]
    assert differing(wrong, there) == [key]
    wrong[key] = [digest, norm * (1 + 2 * DRIFT)]
    assert far_apart(wrong, there) == [key]
    del wrong[key]
    assert differing(wrong, there) == far_apart(wrong, there) == [key]
