"""Weights go to the engine as a folder; what it makes of them is compared with the trainer's own answers."""

import time
from pathlib import Path

from ds_moe.checkpoint.room import free_bytes, written
from ds_moe.config.rules.engine import engine_of
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError, one_line
from ds_moe.export.live import LiveExport
from ds_moe.export.model import DTYPES
from ds_moe.tasks.rl.online.engines import engine_dtype
from ds_moe.tasks.rl.online.probe import own_answers
from ds_moe.tasks.rl.online.prompts import Prompts
from ds_moe.tasks.rl.online.sampler import KEPT, Sampler
from ds_moe.tasks.task import TrainingParts

WEIGHTS = "weights"  # in a run's output folder, unless rl.engine.weights_dir says otherwise
OWNER = ".ds_moe_run"  # a file in the folder of weights: the run whose `step_*` they are, and which alone removes them
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
        self._folder = weights_folder(config)
        dtype = DTYPES[engine_dtype(config)]
        self._export = LiveExport(parts.engine.module, parts.topology, config, parts.processor, dtype)
        self._probes, _ = prompts.take(0, min(PROBES, len(prompts)))
        self.write_s = self.answer_s = 0.0

    def claim(self) -> None:
        """Make the folder of weights this run's, on rank 0. Raises `UserError` where it is not for this run, or has
        no room."""
        config, engine = self._parts.config, engine_of(self._parts.config)
        assert engine is not None
        owner = str(Path(config.train.output_dir).resolve()) if engine.weights_dir else "the run of this output folder"
        try:
            claim(self._folder, owner)
            if problem := no_room_for_weights(self._folder, self._export.nbytes, engine.lag):
                raise UserError(problem)
        except UserError as error:
            raise UserError(f"{config.at('rl.engine.weights_dir')}: {error}") from error

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


def weights_folder(config: RunConfig) -> Path:
    engine = engine_of(config)
    return Path((engine and engine.weights_dir) or Path(config.train.output_dir, WEIGHTS)).absolute()


def no_room_for_weights(folder: Path, size: int, lag: int) -> str | None:
    """Why the versions of weights that exist at a time, each of `size` bytes, have no room; None: they have.

    These are those that are kept, the one that is written, and with a `lag` those that wait for the engine.
    """
    count = KEPT + 1 + max(lag - 1, 0)
    needed = (count - min(len(list(folder.glob("step_*"))), KEPT)) * size
    if needed <= (free := free_bytes(folder)):
        return None
    text = f"{count} versions of weights take {written(size)} each, {written(free)} are free"
    return f"rl.engine.weights_dir {folder}: {text}; free some, or choose another folder"


def claim(folder: Path, owner: str) -> None:
    """Mark a folder as the one in which `owner` writes, replaces and removes versions of weights.

    Raises `UserError` for one that holds anything and is not marked so: checkpoints have names like weights'.
    """
    mark, key, other = folder / OWNER, f"rl.engine.weights_dir {folder}", "choose a folder that holds nothing else"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            if (found := next(folder.iterdir(), None)) is not None:
                raise UserError(f"{key} holds {found.name}, and no weights of this run; {other}, or empty it")
            mark.write_text(owner)
        elif (of := mark.read_text()) != owner:
            raise UserError(f"{key} has the weights of {one_line(of, 200)}; {other}, or remove it")
    except OSError as error:
        raise UserError(f"{key} cannot be written ({error.strerror or error}); choose another") from error
