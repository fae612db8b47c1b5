"""The loop on a real vLLM server on CPUs: images, EP 2, ZeRO-3; weights by folder, checked after every hand-over."""

import pytest

from ds_moe.models.processor import tiny_processor
from tests.distributed.test_online import assert_rounds, curve
from tests.launcher import run_ranks
from tools.vllm_cpu.install import missing
from tools.vllm_cpu.model import tiny_model, write_model
from tools.vllm_cpu.server import VllmServer

SIZE = ["rl.engine.prompts=4", "rl.engine.completions=4", "rl.engine.max_new_tokens=6", "train.lr=1e-4"]
SIZE += ["train.global_batch_size=8", "train.steps=8"]  # 4 rounds of 2 steps


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_rounds_on_a_real_server_and_what_a_lag_saves(tmp_path, show):
    folder = write_model(tiny_model("tiny-vl-moe", 0), tiny_processor("vl"), tmp_path / "model")
    times = {}
    with VllmServer(folder, tmp_path / "vllm.log") as server:
        server.wait()
        for name, more in {"lag 0": [], "lag 1": ["rl.engine.lag=1", "rl.correction=tis"]}.items():
            run = tmp_path / name.replace(" ", "_")
            words = [
                "tests/runs/online.yaml",
                f"model={{path: {folder}}}",
                f"train.output_dir={run}",
                *("rl.engine.kind=vllm", f"rl.engine.urls=[{server.url}]", "monitor.tensorboard=true"),
                *("rl.reward.function=tests/distributed/online_reward.py:score", "rl.reward.processes=1"),
                *SIZE,
                *more,
            ]
            found = run_ranks("ds_moe.train", 2, words)
            print("\n".join(line for line in found.log(0).splitlines() if line.startswith(("round ", "engine"))))
            assert_rounds(run, 4)
            mismatch, lag = curve(run, "rl/mismatch_k3"), curve(run, "rl/lag")
            assert max(mismatch[step] for step in ((1, 3, 5, 7) if name == "lag 0" else (1,))) < 1e-8, mismatch
            assert [lag[step] for step in (1, 3, 5, 7)] == ([0, 0, 0, 0] if name == "lag 0" else [0, 1, 1, 1])
            phases = ("sample_s", "score_s", "wait_s", "weights_s", "own_answers_s", "load_s", "train_s")
            times[name] = {phase: [round(v, 2) for v in curve(run, f"rl/{phase}").values()][2::2] for phase in phases}
    show("\n".join(f"{name}: {phases}" for name, phases in times.items()))
