"""What a data file tells a run file that is yet to be written: how many records, how long, with images or not."""

from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import Split
from ds_moe.data.encoder import Encoder
from ds_moe.data.processor import Processor
from ds_moe.data.records import open_records, stop_message
from ds_moe.errors import UserError

LOOKED_AT = 32  # records from the beginning that are encoded, and as many of those that seem longest


@dataclass(frozen=True)
class Looked:
    """What a data file tells: its records, and the tokens of those that were encoded."""

    file: str
    records: int
    lengths: list[int]
    answer: int  # most tokens that are learned of one record
    images: int  # how many of those that were encoded have any
    skipped: list[BadRecord]  # records of a bad structure, and those that were looked at and are bad

    def __str__(self) -> str:
        looked = len(self.lengths)
        kind = "records with images" if self.images == looked else "records"
        some = f", {self.images} of them with images" if 0 < self.images < looked else ""
        bad = f"; {len(self.skipped)} bad ones skipped, the first {self.skipped[0]}" if self.skipped else ""
        tokens = f"{min(self.lengths):,} to {max(self.lengths):,} tokens in the {looked} looked at{some}"
        return f"{self.records:,} {kind}, {tokens}{bad}"


def look_at(path: str, split: Split, processor: Processor, model: PretrainedConfig, skip_bad: bool = False) -> Looked:
    """Encode the first records, and those that seem longest.

    Raises `UserError` for a bad record, as a run would, or with `skip_bad` where all that are looked at are bad.
    """
    longest = model.get_text_config().max_position_embeddings
    data = {"train": path, "max_length": longest, "on_bad_record": "skip" if skip_bad else "stop"}
    config = RunConfig(model={"path": "-"}, data=data, deepspeed="-")  # nothing of it is used but `data`
    records = open_records(path, split, config.data)
    encoder = Encoder(config, records, processor)
    seemingly_long = np.argsort(records.lengths)[-LOOKED_AT:].tolist()
    lengths, answer, images, skipped = [], 0, 0, list(records.bad)
    for index in sorted({*range(min(LOOKED_AT, len(records))), *seemingly_long}):
        [encoded], _, bad = encoder.encode([index])
        if bad and not skip_bad:
            raise UserError(stop_message(bad))
        if bad:
            skipped += bad
            continue
        lengths.append(len(encoded.input_ids))
        answer = max(answer, int((encoded.labels != NO_LOSS).sum()))
        images += encoded.pixel_values is not None
    if not lengths:
        raise UserError(stop_message(skipped))
    return Looked(path, len(records), lengths, answer, images, skipped)
