"""The tape: what the MoE layers of a gradient-checkpointed region decided in forward, kept for the recompute."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from ds_moe.moe.balance import TokenStats
from ds_moe.moe.decision import Assignments
from ds_moe.moe.dispatch import DispatchPlan


class TapeEntry(NamedTuple):
    """What one MoE layer decided in forward."""

    chosen: Assignments
    plan: DispatchPlan
    stats: TokenStats


@dataclass
class Tape:
    """The entries of one gradient-checkpointed region. Its forward writes them, its recompute reads them."""

    replaying: bool = False
    entries: dict[int, TapeEntry] = field(default_factory=dict)  # by MoE layer index


_TAPE: ContextVar[Tape | None] = ContextVar("ds_moe_tape", default=None)


def current_tape() -> Tape | None:
    """The tape of the checkpointed region that runs in this thread, if any."""
    return _TAPE.get()


@contextmanager
def _running(tape: Tape, replaying: bool) -> Iterator[None]:
    tape.replaying = replaying
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: one tape for a region's forward and its recompute.

    A recompute may round differently (another kernel, another order of summation), which could flip a tie in top-k,
    and it would report its counts a second time. With the tape it repeats the forward's decision and reports nothing.
    """
    tape = Tape()
    return _running(tape, replaying=False), _running(tape, replaying=True)
