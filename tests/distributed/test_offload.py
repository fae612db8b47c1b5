"""Optimizer state in host memory (ZeRO-3 offload, DeepSpeed's own CPU Adam): saved, resumed, and left again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_resume import (
    DRIFT,
    LAST,
    bit_equal,
    checkpoints,
    differences,
    launch,
    position,
    start_from,
    tensors,
)

OFFLOAD = "deepspeed=ds_configs/zero3_offload.json"
BUILD = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Path:
    # Before the run, whose time-out is meant for training.
    subprocess.run([sys.executable, "-c", BUILD], env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True)
    output = tmp_path_factory.mktemp("offload")
    launch(2, [["never stopped", [f"train.output_dir={output}", OFFLOAD], "train"]])
    return output


def test_resumed_offload_equals_never_stopped_and_can_be_left(never_stopped, tmp_path, show):
    """With offload again: bit-equal. Without it another Adam goes on, with other rounding only."""
    source = checkpoints(never_stopped) / "step_00000016"
    cases, folders = [], {}
    for name, overrides in {"offload": [OFFLOAD], "no offload": []}.items():
        folders[name] = start_from(tmp_path, source, name)
        cases.append([name, [f"train.output_dir={folders[name]}", *overrides], "train"])
    again = start_from(tmp_path, source, "again")
    cases.append(["again", [f"train.output_dir={again}", OFFLOAD], "load and save"])
    launch(2, cases)

    theirs = checkpoints(never_stopped) / LAST
    expected = tensors(theirs)
    ours = {name: tensors(checkpoints(folder) / LAST) for name, folder in folders.items()}
    lines, drift = ["largest difference to the offload run never stopped, 8 steps after resuming:"], {}
    for name in folders:
        assert position(checkpoints(folders[name]) / LAST) == position(theirs)
        drift[name] = [differences(ours[name], expected, kind) for kind in ("weight/", "exp_avg/", "exp_avg_sq/")]
        weights, *moments = drift[name]
        lines.append(f"  {name:<12} weights {weights:.1e}, Adam's moments {moments[0]:.1e} and {moments[1]:.1e}")
    show("\n".join(lines))
    assert bit_equal(tensors(checkpoints(again) / source.name), tensors(source))
    assert 0 < drift["no offload"][0] <= DRIFT
    exact = bit_equal(ours["offload"], expected)
    assert exact, lines[1]
