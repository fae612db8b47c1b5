"""Records that are all known, ready to be encoded: prepared or not, with their tokens counted where rows are packed."""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe.config.run import RunConfig
from ds_moe.data.chat import BadRecord
from ds_moe.data.digits import Split
from ds_moe.data.encoder import Encoder
from ds_moe.data.prepared.find import find_prepared
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records
from ds_moe.data.token_counts import TokenCounts, token_counts


@dataclass(frozen=True)
class ReadyRecords:
    """What training and evaluation read records with.

    Attributes:
        counts: None where rows are not packed.
        bad: the records that cannot be used, as far as anything is known of them before they are encoded.
        notes: lines about prepared data, for the summary of a run.
    """

    encoder: Encoder
    counts: TokenCounts | None
    bad: list[BadRecord]
    notes: list[str]

    @classmethod
    def of(cls, config: RunConfig, split: Split, records: Records, processor: Processor) -> ReadyRecords:
        """Raises `UserError` as `token_counts`, and for `data.content_tokens` that the tokenizer does not have."""
        prepared, note = find_prepared(config, split, records, processor)
        encoder = Encoder(config, records, processor, prepared=prepared)
        counts, bad = None, list(records.bad)
        if config.data.packing:
            counts = token_counts(config, split, records, encoder, processor, prepared)
            bad += counts.bad.values()
        return cls(encoder, counts, bad, [note] if note else [])
