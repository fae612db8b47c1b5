"""One rank trains, saves and goes on, on the CPU or on a GPU, at every ZeRO stage."""

import json

import pytest
import torch

from ds_moe.checkpoint.files import Reader
from tests.devices import by_device_launched
from tests.launcher import run_ranks

STAGES = (1, 2, 3)
SHORT = ["moe.ep_size=1", "train.steps=6", "train.warmup_steps=1", "checkpoint.every=3"]
ROUNDING = 1e-5  # of a weight, between two runs on a GPU, whose atomic additions are in any order


def trained(folder, device: str, *overrides: str) -> dict[str, float]:
    """Losses of the runs, by stage: one that never stopped, and one that goes on from its step 3."""
    cases = []
    for stage in STAGES:
        zero = [*SHORT, f"deepspeed=zero{stage}", *overrides]
        whole, resumed = folder / f"whole{stage}", folder / f"resumed{stage}"
        cases.append([f"whole{stage}", [*zero, f"train.output_dir={whole}"], "train"])
        resume = f"train.resume={whole}/checkpoints/step_00000003"
        cases.append([f"resumed{stage}", [*zero, f"train.output_dir={resumed}", resume], "train"])
    return run_ranks("tests/distributed/resume_ranks.py", 1, [json.dumps(cases)], env={"DS_ACCELERATOR": device}).json


@by_device_launched
def test_resumed_equals_never_stopped_at_every_stage(tmp_path, device):
    losses = trained(tmp_path, device)
    for stage in STAGES:
        whole, resumed = (
            Reader(tmp_path / f"{name}{stage}/checkpoints/step_00000006") for name in ("whole", "resumed")
        )
        assert set(whole.tensors) == set(resumed.tensors)
        assert sum(key.startswith("exp_avg_sq/") for key in whole.tensors) > 10
        off = max((whole.read(key) - resumed.read(key)).abs().max().item() for key in whole.tensors)
        assert off <= (0 if device == "cpu" else ROUNDING), stage
    assert all(losses[f"whole{stage}"] == pytest.approx(losses["whole1"], abs=1e-4) for stage in STAGES)


@pytest.mark.gpu
def test_a_gpu_learns_what_the_cpu_learns(tmp_path):
    """fp32 on both, so that only the order of sums differs; TF32 stays off, as torch has it."""
    assert not torch.backends.cuda.matmul.allow_tf32
    found = [trained(tmp_path / device, device, "train.precision=fp32") for device in ("cpu", "cuda")]
    assert found[0].keys() == found[1].keys()
    assert all(found[1][name] == pytest.approx(loss, abs=1e-4) for name, loss in found[0].items())
