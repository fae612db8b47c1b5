"""From a record to its tensors, and what becomes of the records that fail on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_moe.checkpoint_files import step_folders
from ds_moe.config import RunConfig
from ds_moe.data.chat import BadRecord, Sample, Turn
from ds_moe.data.collate import Encoded, filler
from ds_moe.data.demo import DigitsRecords, Split
from ds_moe.data.form import CHAT, Form
from ds_moe.data.images import RecordError
from ds_moe.data.order import FILLER
from ds_moe.data.records import Records, read_records, stop_message
from ds_moe.errors import UserError

CACHE_BYTES = 128 * 2**20  # of encoded samples kept a process: small data are encoded once
FILLER_SAMPLE = Sample((Turn("user", ("",)), Turn("assistant", ("",))), where="filler")
BAD_RECORDS = "bad_records.jsonl"


def open_records(config: RunConfig, path: str, split: Split, form: Form = CHAT) -> Records:
    """The records of data.train ("train") or data.eval ("held-out"): a file, or that split of the bundled digits."""
    if path == "digits":
        return DigitsRecords(split)
    return read_records(path, config.data, cache_dir=Path(config.train.output_dir) / "data_cache", form=form)


class Encoder:
    """Records of one file to encoded samples; the first CACHE_BYTES of them are kept."""

    def __init__(self, config: RunConfig, records: Records, processor: Any):
        self._data, self._records, self._processor = config.data, records, processor
        self._cache: dict[int, Encoded] = {FILLER: filler(processor)}
        self._cached_bytes = 0

    def sample(self, index: int) -> Sample:
        return FILLER_SAMPLE if index == FILLER else self._records.sample(index)

    def encode(self, indices: list[int]) -> tuple[list[Encoded], list[int], list[BadRecord]]:
        """Encoded samples, the indices they are of, and the bad records that fillers stand for (index FILLER)."""
        encoded, used, bad = [], [], []
        for index in indices:
            result = self._one(index)
            if isinstance(result, BadRecord):
                bad.append(result)
                index, result = FILLER, self._cache[FILLER]
            encoded.append(result)
            used.append(index)
        return encoded, used, bad

    def _one(self, index: int) -> Encoded | BadRecord:
        if index in self._cache:
            return self._cache[index]
        try:
            sample = self._records.sample(index)
            encoded = self._records.form.encode(sample, self._processor, self._data.max_length, self._data.max_pixels)
        except RecordError as error:
            return BadRecord(self._records.where(index), str(error))
        if self._cached_bytes + encoded.nbytes <= CACHE_BYTES:
            self._cache[index] = encoded
            self._cached_bytes += encoded.nbytes
        return encoded


def check_samples(config: RunConfig, records: Records, processor: Any, count: int) -> tuple[list[BadRecord], list[int]]:
    """Decode and tokenize the first `count` samples: those that this shows to be bad, and the tokens of the others."""
    encoder = Encoder(config, records, processor)
    found, lengths = [], []
    for index in range(min(count, len(records))):  # one by one: their pixels are not needed together
        [encoded], _, bad = encoder.encode([index])
        found += bad
        if encoded.real:
            lengths.append(len(encoded.input_ids))
    return found, lengths


def forget_earlier_run(config: RunConfig) -> None:
    """Remove the BAD_RECORDS of another run from the output folder. Without a checkpoint there is none to go on with.

    For rank 0, before any rank loads samples.
    """
    folder = Path(config.train.output_dir)
    if not step_folders(folder / "checkpoints"):
        (folder / BAD_RECORDS).unlink(missing_ok=True)


class BadRecordLog:
    """Bad records met so far, each listed once in the output folder's BAD_RECORDS.

    Under `stop` nothing is listed, and the first one is an error: raised, or with `raise_errors` False kept as `error`.
    """

    def __init__(self, config: RunConfig, bad: list[BadRecord], rank: int, raise_errors: bool = True):
        self._stop, self._raise_errors = config.data.on_bad_record == "stop", raise_errors
        self._file = Path(config.train.output_dir) / BAD_RECORDS
        self._listed: set[str] = set()  # lines of the file, of all ranks, as far as it has been read
        self._read_to = 0
        self._known = set(bad)
        self.records = list(bad)
        self.error: str | None = None
        if rank == 0:  # every rank has read the same structure
            self._write(bad)

    def note(self, bad: list[BadRecord]) -> None:
        """Take up what loading a step has shown; a record comes again in every epoch. Raises `UserError` under stop."""
        new = [record for record in dict.fromkeys(bad) if record not in self._known]
        if not new:
            return
        if self._stop:
            self.error = self.error or stop_message(new)
            if self._raise_errors:
                raise UserError(self.error)
            return
        self._known.update(new)
        self.records += new
        self._write(new)

    def _write(self, bad: list[BadRecord]) -> None:
        if not bad:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"where": record.where, "reason": record.reason}) for record in bad]
        with self._file.open("a+", encoding="utf-8") as stream:  # short appended lines of several ranks do not mix
            stream.seek(self._read_to)
            self._listed.update(stream.read().splitlines())
            self._read_to = stream.tell()
            stream.writelines(f"{line}\n" for line in lines if line not in self._listed)
