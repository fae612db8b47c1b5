"""What the commands of `ds-moe gate` do, except for training. Each is one process without DeepSpeed."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers.utils.logging import disable_progress_bar

from ds_moe.config.check import check_model
from ds_moe.config.deepspeed import precision, trains_on_cpu
from ds_moe.config.run import RunConfig, other_task
from ds_moe.config.run_file import load_run
from ds_moe.config.sections import Sources
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import RecordKind
from ds_moe.errors import UserError
from ds_moe.models.load import load_model, model_config, processor_of
from ds_moe.tasks.gate.evaluate import Survey, survey
from ds_moe.tasks.gate.files import SavedGate, check_base, export_gate, freeze_gate, load_gate, read_gate
from ds_moe.tasks.gate.model import GatedModel, install_gate
from ds_moe.tasks.gate.records import Requests, Routed
from ds_moe.tasks.gate.scores import RoutingScores, advice, as_json, check_not_constant, probe_accuracy, table
from ds_moe.tasks.gate.serving import Route, write_manifest
from ds_moe.tasks.gate.task import pictures

BASELINE_RECORDS = 4000  # the baselines learn from at most so many records of data.train


@dataclass
class Gated:
    """A run's gated model with its trained gate, on one device."""

    config: RunConfig
    model: GatedModel
    processor: Processor
    saved: SavedGate

    @property
    def names(self) -> list[str]:
        return self.model.adapter_bank.names

    def survey(self, given: Sources, record_kind: RecordKind, limit: int | None = None) -> Survey:
        """Ask the gate about the records of a data file, or of several."""
        data = self.config.data.model_copy(update={"eval": given, "on_bad_record": "stop"})
        config = self.config.model_copy(update={"data": data})
        records = EvalSet(config, self.processor, rank=0, world_size=1, record_kind=record_kind)
        return survey(self.model, records, self.names, limit)


def load_gated(path: str, overrides: list[str], source: str | None) -> Gated:
    """Load a run's model with the gate at `source` (default: the newest checkpoint in the run's output folder)."""
    config = load_run(path, overrides)
    if other := other_task(config, "gate"):
        raise UserError(f"{config.at('task')}: task is {other}; ds-moe gate is about runs of task gate")
    check_model(config, model_config(config.model))
    saved = read_gate(Path(source or config.train.output_dir))
    if saved.reader is not None:
        check_base(saved.path, config)
    disable_progress_bar()  # transformers shows one while it loads; standard output is for the command's results
    on_cpu = trains_on_cpu()
    dtype = torch.bfloat16 if precision(config, on_cpu) == "bf16" else torch.float32
    model = install_gate(load_model(config.model, dtype, config.train.seed), config.gate)
    load_gate(model, saved)
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator()
    return Gated(config, model.to(device).eval(), processor_of(config.model, config.data.video), saved)


def evaluate_gate(path: str, overrides: list[str], source: str | None, json_file: str | None) -> RoutingScores:
    """Print how well a run's gate routes data.eval, beside baselines on the same features, and what they advise.

    Pictures go to the run's TensorBoard folder, and all figures to `json_file` if it is given.

    Raises:
        UserError: data.eval is not set, or the gate predicts one adapter for everything (after the table is printed).
    """
    gated = load_gated(path, overrides, source)
    if gated.config.data.eval is None:
        raise UserError("data.eval is not set: there is nothing to evaluate on (data.eval=FILE)")
    found = gated.survey(gated.config.data.eval, Routed(gated.names, labelled=True))
    seen = gated.survey(gated.config.data.train, Routed(gated.names, labelled=False), BASELINE_RECORDS)
    labels_N = seen.labels_N[seen.labelled]
    scores = found.scores(labels_N if len(labels_N) else None)
    assert scores is not None  # every record of data.eval is labelled
    baselines = {}
    for name, part in (("text only", "text_ND"), ("vision only", "vision_ND")) if len(labels_N) else ():
        train_ND = getattr(seen, part)[seen.labelled]
        baselines[name] = probe_accuracy(train_ND, labels_N, getattr(found, part), found.labels_N)
    print(table(scores, baselines), flush=True)
    advised = advice(scores, baselines, gated.config.gate.modalities)
    if advised is not None:
        print(f"\nadvice: {advised}", flush=True)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(as_json(scores, baselines) | {"advice": advised}, indent=1))
    if gated.config.monitor.tensorboard:
        folder = Path(gated.config.train.output_dir) / "tensorboard"
        with SummaryWriter(str(folder)) as writer:
            for tag, draw in pictures(scores, found).items():
                writer.add_image(f"{tag}_final", draw(), 0, dataformats="HWC")
        print(f"figures: tensorboard --logdir {folder.parent}")
    check_not_constant(scores)
    return scores


def _routes(gated: Gated, requests: str) -> list[Route]:
    found = gated.survey(requests, Requests(gated.names))
    rows = zip(found.where, found.probabilities_NK, strict=True)
    return [Route(where, gated.names[row_K.argmax()], float(np.clip(row_K.max(), 0, 1))) for where, row_K in rows]


def predict(path: str, overrides: list[str], source: str | None, requests: str) -> None:
    """Print one JSON line for each request: its file and line, the adapter, and the probability the gate gives it."""
    for route in _routes(load_gated(path, overrides, source), requests):
        answer = {"request": route.where, "adapter": route.adapter, "probability": round(route.probability, 4)}
        print(json.dumps(answer))


def export(source: Path, out: Path, requests: str | None) -> None:
    """Write a run's gate and adapters as a folder, and with `requests` also manifest.json, which routes these."""
    saved = export_gate(source, out)
    print(f"{out}: a gate over {', '.join(saved.adapters)}, with its router and their PEFT folders")
    if requests is not None:
        checkpoint = read_gate(source).path
        gated = load_gated(str(checkpoint / "run.yaml"), [], str(checkpoint))
        routes = _routes(gated, requests)
        write_manifest(out / "manifest.json", routes, {name: out / "adapters" / name for name in saved.adapters})
        print(f"{out / 'manifest.json'}: the adapter of each of {len(routes)} requests")


def freeze(source: Path, out: Path, weights: list[str]) -> None:
    """Write one PEFT adapter with constant weights, given as name=weight."""
    parsed: dict[str, float] = {}
    for entry in weights:
        name, equals, text = entry.rpartition("=")
        try:
            parsed[name] = float(text)
        except ValueError:
            equals = ""
        if not equals or not np.isfinite(parsed[name]):
            raise UserError(f"--weights {entry}: write name=weight, e.g. calendar=0.7")
    freeze_gate(source, out, parsed)
    print(f"{out}: one PEFT adapter of {', '.join(f'{name} x {weight:g}' for name, weight in parsed.items())}")
