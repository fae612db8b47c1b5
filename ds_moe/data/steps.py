"""Optimizer steps of one rank, made by loading processes or by this one, wherever their records come from."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from itertools import count

from torch.utils.data import DataLoader

from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.batch import Batch
from ds_moe.data.chat import BadRecord
from ds_moe.data.order import FILLER, Rows
from ds_moe.data.packing import Fill
from ds_moe.data.position import DataPosition, position_problems
from ds_moe.data.prepared.find import Asides
from ds_moe.data.record_kind import RecordsByIndex
from ds_moe.data.step_dataset import BatchMaker, Step, StepDataset
from ds_moe.data.workers import loader_options
from ds_moe.errors import UserError, all_in_one

PREFETCH = 2  # steps that a loading process prepares ahead, unless the run file says otherwise


class LoadedSteps:
    """Endless steps that loading processes, or this one, make in turn. A subclass says of what, and counts them.

    Args:
        bad: the bad records that are known beforehand.
        raise_errors: see `TrainStream`.

    Attributes: as of `TrainStream`.
    """

    def __init__(self, config: RunConfig, maker: BatchMaker, bad: list[BadRecord], raise_errors: bool):
        self._config, self._maker, self.kinds = config, maker, maker.kinds
        lists = maker.part[0] == 0  # ranks that share a row load the same records
        self._log, self._asides = BadRecordLog(config, bad, maker.rank, raise_errors, lists), Asides("data.train")
        self._position = 0  # steps yielded since the very first
        self._loading: Iterator[Step] | None = None
        self._made_by: StepDataset | None = None
        self.fill: Fill | None = None
        self.skipped = self._log.records

    def _dataset(self) -> StepDataset:
        """Makes the steps from the present place on."""
        raise NotImplementedError

    def _passed(self, step: Step) -> None:
        """The step is about to be yielded."""
        self._position += 1

    def _go_to(self, state: DataPosition) -> None:
        """The next step is the one behind `state`, which is of data in this order."""
        raise NotImplementedError

    @property
    def order(self) -> DataPosition:
        """Everything that the order of the data depends on."""
        raise NotImplementedError

    def load_state_dict(self, state: DataPosition) -> None:
        """Go on after the saved step. Raises `UserError` if the order of the data would not be the saved one."""
        if problems := position_problems(state, self.order):
            raise all_in_one(problems)
        self._go_to(state)

    @property
    def error(self) -> str | None:
        """With `raise_errors` False: the bad record that must end the run, and the fix; None: there is none."""
        return self._log.error

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in self._steps():
            try:
                if step.error is not None:
                    raise UserError(step.error)
                self._log.note(step.bad)
                self._asides.say(step.aside)
            except UserError:
                self.close()
                raise
            if step.fill is not None:
                self.fill = step.fill if self.fill is None else self.fill + step.fill
            self._passed(step)  # before the yield: a checkpoint that is taken after this step must count it
            yield step.micro_batches

    def close(self) -> None:
        """End the loading processes, or this one's threads where it loads by itself.

        Processes ignore the signals of launchers, and Python's exit would wait for them for ever as long as anything,
        such as a traceback, still refers to the loader. Therefore they are ended at exit too.
        """
        atexit.unregister(self.close)
        shut_down = getattr(self._loading, "_shutdown_workers", None)  # torch has no public way
        if shut_down is not None:
            shut_down()
        if self._made_by is not None:
            self._made_by.close()

    def _steps(self) -> Iterator[Step]:
        self._loading = iter(self._loader())
        atexit.register(self.close)  # runs before multiprocessing's, which was registered when it was imported
        try:
            yield from self._loading
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise UserError(
                f"data.num_workers: a loading process died: {str(error).splitlines()[0].strip()} (it had too little "
                "memory, or a file crashed its decoder: data.num_workers=0 shows where)"
            ) from error

    def _loader(self) -> DataLoader:
        data = self._config.data
        self._made_by = self._dataset()
        return DataLoader(
            self._made_by,
            sampler=count(self._position),
            prefetch_factor=(data.prefetch_factor or PREFETCH) if data.num_workers else None,
            **loader_options(data.num_workers),
        )

    def _samples(self, rows: Rows, records: RecordsByIndex) -> list[list[str]]:
        """file:line of the samples of one step, by rank of the job."""
        by_rank = zip(*rows, strict=True)
        found = [[records.where(index) for row in rows for index in row if index != FILLER] for rows in by_rank]
        return [samples for samples in found for _ in range(self._maker.part[1])]


def check_batches(config: RunConfig, world_size: int) -> None:
    """Raise `UserError` where padded micro-batches do not make up a global batch on so many ranks."""
    train = config.train
    if config.data.packing:
        return
    per_micro_step = train.micro_batch_size * world_size
    if train.global_batch_size % per_micro_step:
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {world_size} ranks (make it a multiple of {per_micro_step})"
        )
