"""`make assemble-demo`: two experts trained apart from one dense parent, assembled into one Qwen3-VL-MoE.

Two branches of a small dense Qwen3-VL go on apart, in the FFNs: one only reads digits, the other only says whether they
are even and at least five. `ds-moe assemble` puts their FFNs side by side, a short run trains the routers. Plain
transformers answers the held-out questions with every model and with the branches' mean, the rival. ZeRO-3 throughout.
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

from ds_moe.data.digits import write_digits
from ds_moe.export.model import export_checkpoint
from ds_moe.monitor.plot import finish_axes
from tools.demos.running import EXECUTABLE, finish, run, start_anew
from tools.results import Claim, command_line, judged, save, write_json

RUN = "ds_configs/runs/assemble_demo.yaml"
FOLDER = Path("runs/assemble_demo")
BRANCHES = {"digit": ("digit",), "parity": ("parity", "at_least_five")}  # kinds of question that each one learns
PARENT = ("model.path=null", "model.preset=tiny-vl-dense", "model.freeze=[]", "train.steps=150", "train.lr=3e-3")
ROUTERS = ("model.freeze=[]", "moe.ep_size=2", "train.stage=router_only", "train.steps=100", "train.lr=2e-2")
CALIBRATION = 600  # records of the training split, of all kinds
MODELS = {
    "parent": "parent",
    "digit": "branch: which digit",
    "parity": "branch: even, at least five",
    "average": "average of the branches",
    "assembled": "assembled",
    "calibrated": "assembled, routers trained",
}
KINDS = {"digit": "which digit", "parity": "even or odd", "at_least_five": "at least five", "mean": "mean of the three"}
COLORS = ["#DDDDDD", "#E69F00", "#CC79A7", "#888888", "#56B4E9", "#0072B2"]  # Okabe & Ito's, and greys


def main() -> int:
    options = command_line(__doc__, "--plot", "--json").parse_args()
    began = time.monotonic()
    start_anew(FOLDER)
    write_data()
    train("parent", 2, *PARENT, f"data.train={FOLDER}/data/train.jsonl")
    with ThreadPoolExecutor(2) as pool:  # a process each
        list(pool.map(train_branch, BRANCHES))
    assemble("average", f"average:\n  models: {{{checkpoints()}}}\n")
    assemble("assembled", moe_spec())
    calibration = f"model.path={FOLDER}/assembled", f"data.train={FOLDER}/data/calibration.jsonl"
    train("calibrated", 2, *ROUTERS, *calibration)
    with ThreadPoolExecutor(2) as pool:
        accuracy = dict(zip(MODELS, pool.map(score, MODELS), strict=True))
    result = {"accuracy": accuracy, "claims": claims(accuracy), "seconds": time.monotonic() - began}
    write_json(result, FOLDER / "result.json", indent=1)
    by_label = {label: accuracy[name] for name, label in MODELS.items()}
    rows = {
        label: "  ".join(f"{kind} {share:.3f}" for kind, share in shares.items()) for label, shares in by_label.items()
    }
    title = "ds_moe: experts trained apart, assembled"
    return finish(options, result, rows, title, lambda file: write_figure(by_label, file))


def write_data() -> None:
    """The bundled scans as JSONL: all of the training split, each branch's questions, and a few of all kinds."""
    train_file, _ = write_digits(FOLDER / "data")
    lines = train_file.read_text().splitlines()
    parts = {name: [line for line in lines if json.loads(line)["kind"] in kinds] for name, kinds in BRANCHES.items()}
    parts["calibration"] = random.Random(0).sample(lines, CALIBRATION)
    for name, part in parts.items():
        train_file.with_name(f"{name}.jsonl").write_text("\n".join(part) + "\n")


def train_branch(name: str) -> None:
    train(name, 1, f"model.path={FOLDER}/parent", f"data.train={FOLDER}/data/{name}.jsonl")


def train(name: str, processes: int, *overrides: str) -> None:
    """One run, exported as FOLDER/name."""
    output = FOLDER / f"{name}_run"
    command = ("train", RUN, "--nproc", processes, f"train.output_dir={output}", *overrides)
    run(EXECUTABLE, *command, log=output.with_suffix(".log"))
    export_checkpoint(output, FOLDER / name)


def checkpoints() -> str:
    return ", ".join(f"{name}: {FOLDER}/{name}" for name in BRANCHES)


def moe_spec() -> str:
    data = ", ".join(f"{name}: {FOLDER}/data/{name}.jsonl" for name in BRANCHES)
    return f"""\
branches:
  parent: {FOLDER}/parent
  experts: {{{checkpoints()}}}
  top_k: 2
  rest: parent # the branches have changed nothing but FFNs
  router:
    init: hidden_mean
    data: {{{data}}}
"""


def assemble(name: str, spec: str) -> None:
    file = FOLDER / f"{name}.yaml"
    file.write_text(spec)
    run(EXECUTABLE, "assemble", file, FOLDER / name)


def score(name: str) -> dict[str, float]:
    """Share of held-out answers that are exactly right, by kind of question and on average."""
    file = FOLDER / f"{name}_accuracy.json"
    words = (f"{FOLDER}/{name}", "--data", "digits", "--max-new-tokens", "4", "--json", file)
    run(sys.executable, "-m", "tools.demos.score", *words, log=file.with_suffix(".log"))
    return json.loads(file.read_text())


def claims(accuracy: dict[str, dict[str, float]]) -> list[Claim]:
    ours = accuracy["calibrated"]["mean"]
    rivals = {name: accuracy[name]["mean"] for name in ("parent", *BRANCHES, "average")}
    return judged(
        (f"assembled, routers trained {ours:.3f} > {MODELS[name]} {share:.3f}", ours > share)
        for name, share in rivals.items()
    )


def write_figure(accuracy: dict[str, dict[str, float]], file: Path) -> None:
    """PNG of `accuracy`: what a model is called -> kind of question -> share of answers exactly right."""
    figure = Figure(figsize=(10, 3.6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(accuracy)
    for number, ((label, shares), color) in enumerate(zip(accuracy.items(), COLORS, strict=True)):
        places = [group + (number - (len(accuracy) - 1) / 2) * width for group in range(len(KINDS))]
        heights = [shares[kind] for kind in KINDS]
        axes.bar(places, heights, width * 0.92, color=color, label=label)
        for place, height in zip(places, heights, strict=True):
            axes.text(place, height + 0.012, f"{height:.2f}".lstrip("0"), ha="center", fontsize=7)
    finish_axes(axes, "Held-out answers exactly right", "")
    axes.set_axisbelow(True)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.5, len(KINDS) - 0.5)
    axes.set_xticks(range(len(KINDS)), list(KINDS.values()), fontsize=9)
    axes.set_ylim(0, 1.08)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8.5)
    save(figure, file)


if __name__ == "__main__":
    sys.exit(main())
