"""`data.streaming`: what a rank trains on where records are neither counted nor indexed before the first step.

The samples of a step are the next ones in the order of `windows.py`, whatever the number of ranks. Each loading process
finds them by itself: it walks through the windows and parses the rows of its own rank alone, but for packed rows, whose
plan needs the tokens of all samples of a step. The place behind a step travels with it; a checkpoint holds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from ds_moe.config.run import RunConfig
from ds_moe.data.chat import BadRecord
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Begun, Encoder
from ds_moe.data.order import FILLER, PaddedRows, Rows, deal
from ds_moe.data.packing import Fill, PackedRows, pack
from ds_moe.data.pools import Drawn, Pools
from ds_moe.data.position import DataPosition, streamed_order_of
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind
from ds_moe.data.step_dataset import BatchMaker, Step, StepDataset
from ds_moe.data.steps import LoadedSteps, check_batches
from ds_moe.data.stream import StepStream, TrainStream
from ds_moe.data.windows import Interleaving, PoolPlace
from ds_moe.errors import UserError

PLACES = "places"  # in a checkpoint's position: epoch, window, row and samples of each pool
REMEMBERED = 64  # steps whose places are kept, for `samples_of`


def train_stream(config: RunConfig, processor: Processor, **options: Any) -> StepStream:
    """What a run trains on; the options are those of `TrainStream`."""
    return (StreamedTrain if config.data.streaming else TrainStream)(config, processor, **options)


class _StreamedSteps(StepDataset):
    """The steps from a place on."""

    def __init__(self, maker: BatchMaker, drawn: Drawn, mixture: Interleaving, position: int, plan: _Plan) -> None:
        super().__init__(maker)
        self._drawn, self._mixture, self._position, self._plan = drawn, mixture, position, plan

    def _rows(self, step: Step, position: int) -> Rows:
        size = self._plan.global_batch_size
        self._mixture.skip((position - self._position) * size)  # the steps of other loading processes
        self._drawn.rows = self._mixture.take(size)
        step.next_place, self._position = self._mixture.places, position + 1
        rows, step.planned = self._plan.rows(self._drawn, self.maker.encoder, self.maker.rank, step)
        return rows

    def _check(self, step: Step, begun: list[Begun], used: list[int], encoded: list[Encoded]) -> None:
        tokens = step.planned
        if tokens is None:
            return
        for record, index, one in zip(begun, used, encoded, strict=True):
            if index != FILLER and len(one.input_ids) != tokens[index]:
                was = f"had {tokens[index]} tokens when its row was planned and has {len(one.input_ids)} now"
                raise UserError(f"{record.where}: {was}: an image of it has changed")


@dataclass(frozen=True)
class _Plan:
    """Which of the samples of a step each rank takes in each micro-step."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    length_grouping: bool
    capacity: int | None  # tokens of a packed row; None: rows are padded
    patch_cost: float

    def rows(self, drawn: Drawn, encoder: Encoder, rank: int, step: Step) -> tuple[Rows, list[int] | None]:
        """(indices of drawn rows, their tokens where rows are packed). `step` is told the fill and the bad records of
        which this rank is the one to speak."""
        if self.capacity is None:
            indices = list(range(len(drawn)))
            if self.length_grouping:
                indices.sort(key=lambda index: -drawn.rows[index].length)
            return deal(indices, self.micro_batch_size, self.world_size), None
        found = [encoder.measure(index) for index in range(len(drawn))]
        bad = {index: one for index, one in enumerate(found) if isinstance(one, BadRecord)}
        step.bad += [one for index, one in bad.items() if index % self.world_size == rank]
        sizes = np.array([(0, 0) if isinstance(one, BadRecord) else one for one in found], dtype=np.int64)
        usable = np.flatnonzero(sizes[:, 0])
        rows = pack(usable, sizes[:, 0], sizes[:, 1], self.patch_cost, self.capacity, self.world_size)
        step.fill = Fill.of_rows(rows, sizes[:, 0], self.capacity)
        return rows, sizes[:, 0].tolist()


