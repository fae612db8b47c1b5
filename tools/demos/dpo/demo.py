"""`make dpo-demo`: a tiny Qwen3-VL-MoE learns from pairs that right answers about scans of digits are preferred.

After a little supervised training three runs of `ds-moe train` (2 processes, EP 2, ZeRO-3, fp32, packed pairs) start
from the same weights: on pairs that prefer the right answer, the same without the SFT term, and, as a control, on pairs
that prefer the wrong one. Plain transformers answers the held-out questions with each export.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.utils.logging import disable_progress_bar

from ds_moe.export.model import export_checkpoint
from ds_moe.monitor.plot import finish_axes
from tools.demos.dpo.pairs import write_pairs
from tools.demos.running import EXECUTABLE, ROOT, finish, run, start_anew
from tools.demos.score import score
from tools.results import Claim, command_line, judged, save_with_legend

RUNS = ROOT / "ds_configs/runs"
FOLDER = Path("runs/dpo_demo")
WARM_UP = 200  # supervised steps
ARMS = {"right preferred": [], "without rpo_alpha": ["dpo.rpo_alpha=0.0"], "wrong preferred": []}
STYLES = {"right preferred": "#0072B2", "without rpo_alpha": "#009E73", "wrong preferred": "#D55E00"}  # Okabe & Ito's
CURVES = {"margin": "dpo/margin", "accuracy": "dpo/accuracy", "chosen": "dpo/reward_chosen"}
CURVES |= {"rejected": "dpo/reward_rejected", "changed": "dpo/routers_changed", "logp": "dpo/logp_chosen"}
HELD_OUT = {"margin": "eval/margin", "changed": "eval/routers_changed"}


def main() -> int:
    options = command_line(__doc__, "--plot", "--json").parse_args()
    disable_progress_bar()  # of loading, a line an arm
    began = time.monotonic()
    start_anew(FOLDER)
    no_evaluation = ("data.eval=null", "train.eval_every=null", "train.eval_batch_size=null")
    train("demo.yaml", FOLDER / "supervised", f"train.steps={WARM_UP}", *no_evaluation)
    export_checkpoint(FOLDER / "supervised", FOLDER / "start")
    arms = {arm: tune(arm) for arm in ARMS}
    result: dict[str, Any] = {"start": answers(FOLDER / "start"), "arms": arms, "seconds": time.monotonic() - began}
    result["claims"] = claims(result)
    rows = {arm: figures(found) for arm, found in arms.items()}
    rows = {"start": f"answers {result['start']['mean']:.3f}", **rows}
    return finish(options, result, rows, "ds_moe: preferred answers", lambda file: write_figure(arms, file))


def tune(arm: str) -> dict[str, Any]:
    """What a run came to: its curves, held-out figures, and the exact matches of its export."""
    output, data = FOLDER / arm.replace(", ", "_").replace(" ", "_"), FOLDER / "data"
    if arm.startswith("wrong"):
        data = FOLDER / "swapped"
    files = [write_pairs(data, split, swapped=float(arm.startswith("wrong"))) for split in ("train", "held-out")]
    words = [f"data.train={files[0]}", f"data.eval={files[1]}", *ARMS[arm]]
    train("dpo_demo.yaml", output, *words)
    export_checkpoint(output, output / "export")
    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    known = board.Tags()["scalars"]
    curves = {name: [(e.step, e.value) for e in board.Scalars(tag)] for name, tag in CURVES.items() if tag in known}
    held_out = {name: board.Scalars(tag)[-1].value for name, tag in HELD_OUT.items() if tag in known}
    written = json.loads((output / "result.json").read_text())
    held_out |= {"accuracy": written["accuracy"]["mean"], "loss": written["eval_loss"]}
    found = {"held_out": held_out, "answers": answers(output / "export"), "curves": curves}
    print(f"{arm}: {figures(found)}", flush=True)
    return found


def answers(folder: Path) -> dict[str, float]:
    """Exact matches of a folder of plain transformers on held-out questions."""
    return score(folder, "digits", max_new_tokens=8)


def train(file: str, output: Path, *overrides: str) -> None:
    command = (EXECUTABLE, "train", RUNS / file, "--nproc", "2", f"train.output_dir={output}", *overrides)
    run(*command, log=output / "log.txt", settings={})


def claims(result: dict[str, Any]) -> list[Claim]:
    right, without, wrong = (result["arms"][arm] for arm in ARMS)
    start, margin = result["start"]["mean"], right["held_out"]["margin"]
    gained, lost = right["answers"]["mean"], wrong["answers"]["mean"]
    first = right["curves"]["margin"][0][1]
    wins, likelier = right["held_out"]["accuracy"], without["curves"]["logp"]
    found = [
        (f"the held-out margin rises from {first:.2f} to {margin:.2f}", margin > first + 0.05),
        (f"held-out, preferred answers win in {wins:.3f} of the pairs", wins > 0.7),
        (f"right answers that are generated: {start:.3f} to {gained:.3f}", gained > start + 0.05),
        (f"control: where wrong answers are preferred they fall to {lost:.3f}", lost < start - 0.05),
        (
            f"without rpo_alpha log p of preferred answers falls: {likelier[0][1]:.2f} to {likelier[-1][1]:.2f}",
            likelier[-1][1] < likelier[0][1],
        ),
    ]
    return judged(found)


def figures(found: dict[str, Any]) -> str:
    held_out = found["held_out"]
    changed = f"  routers changed {held_out['changed']:.3f}" if "changed" in held_out else ""
    shown = f"margin {held_out['margin']:.2f}  preferred win {held_out['accuracy']:.3f}"
    return f"{shown}  answers {found['answers']['mean']:.3f}{changed}"


def write_figure(arms: dict[str, dict[str, Any]], file: Path) -> None:
    figure = Figure(figsize=(9, 3.4), dpi=150, facecolor="white", layout="constrained")
    panels = {"margin": "Reward margin", "accuracy": "Preferred answer wins", "logp": "log p of the preferred answer"}
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm, found in arms.items():
            axes.plot(*zip(*found["curves"].get(name, [(0, 0)]), strict=True), color=STYLES[arm], label=arm)
        finish_axes(axes, title, "step")
    save_with_legend(figure, file)


if __name__ == "__main__":
    sys.exit(main())
