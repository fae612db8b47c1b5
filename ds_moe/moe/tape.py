"""Routing that a gradient-checkpointed region decided in its forward, kept for its recompute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tape:
    """What one gradient-checkpointed region decided in its forward, for its recompute to repeat."""

    replaying: bool = False
    kept: dict[int, Any] = field(default_factory=dict)  # by MoE layer index


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

    A recompute in other rounding (another kernel, another summation order) could flip a tie in top-k, and its
    counts would be counted twice. With the tape it repeats the forward's decision and reports nothing.
    """
    tape = Tape()
    return _running(tape, replaying=False), _running(tape, replaying=True)
