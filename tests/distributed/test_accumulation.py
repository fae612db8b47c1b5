"""Gradients of micro-batches are summed: in fp32 where they are bf16, and over as many as an optimizer step has."""

import pytest

from tests.launcher import run_ranks


@pytest.mark.slow
def test_ten_bf16_micro_batches_sum_as_in_fp32(tmp_path, show):
    found = run_ranks("tests/distributed/accumulation_ranks.py", 1, [str(tmp_path)]).json
    show("\n".join(f"  {name:<18} {difference:.1e} of the largest gradient" for name, difference in found.items()))
    for stage in (2, 3):
        assert found[f"ZeRO-{stage}, shipped"] < 1e-6
        assert found[f"ZeRO-{stage}, left out"] > 1e-3  # negative control: seven bits of a bf16


@pytest.mark.slow
def test_steps_of_1_3_2_and_1_micro_batches_have_the_gradients_of_one_batch(show):
    """The same samples in other rows, step after step, with weights that stay; fp32 sums in another order."""
    found = run_ranks("tests/distributed/accumulation_ranks.py", 2, ["varying"]).json
    control = found.pop("control")
    lines = ["gradients of 3, 2 and 1 packed rows a rank against those of one, of each tensor's largest entry:"]
    lines += [f"  {name:<28} {'  '.join(f'{one:.1e}' for one in worst)}" for name, (_, worst, *_) in found.items()]
    show("\n".join(lines))
    for name, (losses, worst, steps, scheduled, taken) in found.items():
        assert (steps, scheduled, taken) == (4, 4, 4), name  # not once a micro-batch
        bf16 = (
            "bf16" in name
        )  # its forwards round otherwise in other rows; a sum scaled wrongly is off by a half or more
        assert max(worst) < (5e-2 if bf16 else 5e-6), name
        for loss, aux in losses[1:]:
            assert abs(loss - losses[0][0]) < (1e-2 if bf16 else 1e-6) and abs(aux - losses[0][1]) < 1e-2, name
            assert bf16 or abs(aux - losses[0][1]) < 1e-6
    assert control[2] == 7 and max(control[1]) > 0.1
