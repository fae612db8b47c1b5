"""`make gate-demo`: a learned gate over four LoRA adapters, from what is asked and what the screen shows.

A small Qwen3-VL, dense or with experts (--base moe), learns to caption rendered screens, four adapters learn a task
each, then the gate learns which of them a request needs: supervised, and from the answers. All training is `ds-moe
train`, 2 processes, ZeRO-3; experts are then frozen, and each process has half of them. Held-out layouts and phrasings
judge the gate against its baselines, the routed model against oracle, adapters and even blend.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ds_moe.data.eval_set import EvalSet
from ds_moe.export.model import export_adapter, export_checkpoint
from ds_moe.models.families import family_of
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import save_processor, special_token_ids, tiny_processor
from ds_moe.monitor.plot import finish_axes
from ds_moe.tasks.answers import Answering, generate_answers
from ds_moe.tasks.gate.commands import load_gated
from ds_moe.tasks.gate.features import Features
from ds_moe.tasks.gate.network import GateDecision, GateSettings
from ds_moe.tasks.gate.records import Routed, RoutedBatch
from tools.demos.gate.screens import ADAPTERS, words, write_screens
from tools.demos.running import EXECUTABLE, finish, run, start_anew
from tools.results import Claim, command_line, judged, save

RUNS = Path("ds_configs/runs")
FOLDER = Path("runs/gate_demo")
GATE = RUNS / "gate_demo.yaml"
RANKS = {"agenda": 8, "pointer": 16, "auditor": 8, "operator": 4}  # of the adapters: a bank takes them as they come


@dataclass(frozen=True)
class Base:
    """A preset to build the base like, and overrides of the run files for it, for each kind of training."""

    preset: str
    base: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()


BASES = {
    "dense": Base("tiny-vl-dense"),
    "moe": Base(
        "tiny-vl-moe",
        ("moe={ep_size: 2, balance: [{kind: aux, weight: 1e-2}]}", "deepspeed=zero3"),
        ("moe={ep_size: 1}", "lora.targets=[q_proj, k_proj, v_proj, o_proj]", "deepspeed=zero3"),
        ("moe={ep_size: 2}",),
    ),
}
LATER = ("train.lr=5e-4", "train.steps=60", "train.warmup_steps=5", "train.max_new_tokens=6")
TRAP = ("gate.text=first", "gate.modalities=text", "train.steps=60")
ROUTED, ALONE, ORACLE_POINTS = 0.95, 0.65, 0.02
OURS, BOUND, OTHERS = "#0072B2", "#009E73", "#BBBBBB"  # Okabe & Ito's blue and green, and grey


def main() -> int:
    parser = command_line(__doc__, "--plot", "--json")
    parser.add_argument("--base", choices=BASES, default="dense", help="what the adapters are of (default: dense)")
    options = parser.parse_args()
    base = BASES[options.base]
    disable_progress_bar()
    began = time.monotonic()
    start_anew(FOLDER)
    make_base(base)
    with ThreadPoolExecutor(2) as pool:  # two adapters at a time, a process each
        list(pool.map(partial(make_adapter, base), RANKS))
    train_gate(base)
    result = {"base": options.base} | {
        "routing": evaluate(base, "supervised"),
        "routing_end_to_end": evaluate(base, "end_to_end"),
        "trap": fall_into_the_trap(base),
        "answers": answer_accuracy(base, "end_to_end"),
        "seconds": time.monotonic() - began,
    }
    result["claims"] = claims(result)
    title = f"ds_moe: a gate over {len(ADAPTERS)} LoRA adapters of a {options.base} base"
    return finish(options, result, rows(result), title, lambda file: write_figure(result, file))


def make_base(base: Base) -> None:
    write_screens(FOLDER / "data", train=6000, held_out=400, base=12_000, seed=0)
    processor = tiny_processor("vl", tuple(words()), patch_size=8)
    build_model(base, processor).save_pretrained(FOLDER / "untrained")
    save_processor(processor, FOLDER / "untrained")
    run(EXECUTABLE, "train", RUNS / "gate_demo_base.yaml", *base.base, "--nproc", "2")
    export_checkpoint(FOLDER / "base_run", FOLDER / "base")


def build_model(base: Base, processor: Any) -> PreTrainedModel:
    """The tiny preset with the processor's vocabulary and larger patches: a screen is 16 image tokens."""
    config: Any = preset_config(base.preset)
    ids = special_token_ids(processor)
    config.text_config.vocab_size = len(processor.tokenizer)
    for key in ("pad_token_id", "eos_token_id"):
        setattr(config.text_config, key, ids.pop(key))
    for key, value in ids.items():
        setattr(config, key, value)
    vision = {"patch_size": 8, "hidden_size": 64, "intermediate_size": 128, "num_position_embeddings": 64}
    for key, value in vision.items():
        setattr(config.vision_config, key, value)
    torch.manual_seed(0)
    return family_of(config).model_class(config)


