"""Held-out samples of one rank, for losses and generated answers."""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from ds_moe.config.run import RunConfig
from ds_moe.data.ahead import Ahead, one_ahead
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.batch import Batch
from ds_moe.data.chat import Sample
from ds_moe.data.encode import Encoded, answer_text, collate_prompts, filler
from ds_moe.data.encoder import Begun
from ds_moe.data.fingerprint import Fingerprint, fingerprint
from ds_moe.data.order import FILLER
from ds_moe.data.packing import rows_in_order
from ds_moe.data.prepared.find import Asides
from ds_moe.data.processor import Processor
from ds_moe.data.ready import ReadyRecords
from ds_moe.data.record_kind import CHAT, RecordKind
from ds_moe.data.records import records_of
from ds_moe.data.workers import image_threads

PROMPTS = 8  # that are answered at a time where packing leaves their number open


@dataclass(frozen=True)
class EvalBatch:
    """B samples of one rank. A filler has the weight 0, no label and an empty answer."""

    batch: Batch
    asked: list[list[Encoded]]  # the same samples, as they are answered; perhaps fillers behind
    answers: list[str]
    weights: list[int]
    samples: list[Sample]
    processor: Processor

    def prompts(self) -> Iterator[Batch]:
        """Left-padded, for `generate`; each ends where the last answer begins."""
        return (collate_prompts(some, self.processor) for some in self.asked)


class EvalSet:
    """The records of data.eval, dealt out to the ranks in the order of the file.

    `notes`, `skipped`, `raise_errors` and `error` mean what they mean in `TrainStream`; `sha256` is that of the
    records' files.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        *,
        rank: int,
        world_size: int,
        raise_errors: bool = True,
        record_kind: RecordKind = CHAT,
    ):
        records = records_of(config, "held-out", record_kind)
        self.sha256, self._config, self._records = records.sha256, config, records
        self._record_kind, self._content_tokens = record_kind, config.data.content_tokens
        by_default = PROMPTS if config.data.packing else config.train.micro_batch_size
        self._size, self._capacity = config.train.eval_batch_size or by_default, config.tokens_per_row
        self._rank, self._world_size, self._count = rank, world_size, len(records)
        ready = ReadyRecords.of(config, "held-out", records, processor)
        self._processor, self._encoder, self._counts, self.notes = processor, ready.encoder, ready.counts, ready.notes
        self._log, self._asides = BadRecordLog(config, ready.bad, rank, raise_errors), Asides("data.eval")
        self.skipped = self._log.records

    @property
    def error(self) -> str | None:
        """See `TrainStream.error`."""
        return self._log.error

    @property
    def made_of(self) -> Fingerprint:
        """See `TrainStream.made_of`."""
        return fingerprint(self._config, self._records, self._processor)

    def __len__(self) -> int:
        """The number of samples of all ranks together."""
        return self._count

    def batches(self, limit: int | None = None, padded: bool = False) -> Iterator[EvalBatch]:
        """This rank's batches, equally many on every rank; the ranks' batches of a turn are neighbours in the file.

        Args:
            limit: samples of all ranks to use, a random choice that is always the same; None: all.
            padded: rows of one sample each, `train.eval_batch_size` of them, also where the run packs its rows.
        """
        with closing(Ahead(image_threads(0))) as ahead:
            turns = self._turns(limit, padded)
            begun = (([self._encoder.begin(index, ahead) for index in indices], *how) for indices, *how in turns)
            for one in one_ahead(begun):
                yield self._batch(*one)

    def _turns(self, limit: int | None, padded: bool) -> Iterator[tuple[list[int], int, bool]]:
        """(indices of a batch, samples of the rank that has most of them, which decides how often all ranks generate,
        whether they are packed)."""
        indices = list(range(self._count))
        if limit is not None and limit < self._count:
            indices = sorted(random.Random(0).sample(indices, limit))
        if self._counts is not None and not padded:
            usable = [index for index in indices if self._counts.tokens[index]]
            for turn in rows_in_order(usable, self._counts.tokens, self._capacity, self._world_size):
                yield turn[self._rank], max(map(len, turn)), True
            return
        stride = self._size * self._world_size
        indices += [FILLER] * (-len(indices) % stride)
        for start in range(self._rank * self._size, len(indices), stride):
            yield indices[start : start + self._size], self._size, False

    def _batch(self, begun: list[Begun], longest: int, packed: bool) -> EvalBatch:
        encoded, used, bad = self._encoder.finish(begun)
        if self._counts is not None and packed:
            self._counts.check(used, encoded, self._encoder)
        self._log.note(bad)
        self._asides.say(self._encoder.aside)
        samples = [self._encoder.sample(one, index) for one, index in zip(begun, used, strict=True)]
        starts = range(0, longest, self._size)
        return EvalBatch(
            batch=self._record_kind.collate(encoded, self._processor, packed=packed),
            asked=[encoded[start : start + self._size] or [filler(self._processor)] for start in starts],
            answers=[answer_text(one, self._processor, self._content_tokens) for one in encoded],
            weights=[int(index != FILLER) for index in used],
            samples=samples,
            processor=self._processor,
        )
