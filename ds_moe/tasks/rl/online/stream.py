"""The rounds of a run as its stream of data: of every round the steps of one rank, with an exact position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ds_moe.config.rules.engine import engine_of
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import Batch
from ds_moe.data.packing import Fill
from ds_moe.data.position import DataPosition, order_of, position_problems
from ds_moe.data.processor import Processor
from ds_moe.data.stream import TrainStream
from ds_moe.errors import all_in_one
from ds_moe.tasks.rl.online.prompts import Prompts
from ds_moe.tasks.rl.online.round_file import RoundFacts, round_file
from ds_moe.tasks.rl.rollouts import Rollouts


@dataclass(frozen=True)
class RoundPlace:
    """How far a run has come in its rounds.

    Attributes:
        number: of the round, from 0; so many were trained before it.
        step: optimizer steps of it that were yielded. 0: it has not begun, and perhaps has no file yet.
        prompt: position of the first prompt of the round, or behind its last one where it has begun.
        sha256: of its file, where it has begun.
        version: of the weights that sampled it, the same.
    """

    number: int = 0
    step: int = 0
    prompt: int = 0
    sha256: str = ""
    version: str = ""


class OnlineStream:
    """What a run asks of its `TrainStream`, over rounds of rollouts whose files are opened one after the other.

    Args: as of `TrainStream`; `rollouts` says how the records of a round's file become tensors.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        rollouts: Rollouts,
        patch_cost: float,
    ) -> None:
        engine = engine_of(config)
        assert engine is not None
        self._config, self._processor = config, processor
        self._ranks = {"rank": rank, "world_size": world_size, "raise_errors": False}
        self.prompts = Prompts(config, engine, processor, rank)
        self.kinds = self.prompts.records.kinds
        self._rollouts, self._patch_cost = replace(rollouts, kinds=self.kinds), patch_cost
        self.steps_per_epoch = -(-len(self.prompts) * engine.completions // config.train.global_batch_size)
        self.place = RoundPlace()
        self.rows, self.notes = None, list[str]()
        self._open: TrainStream | None = None
        self._number = 0  # of the open round
        self._filled: Fill | None = None  # of the rounds before the open one

    @property
    def remembered(self) -> list[object]:
        """Of the rollouts of the open round."""
        return self._open.remembered if self._open is not None else []

    @property
    def error(self) -> str | None:
        if self._open is None or self._open.error is None:
            return None
        facts = round_file(self._config.train.output_dir, self._number).with_suffix(".json")
        return f"{self._open.error}; remove {facts}, and the round is sampled anew"

    @property
    def fill(self) -> Fill | None:
        return self._sum(self._open.fill if self._open is not None else None)

    def _sum(self, fill: Fill | None) -> Fill | None:
        return fill if self._filled is None else self._filled if fill is None else self._filled + fill

    def open(self, facts: RoundFacts) -> None:
        """Begin a round, or go on in the one that a checkpoint was in. Raises `UserError` for a file that is bad."""
        self.close()
        file = round_file(self._config.train.output_dir, facts.number)
        data = self._config.data.model_copy(update={"train": str(file), "root": None, "on_bad_record": "stop"})
        config = self._config.model_copy(update={"data": data})
        self._open = TrainStream(
            config, self._processor, **self._ranks, record_kind=self._rollouts, patch_cost=self._patch_cost
        )
        step, self._number = self.place.step, facts.number
        self._open.load_state_dict({**self._open.order, "epoch": 0, "step": step})
        self.place = RoundPlace(facts.number, step, facts.end, facts.sha256, facts.version)

    def sample_anew(self) -> None:
        """The file of the round that a checkpoint was in is not there any more: other prompts take its place."""
        self.place = RoundPlace(self.place.number, 0, self.place.prompt)

    def __iter__(self) -> Iterator[list[Batch]]:
        """The steps that are left of the open round."""
        assert self._open is not None
        left = self._open.steps_per_epoch - self.place.step
        for number, step in enumerate(islice(self._open, left), start=1):
            # Before the yield: a checkpoint that is taken after this step must count it.
            place = self.place
            self.place = replace(place, step=place.step + 1)
            if number == left:
                self.place = RoundPlace(place.number + 1, 0, place.prompt)
            yield step

    def close(self) -> None:
        """End the loading processes of the open round."""
        if self._open is not None:
            self._filled = self.fill
            self._open.close()
            self._open = None

    def samples_of(self, position: int) -> list[list[str]]:
        """As `TrainStream.samples_of`; `position` counts the steps of the open round."""
        assert self._open is not None
        return self._open.samples_of(position)

    @property
    def order(self) -> DataPosition:
        return order_of(self._config, self.prompts.records)

    def state_dict(self) -> DataPosition:
        """The place after the last yielded step; "epoch" counts passes over the prompts."""
        place = self.place
        return {
            "epoch": place.prompt // len(self.prompts),
            "step": place.step,
            "round": place.number,
            "prompt": place.prompt,
            "rollouts sha256": place.sha256,
            "weights": place.version,
            **self.order,
        }

    def load_state_dict(self, state: DataPosition) -> None:
        """Go on after the saved step. Raises `UserError` if the prompts would not be the saved ones."""
        problems = position_problems(state, self.order)
        if not problems and not all(
            type(state.get(key)) is int and int(state[key]) >= 0 for key in ("round", "prompt")
        ):
            problems = ["train.resume: the checkpoint is of a run without rl.engine (choose another train.output_dir)"]
        if problems:
            raise all_in_one(problems)
        whole = int(state["round"]), int(state["step"]), int(state["prompt"])
        self.place = RoundPlace(*whole, str(state.get("rollouts sha256", "")), str(state.get("weights", "")))
