"""ZeRO-2 that reduces one bucket of gradients while the next is filled, as it does on accelerators by default."""

import json

import pytest

from tests.distributed.test_resume import bit_equal, checkpoints, launch, tensors

SHORT = ["train.steps=4", "train.warmup_steps=1", "checkpoint.every=4", "train.global_batch_size=16"]


@pytest.mark.slow
def test_overlap_changes_no_bit(tmp_path):
    """Two ranks, EP 2, two micro-batches a step, buckets far smaller than the model: both buffers are used."""
    cases = []
    for overlaps in (False, True):
        zero = {"stage": 2, "overlap_comm": overlaps, "reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
        file = tmp_path / f"{overlaps}.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        cases.append(
            [str(overlaps), [*SHORT, f"deepspeed={file}", f"train.output_dir={tmp_path / str(overlaps)}"], "train"]
        )
    launch(2, cases)
    plain, overlapped = (tensors(checkpoints(tmp_path / name) / "step_00000004") for name in ("False", "True"))
    assert bit_equal(plain, overlapped)
