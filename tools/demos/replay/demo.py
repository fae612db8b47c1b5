"""`make replay-demo`: reinforcement on real images, with routing replay and without it.

After a little supervised training of a tiny Qwen3-VL-MoE: rounds of sampling (`ds_moe.tasks.rl.sample`, plain
transformers in bf16) and `ds-moe train` (2 processes, EP 2, ZeRO-3, fp32), once with `moe.replay.enabled` and once
without, from the same weights and seeds. The reward is 1 for a right answer.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers.utils.logging import disable_progress_bar

from ds_moe.export.model import export_checkpoint
from ds_moe.monitor.plot import finish_axes
from ds_moe.tasks.rl.sample import generate_rollouts, load_policy, open_prompts
from ds_moe.tasks.rl.write import write_rollouts
from tools.demos.running import EXECUTABLE, ROOT, finish, run, start_anew
from tools.results import Claim, command_line, judged, save_with_legend

RUNS = ROOT / "ds_configs/runs"
FOLDER = Path("runs/replay_demo")
WARM_UP = 40  # supervised steps
ROUNDS, PROMPTS = 6, 128  # of rollouts and training; of a round, 8 completions each
NO_EVALUATION = ("train.eval_every=null", "train.eval_batch_size=null")
ARMS = {"with replay": "true", "without": "false"}
STYLES = {"with replay": ("#0072B2", "o"), "without": ("#D55E00", "s")}  # Okabe & Ito's colours, and a marker
PANELS = {"reward": "Mean reward of the rollouts", "mismatch_k3": "k3 between engine and trainer"}


def main() -> int:
    options = command_line(__doc__, "--plot", "--json").parse_args()
    disable_progress_bar()  # of loading, a line a round
    began = time.monotonic()
    start_anew(FOLDER)
    train("demo.yaml", FOLDER / "supervised", f"train.steps={WARM_UP}", "data.eval=null", *NO_EVALUATION)
    export_checkpoint(FOLDER / "supervised", FOLDER / "start")
    rounds = {arm: reinforce(arm) for arm in ARMS}
    result = {"rounds": rounds, "seconds": time.monotonic() - began, "prompts": PROMPTS}
    result["claims"] = claims(rounds)
    rows = {f"{arm}, last round": figures(found[-1]) for arm, found in rounds.items()}
    title = "ds_moe: reinforcement with routing replay"
    return finish(options, result, rows, title, lambda file: write_figure(rounds, file))


def reinforce(arm: str) -> list[dict[str, Any]]:
    """The figures of every round: reward of its rollouts, and what the trainer made of them."""
    output, policy = FOLDER / arm.replace(" ", "_"), FOLDER / "start"
    found = []
    for number in range(ROUNDS):
        file = output / f"rollouts_{number}.jsonl"
        rollouts(policy, file, seed=number)
        overrides = [f"model.path={FOLDER / 'start'}", f"moe.replay.enabled={ARMS[arm]}", f"data.train={file}"]
        overrides += ["rl.router=none"] if ARMS[arm] == "false" else []
        train("replay_demo.yaml", output, *overrides)
        result = json.loads((output / "result.json").read_text())
        found.append({"loss": result["loss"], **result["rl"]})
        policy = output / f"export_{number}"
        export_checkpoint(output, policy)
        print(f"{arm}, round {number + 1}/{ROUNDS}: " + figures(found[-1]), flush=True)
    return found


def rollouts(policy: Path, file: Path, seed: int) -> None:
    model, processor = load_policy(policy, dtype=torch.bfloat16)
    samples = open_prompts("digits", PROMPTS, seed)
    sampling = {"per_prompt": 8, "temperature": 1.0, "max_new_tokens": 4, "batch_size": 256, "seed": seed}
    records = generate_rollouts(model, processor, samples, **sampling)
    write_rollouts(records, file)


def train(file: str, output: Path, *overrides: str) -> None:
    command = (EXECUTABLE, "train", RUNS / file, "--nproc", "2", f"train.output_dir={output}", *overrides)
    run(*command, log=output / "log.txt", settings={})


def claims(rounds: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    replay, without = rounds["with replay"], rounds["without"]
    first, last = replay[0]["reward"], replay[-1]["reward"]
    k3, k3_without = (sum(one["mismatch_k3"] for one in arm) / len(arm) for arm in (replay, without))
    finite = all(math.isfinite(one["loss"]) for arm in rounds.values() for one in arm)
    found = [
        (f"with replay the reward at least doubles: {first:.3f} to {last:.3f}", last > 2 * first),
        (f"k3 between engine and trainer is lower with replay: {k3:.2e} against {k3_without:.2e}", k3 < k3_without),
        ("all losses are finite", finite),
    ]
    return judged(found)


def figures(found: dict[str, Any]) -> str:
    return f"reward {found['reward']:.3f}  k3 {found['mismatch_k3']:.2e}  loss {found['loss']:+.4f}"


def write_figure(rounds: dict[str, list[dict[str, Any]]], file: Path) -> None:
    figure = Figure(figsize=(9, 3.4), dpi=150, facecolor="white", layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for arm, found in rounds.items():
            color, marker = STYLES[arm]
            values = [one[name] for one in found]
            axes.plot(range(1, len(values) + 1), values, color=color, marker=marker, markersize=4, label=arm)
        finish_axes(axes, title, "round")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_with_legend(figure, file)


if __name__ == "__main__":
    sys.exit(main())
