"""Pairs as a kind of record: a pair is one sample of the plan, and two sequences of the micro-batch that it lies in.

So both answers always meet in one forward of one rank, whatever the number of ranks, in padded rows (two each) and in a
packed one, where they lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.chat_template import DEFAULT_RULES, TokenRules
from ds_moe.data.encode import Encoded, Pixels, collate, encode
from ds_moe.data.images import ImageRoot, RecordError
from ds_moe.data.order import FILLER
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import CHAT, RecordKind, Records
from ds_moe.tasks.dpo.pair_record import Pair, parse_pair


@dataclass(frozen=True)
class EncodedPair(Encoded):
    """The tokens of both sequences, one behind the other. Their images are the same, and are held once."""

    chosen: int = 0  # tokens of the sequence with the preferred answer, which comes first
    number: int = FILLER  # index of the record in its file

    def sequences(self) -> list[Encoded]:
        """The sequence with the preferred answer, then the other."""
        plain = {field.name: getattr(self, field.name) for field in fields(Encoded)}
        cuts = slice(None, self.chosen), slice(self.chosen, None)
        return [Encoded(**{**plain, "input_ids": self.input_ids[cut], "labels": self.labels[cut]}) for cut in cuts]


@dataclass(kw_only=True)
class PairBatch(Batch):
    """P pairs as B = 2 P sequences: pair p has the sequences 2 p, with the preferred answer, and 2 p + 1.

    `real_B` and all that is said of samples is said of sequences; `kind_B` alone has an entry for each pair.
    """

    number_P: Tensor  # int64 index of each pair's record, FILLER for a filler
    reference_P2: Tensor | None = None  # fp64 log-probs of both answers by the reference; None: not known, or not used
    reference_routing: Tensor | None = None  # (R, S, L, K) int16: the experts that the reference used, -1 at padding

    @property
    def real_P(self) -> Tensor:
        return self.real_B[::2]

    @property
    def kind_of_token(self) -> Tensor | None:
        if self.kind_B is None:
            return None
        of_pair = self.kind_B[self.sequence_of_token.clamp(min=0) // 2]
        return torch.where(self.sequence_of_token >= 0, of_pair, -1)


class Pairs(RecordKind[Pair]):
    """Conversations with a preferred and another answer."""

    encodes = EncodedPair

    def parse(self, record: object, where: str, root: Path | ImageRoot) -> Pair:
        return parse_pair(record, where, root)

    def estimate(self, parsed: Pair, max_pixels: int) -> int:
        assert parsed.rejected is not None
        return CHAT.estimate(parsed, max_pixels) + CHAT.estimate(parsed.rejected, max_pixels)

    def encode(
        self,
        parsed: Pair,
        processor: Processor,
        max_length: int,
        max_pixels: int,
        rules: TokenRules = DEFAULT_RULES,
        pixels: Pixels = True,
    ) -> EncodedPair:
        """Both sequences. `max_length` is of the pair: padded to the longer one, both must fit."""
        assert parsed.rejected is not None
        chosen = encode(parsed, processor, max_length, max_pixels, rules, pixels)
        rejected = encode(parsed.rejected, processor, max_length, max_pixels, rules, pixels=False)
        longer = max(len(chosen.input_ids), len(rejected.input_ids))
        if 2 * longer > max_length:
            reason = f"over-long: a pair takes twice its longer sequence, 2 x {longer} tokens, beyond data.max_length"
            raise RecordError(f"{reason} {max_length} (shorten the record, or raise the limit)")
        if torch.equal(chosen.input_ids, rejected.input_ids):
            raise RecordError("'chosen' and 'rejected' have the same tokens, so nothing is preferred (remove it)")
        values = {field.name: getattr(chosen, field.name) for field in fields(Encoded)}
        values["input_ids"] = torch.cat([chosen.input_ids, rejected.input_ids])
        values["labels"] = torch.cat([chosen.labels, rejected.labels])
        for name, one in (("chosen", chosen), ("rejected", rejected)):
            if (one.labels[1:] == NO_LOSS).all():
                raise RecordError(f"no token of {name!r} is learned (give its last answer a weight of 1)")
        return EncodedPair(**values, chosen=len(chosen.input_ids), number=parsed.number)

    def collate(self, encoded: list[Encoded], processor: Processor, packed: bool = False) -> PairBatch:
        """A filler counts as a pair of fillers."""
        both = [one.sequences() if isinstance(one, EncodedPair) else [one, one] for one in encoded]
        batch = collate([sequence for pair in both for sequence in pair], processor, packed=packed)
        numbers = [one.number if isinstance(one, EncodedPair) else FILLER for one in encoded]
        return PairBatch(**vars(batch), number_P=torch.tensor(numbers))

    def complete(self, records: Records[Pair]) -> NumberedPairs:
        return NumberedPairs(records)


PAIRS = Pairs()


class NumberedPairs:
    """The pairs of a file, each of which knows its index; satisfies `Records`."""

    def __init__(self, records: Records[Pair]) -> None:
        self._records = records
        self.sha256, self.lengths, self.bad = records.sha256, records.lengths, records.bad
        self.kinds, self.record_kind, self.remembered = records.kinds, records.record_kind, records.remembered
        self.sources = records.sources

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Pair:
        return replace(self._records.sample(index), number=index)

    def where(self, index: int) -> str:
        return self._records.where(index)
