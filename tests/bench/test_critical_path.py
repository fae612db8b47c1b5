"""Packed rows leave next to no waiting, on records of the sizes of real screenshots."""

import pytest

from tools.bench.mix.critical_path import simulated, sizes


@pytest.mark.parametrize("ranks", [8, 64])
def test_nearly_all_tokens_of_the_critical_path_are_real(ranks, show):
    found = simulated(*sizes(), ranks=ranks, steps=4)
    show(f"{ranks} ranks: packed {found['packed']:.3f}, padded {found['padded_1']:.3f} and {found['padded_4']:.3f}")
    assert found["packed_worst_step"] >= 0.93  # each step, and so their mean
    assert found["packed_micro_steps"] <= 2.5 and found["packed_fill"] > 0.75
    assert found["padded_4"] < 0.8 < found["padded_1"] < found["packed"]  # what length grouping alone leaves
