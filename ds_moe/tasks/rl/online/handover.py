"""Weights go to the engine as a folder; what it makes of them is compared with the trainer's own answers."""

import time
from pathlib import Path

from ds_moe.config.rules.engine import engine_of
from ds_moe.export.live import LiveExport
from ds_moe.export.model import DTYPES
from ds_moe.tasks.rl.online.engines import engine_dtype
from ds_moe.tasks.rl.online.probe import own_answers
from ds_moe.tasks.rl.online.prompts import Prompts
from ds_moe.tasks.rl.online.sampler import Sampler
from ds_moe.tasks.task import TrainingParts

WEIGHTS = "weights"  # in a run's output folder, unless rl.engine.weights_dir says otherwise
PROBES = 4  # prompts whose answers are compared


class HandOver:
    """Hands over the weights of one run, step after step (collective).

    Attributes:
        write_s: seconds that the last folder took, of which own answers took `answer_s`.
    """

    def __init__(self, parts: TrainingParts, prompts: Prompts, run: str) -> None:
        """Raises `UserError` for a model that an engine would load wrong."""
        self._parts, self._run = parts, run
        config, engine = parts.config, engine_of(parts.config)
        assert engine is not None and parts.processor is not None
        self._folder = Path(engine.weights_dir or Path(config.train.output_dir) / WEIGHTS).absolute()
        dtype = DTYPES[engine_dtype(config)]
        self._export = LiveExport(parts.engine.module, parts.topology, config, parts.processor, dtype)
        self._probes, _ = prompts.take(0, min(PROBES, len(prompts)))
        self.write_s = self.answer_s = 0.0

    def __call__(self, step: int, trained: int, sampler: Sampler | None) -> None:
        """Write the weights of now, which have taken `step` steps in `trained` whole rounds; rank 0's thread gives them
        to the engine when it has done what it was told before."""
        began, folder = time.perf_counter(), self._folder / f"step_{step:08d}"
        self._export.write(folder, lambda: self._parts.at("weights for the engine"))
        written = time.perf_counter()
        encoded = [one.encoded for one in self._probes]
        own = own_answers(self._parts, encoded, self._parts.processor)
        self.write_s, self.answer_s = written - began, time.perf_counter() - written
        if sampler is not None:
            prompts = [one.prompt for one in self._probes]
            sampler.hand_over(folder, f"{self._run}:{step}", step, trained, prompts, own)
