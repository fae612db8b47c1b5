"""The host's benchmark: what it claims follows from its figures, and its ranks find every contender right."""

import pytest

from tools.bench.host import bench
from tools.bench.host.bench import CASES, OURS, PLAIN, Case


def results(seconds, layers=48):
    return [
        {**case._asdict(), "layers": layers, "checkpointing": on, "median_s": seconds.get(case, 1.0), "token_s": 1.0}
        for case in CASES
        for on in (True, False)
    ]


def test_claims_follow_the_figures():
    claims = bench.claims_of(results({}), 48)
    assert len(claims) == 2 * 6 + 2 and all(claim["holds"] for claim in claims)
    slow = bench.claims_of(results({Case(OURS, 2, 1): 1.3, Case(OURS, 3, 1): 1.5}), 48)
    broken = [claim["claim"] for claim in slow if not claim["holds"]]
    assert len(broken) == 6  # ZeRO-2 against plain and AutoEP, ZeRO-3 against AutoEP; with checkpointing and without
    assert broken[0].startswith(f"{OURS}, ZeRO-2, EP 1 takes 1.30 of the time of {PLAIN} with checkpointing")
    assert bench.claims_of(results({}, layers=12), 48) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case(PLAIN, 0, 1), Case(OURS, 3, 2), Case("zero3", 3, 1), Case("autoep", 2, 2)], ids=str
)
def test_contenders_compute_what_transformers_does(case, tmp_path):
    found = bench.launch(case, [2, 3], 1, tmp_path)
    assert [(one["layers"], one["checkpointing"]) for one in found] == [(n, on) for n in (2, 3) for on in (True, False)]
    for one in found:
        assert one["loss_difference"] <= bench.LOSS_TOLERANCE and one["norm_difference"] <= bench.NORM_TOLERANCE
        assert one["cpu_s"][0] > 0 and one["kernels"] > 300
        assert ("token_s" in one) == (case.contender == PLAIN and not one["checkpointing"])
    assert found[2]["kernels"] > found[0]["kernels"] > found[1]["kernels"]
