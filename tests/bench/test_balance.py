"""tools/bench/balance/bench.py: it can be started, judges rightly, draws, and trains on both ranks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launcher import HANGS_S
from tools.bench.balance import bench as bench_balance

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, LAYERS = 16, 3


def bench(*arguments: object) -> str:
    command = [sys.executable, "-m", "tools.bench.balance.bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(method: str, seed: int, vio: float, loss: float) -> dict:
    """A run's record whose fullest expert holds 1 + vio fair shares and whose last expert is dead."""
    share_E = np.full(EXPERTS, (EXPERTS - 1 - vio) / (EXPERTS - 2))
    share_E[0], share_E[-1] = 1 + vio, 0
    points = [
        {"step": step, "train_loss": loss, "loss": loss, "max_vio_L": [vio] * LAYERS, "counts_LE": [list(share_E)] * 3}
        for step in (1, 400)
    ]
    return {"method": method, "seed": seed, "points": points, "train_s": 80.0, "seconds": 90.0}


def result(loss_free_vio: float, loss_free_loss: float) -> dict:
    figures = {"none": (4.0, 2.10), "aux": (0.32, 2.10), "loss_free": (loss_free_vio, loss_free_loss)}
    runs = [run(method, seed, vio, loss + 0.01 * seed) for method, (vio, loss) in figures.items() for seed in (0, 1, 2)]
    text = {"held_out_files": 9}
    return {
        "steps": 400,
        "text": text,
        "train": {"sequence": 256},
        "held_out_windows": 512,
        "seconds": 60,
        "cores": 2,
    } | {"runs": runs}


@pytest.mark.parametrize(
    ("vio", "loss", "holding"),
    [
        (0.17, 2.105, [True, True, True, True]),
        (0.21, 2.10, [False, True, True, True]),
        (0.45, 2.10, [False, False, False, True]),
        (0.17, 2.12, [True, True, True, False]),  # the spread of these seeds is 0.01
    ],
)
def test_an_earlier_result_is_judged_and_drawn(capsys, tmp_path, vio, loss, holding):
    earlier, again, picture = tmp_path / "earlier.json", tmp_path / "new/again.json", tmp_path / "new/balance.png"
    earlier.write_text(json.dumps(result(vio, loss)))
    arguments = ["--show", earlier, "--json", again, "--plot", picture]
    assert bench_balance.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    written = json.loads(again.read_text())
    assert [claim["holds"] for claim in written["claims"]] == holding
    assert printed.count("DOES NOT HOLD") == holding.count(False)
    assert f"| loss_free | {vio:.3f} ± 0.000 | {vio / 4:.1%} |" in printed
    assert written["summary"]["loss_free"]["dead"] == [LAYERS] * 3
    assert np.asarray(Image.open(picture).convert("RGB")).std() > 10


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit, match="0"):
        bench_balance.main(["--help"])
    assert "{none,aux,loss_free,aux+loss_free}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_few_real_steps(tmp_path):
    file = tmp_path / "balance.json"
    printed = bench("--seeds", 5, "--steps", 3, "--methods", "loss_free", "--json", file)
    written = json.loads(file.read_text())
    [only] = written["runs"]
    assert [point["step"] for point in only["points"]] == [1, 2, 3]
    assert only["points"][-1]["loss"] < only["points"][0]["loss"] < 6
    counts_LE = np.array(only["points"][-1]["counts_LE"])
    assigned = 2 * written["held_out_windows"] * written["train"]["sequence"]  # of both ranks, top-2
    assert counts_LE.shape == (LAYERS, EXPERTS) and (counts_LE.sum(axis=1) == assigned).all()
    assert written["text"]["held_out_files"] > 20 and written["text"]["train_files"] > 200
    assert "run 1/1  loss_free, seed 5  step 3/3" in printed
    assert written["claims"][0]["holds"] is False
