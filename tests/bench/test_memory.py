"""The benchmark of predicted memory: predictions against measured peaks."""

import pytest

from ds_moe.memory.predict import KEPT_FREE
from tools.bench.memory import bench


def found(peak: int) -> dict:
    parts = {"weights": 300, KEPT_FREE: 200, "runtime": 500}
    return {"predicted_bytes": parts, "peak_bytes": peak, "baseline_bytes": 500, "moment": "the loss goes back"}


def test_errors_are_of_the_total_and_above_the_libraries():
    returned = bench.compared(found(1000), kept=False)
    assert returned["predicted_total_bytes"] == 800 and returned["error"] == pytest.approx(-0.2)
    assert returned["error_above_baseline"] == pytest.approx(300 / 500 - 1)
    assert bench.compared(found(1000), kept=True)["error"] == 0
    assert bench.failed([returned, bench.compared(found(1000), kept=True)]) == [returned]


def test_a_prediction_that_is_off_fails_the_check(capsys, monkeypatch):
    def measured(case, kept):
        return {"case": case.name, "kept": kept, **bench.compared(found(1000), kept)}

    monkeypatch.setattr(bench, "measure", measured)
    status, out = bench.main(["--cases", "bf16"]), capsys.readouterr().out
    assert status == 1 and "-20.0%" in out and "+0.0%" in out


def test_an_unknown_case_is_refused_in_one_line(capsys):
    assert bench.main(["--cases", "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --cases nothing: there is none") and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["images, ZeRO-3", "Muon"])
def test_predictions_are_within_15_percent_of_measured_peaks(capsys, cases):
    status = bench.main(["--cases", cases])
    assert status == 0, capsys.readouterr().out
