"""Exact tokens and patches of every record, which packing needs before it knows who trains on what.

A file is measured once: its records are tokenized, of its images only the headers are read. The result is kept in the
run's output folder, under everything that it follows from. The ranks of a host wait while one of them measures.
"""

import json
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ds_moe.config.run import RunConfig
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import SPLIT_KEYS, Split
from ds_moe.data.encode import Encoded
from ds_moe.data.encoder import Encoder
from ds_moe.data.fingerprint import fingerprint, key_of
from ds_moe.data.kept_arrays import read_arrays, write_arrays
from ds_moe.data.order import FILLER
from ds_moe.data.prepared.folder import INDEX, Prepared
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records
from ds_moe.data.records import DATA_CACHE, stop_message
from ds_moe.data.sources.unpack import alone
from ds_moe.data.workers import loader_options
from ds_moe.distributed import ranks_of_host
from ds_moe.errors import UserError

CHUNK = 256  # records that a process measures at a time
SHOWN_EVERY_S = 10.0  # of a file that takes long


@dataclass(frozen=True)
class TokenCounts:
    """Of each record its tokens and patches, both (records,) int64; 0 tokens: `bad` says why it cannot be used."""

    tokens: np.ndarray
    patches: np.ndarray
    bad: dict[int, BadRecord]  # by index of the record
    file: Path  # where they are kept

    def check(self, indices: list[int], encoded: list[Encoded], encoder: Encoder) -> None:
        """Compare records as they were loaded with their counts, which are forgotten where one is wrong.

        Raises:
            UserError: a record or an image of it has changed meanwhile.
        """
        for index, one in zip(indices, encoded, strict=True):
            if index == FILLER:
                continue
            now, counted = encoder.size_of(one), (int(self.tokens[index]), int(self.patches[index]))
            if now != counted:
                at, what = (0, "tokens") if now[0] != counted[0] else (1, "patches")
                was = f"had {counted[at]} {what} when they were counted and has {now[at]} now"
                if self.file.name == INDEX:
                    fix = "run ds-moe data prepare again"
                else:
                    fix = "start the run again, which counts anew"
                    self.file.unlink(missing_ok=True)
                raise UserError(f"{encoder.where(index)}: {was}: it or an image of it has changed ({fix})")


def token_counts(
    config: RunConfig,
    split: Split,
    records: Records,
    encoder: Encoder,
    processor: Processor,
    prepared: Prepared | None = None,
) -> TokenCounts:
    """Measure the records of a file, or read what `ds-moe data prepare`, an earlier start or another rank of this host
    has measured.

    Raises:
        UserError: under `data.on_bad_record: stop`, a record that cannot be used.
    """
    if prepared is not None:
        counts: TokenCounts | None = _prepared_counts(prepared, encoder)
    else:
        file = _file(config, split)
        with alone(file):
            counts = kept_counts(config, split, records, encoder, processor)
            if counts is None:
                counts = _measured(config, split, records, encoder, file)
                _keep(counts, key_of(fingerprint(config, records, processor)))
    if counts.bad and config.data.on_bad_record == "stop":
        raise UserError(stop_message(list(counts.bad.values())))
    return counts


def kept_counts(
    config: RunConfig, split: Split, records: Records, encoder: Encoder, processor: Processor
) -> TokenCounts | None:
    """The counts of an earlier measurement; None: there are none, they are of something else, or damaged."""
    kept = read_arrays(_file(config, split), "about", "tokens", "patches")
    if kept is None:
        return None
    (about, tokens, patches) = json.loads(str(kept[0])), *kept[1:]
    if about["key"] != key_of(fingerprint(config, records, processor)):
        return None
    bad = {int(index): BadRecord(records.where(int(index)), reason) for index, reason in about["bad"].items()}
    # Looked at again, because what an image contains is not part of the key: somebody may have repaired it.
    repaired = any(encoder.measure(index) != one for index, one in bad.items())
    return None if repaired else TokenCounts(tokens, patches, bad, _file(config, split))


def _prepared_counts(prepared: Prepared, encoder: Encoder) -> TokenCounts:
    """Those of prepared data. Its bad records are measured: one whose image does not decode has tokens elsewhere too,
    and another may have been repaired."""
    tokens, patches, bad = prepared.tokens.copy(), prepared.patches.copy(), {}
    for index in prepared.bad:
        size = encoder.measure(index)
        if isinstance(size, BadRecord):
            bad[index], size = size, (0, 0)
        tokens[index], patches[index] = size
    return TokenCounts(tokens, patches, bad, prepared.folder / INDEX)


def _file(config: RunConfig, split: Split) -> Path:
    return Path(config.train.output_dir, DATA_CACHE, f"token_counts_{split}.npz")


class _Chunks(Dataset):
    """Measurements of CHUNK neighbouring records; loading processes make them."""

    def __init__(self, encoder: Encoder, records: int):
        self.encoder, self.records = encoder, records

    def __len__(self) -> int:
        return ceil(self.records / CHUNK)

    def __getitem__(self, number: int) -> list[tuple[int, int] | BadRecord]:
        last = min((number + 1) * CHUNK, self.records)
        return [self.encoder.measure(index) for index in range(number * CHUNK, last)]


def _measured(config: RunConfig, split: Split, records: Records, encoder: Encoder, file: Path) -> TokenCounts:
    began = shown = time.monotonic()
    chunks, name = _Chunks(encoder, len(records)), SPLIT_KEYS[split]
    # The loading processes of the other ranks of this host have nothing to do meanwhile.
    workers = config.data.num_workers * (ranks_of_host() or 1)
    workers = min(workers, len(chunks)) if len(chunks) > 1 else 0
    found: list[tuple[int, int] | BadRecord] = []
    for chunk in DataLoader(chunks, **loader_options(workers)):
        found += chunk
        if time.monotonic() - shown > SHOWN_EVERY_S:
            shown = time.monotonic()
            print(f"{name}: tokens of {len(found):,} of {len(records):,} records counted", flush=True)
    if shown != began:
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{name}: tokens of {len(found):,} records counted in {took}, and kept in {file}", flush=True)
    bad = {index: one for index, one in enumerate(found) if isinstance(one, BadRecord)}
    sizes = np.array([(0, 0) if isinstance(one, BadRecord) else one for one in found], dtype=np.int64).reshape(-1, 2)
    return TokenCounts(sizes[:, 0], sizes[:, 1], bad, file)


def _keep(counts: TokenCounts, key: str) -> None:
    about = json.dumps({"key": key, "bad": {index: one.reason for index, one in counts.bad.items()}})
    write_arrays(counts.file, about=np.array(about), tokens=counts.tokens, patches=counts.patches)