def make_adapter(base: Base, name: str) -> None:
    """A PEFT folder of the rank that `RANKS` says."""
    output, rank = FOLDER / "adapter_runs" / name, RANKS[name]
    data = f"data.train={FOLDER}/data/adapter-{name}.jsonl"
    settings = [*base.adapter, data, f"train.output_dir={output}", f"lora.rank={rank}", f"lora.alpha={2 * rank}"]
    run(EXECUTABLE, "train", RUNS / "gate_demo_adapter.yaml", *settings, "--nproc", "1", log=output.with_suffix(".log"))
    export_adapter(output, FOLDER / "adapters" / name)


def train_gate(base: Base) -> None:
    run(EXECUTABLE, "gate", "train", GATE, *base.gate, "--nproc", "2")
    stage = ["gate.stage=end_to_end", "gate.kl_weight=0.1", "gate.entropy_weight=0.01"]
    folders = [f"gate.start={FOLDER / 'supervised'}", f"train.output_dir={FOLDER / 'end_to_end'}"]
    run(EXECUTABLE, "gate", "train", GATE, *base.gate, *stage, *folders, *LATER, "--nproc", "2")


def evaluate(base: Base, stage: str) -> dict[str, Any]:
    file = FOLDER / stage / "eval.json"
    run(EXECUTABLE, "gate", "eval", GATE, *base.gate, f"train.output_dir={FOLDER / stage}", "--json", file)
    return json.loads(file.read_text())


def fall_into_the_trap(base: Base) -> dict[str, Any]:
    """A gate that pools the first token: it predicts one adapter for every request, and the evaluation says so."""
    output = FOLDER / "first_token"
    run(EXECUTABLE, "gate", "train", GATE, *base.gate, *TRAP, f"train.output_dir={output}", "--nproc", "2")
    command = ["gate", "eval", GATE, *base.gate, *TRAP, f"train.output_dir={output}", "--json", output / "eval.json"]
    done = subprocess.run([EXECUTABLE, *map(str, command)], capture_output=True, text=True)
    print(done.stderr.strip().splitlines()[-1], flush=True)
    return {**json.loads((output / "eval.json").read_text()), "exit_code": done.returncode}


class Fixed(nn.Module):
    """In place of a gate: weights that somebody else has chosen for the batch."""

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        self.settings = settings
        self.weights_BK: Tensor

    def forward(self, features: Features) -> GateDecision:
        return GateDecision(self.weights_BK.log(), self.weights_BK)


