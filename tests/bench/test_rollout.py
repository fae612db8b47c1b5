"""tools/bench/rollout/bench.py: it judges earlier results rightly, and says what it needs where there is no vLLM."""

import json

import pytest

from tools.bench.rollout import bench

MODES = ("live", "completion only", "prompt + completion", "shifted by one")


def result(replayed: float) -> dict:
    k3 = dict(zip(MODES, (1e-3, 5e-4, replayed, 2.0), strict=True))
    modes = {mode: {"k3": value, "large": 0.0, "max": 1.0} for mode, value in k3.items()}
    shares = {"routers": 0.1, "tokens": 0.4, "least_weight": 0.05, "completion_tokens": 640}
    about = {"model": "Qwen3-MoE", "dtype": "fp32", "modes": modes, **shares}
    runs = [{**about, "scale": scale, "seed": seed} for scale in (1.0, 2.0) for seed in (0, 1, 2)]
    return {"runs": runs, "seconds": 60.0}


@pytest.mark.parametrize("replayed, holds", [(0.9e-4, True), (1.1e-4, False)])
def test_an_earlier_result_is_judged(tmp_path, capsys, replayed, holds):
    (tmp_path / "earlier.json").write_text(json.dumps(result(replayed)))
    assert bench.main(["--show", str(tmp_path / "earlier.json"), "--json", str(tmp_path / "new.json")]) == (not holds)
    assert "Qwen3-MoE" in capsys.readouterr().out
    [claim] = json.loads((tmp_path / "new.json").read_text())["claims"]
    assert claim["holds"] is holds and "leaves 0." in claim["claim"]


def test_without_vllm_it_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_CPU_ENV", str(tmp_path))
    assert bench.main([]) == 0
    assert "python -m tools.vllm_cpu.install" in capsys.readouterr().out
