"""Gradients of bf16 micro-batches are summed in fp32: with the shipped JSONs nothing of a small gradient is lost."""

import pytest

from tests.launcher import run_ranks


@pytest.mark.slow
def test_ten_bf16_micro_batches_sum_as_in_fp32(tmp_path, show):
    found = run_ranks("tests/distributed/accumulation_ranks.py", 1, [str(tmp_path)]).json
    show("\n".join(f"  {name:<18} {difference:.1e} of the largest gradient" for name, difference in found.items()))
    for stage in (2, 3):
        assert found[f"ZeRO-{stage}, shipped"] < 1e-6
        assert found[f"ZeRO-{stage}, left out"] > 1e-3  # negative control: seven bits of a bf16