def answer_accuracy(base: Base, stage: str) -> dict[str, float]:
    """Share of exactly right generated answers to the held-out requests, by who chooses the adapter."""
    gated = load_gated(str(GATE), [*base.gate, f"train.output_dir={FOLDER / stage}"], None)
    model, names = gated.model, gated.names
    router, fixed = model.adapter_gate, Fixed(model.adapter_gate.settings)
    record_kind = Routed(names, labelled=True)
    batches = list(EvalSet(gated.config, gated.processor, rank=0, world_size=1, record_kind=record_kind).batches())
    every = torch.eye(len(names))

    def accuracy(gate: nn.Module, choose: Any) -> float:
        model.adapter_gate, right, asked = gate, 0, 0
        for batch in batches:
            fixed.weights_BK = choose(batch.batch)
            answers = generate_answers(model, next(batch.prompts()).to(model.device), Answering(gated.processor, 6))
            right += sum(map(str.__eq__, answers, batch.answers))
            asked += len(answers)
        return right / asked

    def constant(weights_K: Tensor) -> Any:
        return lambda batch: weights_K.expand(len(batch.adapter_B), -1)

    def oracle(batch: RoutedBatch) -> Tensor:
        return every[batch.adapter_B]

    with torch.no_grad():
        found = {"routed": accuracy(router, oracle), "oracle": accuracy(fixed, oracle)}
        found |= {name: accuracy(fixed, constant(one)) for name, one in zip(names, every, strict=True)}
        found["even blend"] = accuracy(fixed, constant(torch.full((len(names),), 1 / len(names))))
    return found


def claims(result: dict[str, Any]) -> list[Claim]:
    routing, answers = result["routing"], result["answers"]
    text, vision = (routing["baselines"][name] for name in ("text only", "vision only"))
    others = {name: share for name, share in answers.items() if name not in ("routed", "oracle")}
    best, routed, oracle = max(others, key=others.__getitem__), answers["routed"], answers["oracle"]
    trap = result["trap"]
    collapsed = trap["constant"] is not None and trap["exit_code"] == 2
    found = [
        (f"routing accuracy {routing['accuracy']:.3f} >= {ROUTED}", routing["accuracy"] >= ROUTED),
        (f"text only {text:.3f} and vision only {vision:.3f} <= {ALONE}", max(text, vision) <= ALONE),
        (f"answers: routed {routed:.3f} within 2 points of oracle {oracle:.3f}", routed >= oracle - ORACLE_POINTS),
        (f"answers: routed above every other choice, of which {best} has {others[best]:.3f}", routed > others[best]),
        (f"a gate on the first token predicts {trap['constant']} for everything, and eval fails", collapsed),
    ]
    return judged(found)


def rows(result: dict[str, Any]) -> dict[str, str]:
    accuracies = (f"{result[stage]['accuracy']:.3f}" for stage in ("routing", "routing_end_to_end"))
    shown = {"routing accuracy, supervised / end to end": " / ".join(accuracies)}
    shown |= {f"baseline, {name}": f"{share:.3f}" for name, share in result["routing"]["baselines"].items()}
    return shown | {f"answers right, {name}": f"{share:.3f}" for name, share in result["answers"].items()}


def write_figure(result: dict[str, Any], file: Path) -> None:
    routing = result["routing"]
    chosen = {"text and screen": routing["accuracy"]}
    chosen |= {name: routing["baselines"][name] for name in ("text only", "vision only")}
    chosen |= {"first token": result["trap"]["accuracy"], "majority": routing["majority_accuracy"]}
    figure = Figure(figsize=(10, 3.3), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, "Right adapter found", chosen, {"text and screen": OURS})
    _bars(right, "Answers exactly right", result["answers"], {"routed": OURS, "oracle": BOUND})
    save(figure, file)


def _bars(axes: Axes, title: str, shares: dict[str, float], colors: dict[str, str]) -> None:
    names = list(shares)
    axes.barh(names, list(shares.values()), color=[colors.get(name, OTHERS) for name in names], height=0.7)
    for row, share in enumerate(shares.values()):
        axes.text(share + 0.01, row, f"{share:.1%}", va="center", fontsize=8.5)
    finish_axes(axes, title, "share of the held-out requests")
    axes.set_axisbelow(True)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])


if __name__ == "__main__":
    sys.exit(main())
