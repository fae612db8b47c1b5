"""tools/bench/optimizers/bench.py: it judges rightly, and trains by both optimizers."""

import json

import pytest

from tools.bench.optimizers import bench


def run(method, seed, losses):
    points = [{"step": 40 * (i + 1), "loss": loss, "max_vio_L": [0.2] * 3} for i, loss in enumerate(losses)]
    return {"method": method, "seed": seed, "points": points, "train_s": 90.0}


def result(muon):
    runs = [run("adamw 0.001", 0, [2.9, 2.6, 2.5]), run("adamw 0.003", 0, [2.8, 2.5, 2.2])]
    runs += [run("adamw 0.003", 1, [2.8, 2.5, 2.24]), run("muon 0.01", 0, muon), run("muon 0.01", 1, muon)]
    return {"steps": 120, "seeds": [0, 1], "seconds": 60, "cores": 2, "runs": runs}


@pytest.mark.parametrize(
    ("muon", "holding"), [([2.5, 2.0, 1.9], [True] * 3), ([2.9, 2.4, 2.21], [False, False, False])]
)
def test_an_earlier_result_is_judged(capsys, tmp_path, muon, holding):
    earlier, again = tmp_path / "earlier.json", tmp_path / "again.json"
    earlier.write_text(json.dumps(result(muon)))
    assert bench.main(["--show", str(earlier), "--json", str(again)]) == 0
    written = json.loads(again.read_text())
    assert [claim["holds"] for claim in written["claims"]] == holding
    assert "muon 0.01) against" in written["claims"][0]["claim"] and "adamw 0.003" in written["claims"][0]["claim"]
    assert capsys.readouterr().out.count("DOES NOT HOLD") == holding.count(False)


@pytest.mark.slow
def test_a_few_real_steps(tmp_path):
    file = tmp_path / "optimizers.json"
    methods = ["adamw 0.003", "muon 0.01"]
    arguments = ["--seeds", "5", "6", "--steps", "2", "--methods", *methods, "--json", str(file)]
    assert bench.main(arguments) == 0
    written = json.loads(file.read_text())
    assert [(one["method"], one["seed"]) for one in written["runs"]] == [(m, s) for s in (5, 6) for m in methods]
    first, second = ([one["points"][-1]["loss"] for one in written["runs"][at : at + 2]] for at in (0, 2))
    assert len({*first, *second}) == 4
