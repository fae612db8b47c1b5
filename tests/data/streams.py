"""Runs that are killed over and over, each time resumed from the place that a checkpoint would hold."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ds_moe.data.batch import NO_LOSS

# What a reader of data is to a test: from a saved state on (None: from the start), each step's samples with the state
# behind it. It is given how often it has been started before.
Reader = Callable[[Any, int], Iterator[tuple[list[str], Any]]]


def read_on(streams: list, state: Any, processor) -> Iterator[tuple[list[str], Any]]:
    """What a `Reader` gives, of the streams of all ranks: they go on from a state together, and have one place."""
    for stream in streams if state is not None else ():
        stream.load_state_dict(state)
    try:
        for step in zip(*streams, strict=True):
            states = [stream.state_dict() for stream in streams]
            assert all(one == states[0] for one in states)
            yield sorted(str(a) for rank in step for batch in rank for a in answers(batch, processor)), states[0]
    finally:
        for stream in streams:
            stream.close()


def never_stopped(reader: Reader, steps: int) -> list[list[str]]:
    """The samples of each step."""
    return [samples for samples, _ in islice(reader(None, 0), steps)]


def killed_at(points: list[int], reader: Reader, steps: int) -> list[list[str]]:
    """The same of a run that is killed after each of these steps and goes on from the state that was saved there."""
    found: list[list[str]] = []
    state = None
    for start, point in enumerate([*points, steps]):
        for samples, saved in islice(reader(state, start), point - len(found)):
            found.append(samples)
            state = json.loads(json.dumps(saved))
    return found


def random_points(steps: int, count: int, seed: int) -> list[int]:
    """`count` different steps between 1 and `steps` - 1, in their order."""
    return sorted(random.Random(seed).sample(range(1, steps), count))


def answers(batch, processor) -> list[str | None]:
    """The answer of each sample; None for a filler."""
    found = []
    for sample in range(batch.samples):
        kept = batch.labels[(batch.sequence_of_token == sample) & (batch.labels != NO_LOSS)]
        found.append(processor.tokenizer.decode(kept).removesuffix("<|im_end|>") if len(kept) else None)
    return found