class StreamedTrain(LoadedSteps):
    """Endless optimizer steps of one rank, as `TrainStream` gives them, of records that no pass has counted.

    A sample that cannot be used is replaced by a filler, or left out of packed rows; it is found when it is reached.
    A step never ends with an epoch: the next one begins in the middle of it.

    Args and attributes: as of `TrainStream`. `kinds` are the names of the sources.

    Raises:
        UserError: for files that cannot be read; also while iterating.
    """

    steps_per_epoch: int | None = None
    rows: PaddedRows | PackedRows | None = None

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        raise_errors: bool = True,
        part: tuple[int, int] = (0, 1),
        record_kind: RecordKind = CHAT,
        patch_cost: float = 0.0,
    ) -> None:
        train, data = config.train, config.data
        check_batches(config, world_size)
        self._pools = Pools.of(config)
        self.notes, self.remembered = list[str](), list[object]()
        self._drawn = Drawn(self._pools.blocks.sources, record_kind)
        self._plan = _Plan(
            train.global_batch_size,
            train.micro_batch_size,
            world_size,
            data.length_grouping,
            config.tokens_per_row if data.packing else None,
            patch_cost,
        )
        self._place = self._pools.start
        self._places: deque[tuple[int, list[PoolPlace]]] = deque([(0, self._place)], maxlen=REMEMBERED)
        encoder = Encoder(config, self._drawn, processor, cache_bytes=0)
        maker = BatchMaker(encoder, processor, record_kind, self._pools.kinds, rank, part, data.packing)
        super().__init__(config, maker, [], raise_errors)

    def _dataset(self) -> StepDataset:
        mixture = self._pools.mixture(self._place)
        return _StreamedSteps(self._maker, self._drawn, mixture, self._position, self._plan)

    def _passed(self, step: Step) -> None:
        super()._passed(step)
        assert step.next_place is not None  # a step without one has an error, and is not yielded
        self._place = step.next_place
        self._places.append((self._position, self._place))

    def samples_of(self, position: int) -> list[list[str]]:
        """FILE@BYTE or FILE:ROW of the samples of one of the last REMEMBERED steps, or of a later one, by rank."""
        known, places = max((one for one in self._places if one[0] <= position), key=lambda one: one[0])
        mixture, size = self._pools.mixture(places), self._plan.global_batch_size
        mixture.skip((position - known) * size)
        drawn = Drawn(self._pools.blocks.sources, self._drawn.record_kind)
        drawn.rows = mixture.take(size)
        rows, _ = self._plan.rows(
            drawn, Encoder(self._config, drawn, self._maker.processor, cache_bytes=0), 0, Step([])
        )
        return self._samples(rows, drawn)

    def outlook(self) -> str:
        """What is known of the data before a pass over them, in a line for people."""
        return self._pools.outlook()

    @property
    def order(self) -> DataPosition:
        return streamed_order_of(self._config, *self._pools.identity)

    def state_dict(self) -> DataPosition:
        """The place after the last yielded step, and everything that the order of the data depends on."""
        places = [list(astuple(place)) for place in self._place]
        epoch = min(place.epoch for place in self._place)
        return {"epoch": epoch, "step": self._position, PLACES: places, **self.order}

    def _go_to(self, state: DataPosition) -> None:
        self._place = _places(state, len(self._pools.pools))
        self._position = int(state["step"])
        self._places.clear()
        self._places.append((self._position, self._place))


def _places(state: Mapping[str, Any], pools: int) -> list[PoolPlace]:
    places = state.get(PLACES)
    if isinstance(places, list) and len(places) == pools and all(map(_is_place, places)):
        return [PoolPlace(*place) for place in places]
    raise UserError(f"train.resume: the checkpoint's data position has {PLACES} {places!r} (use another)")


def _is_place(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(one) is int and one >= 0 for one in value)
