"""Images of coming records become patches on other threads, while this one reads records, tokenizes them or trains.

PIL decodes and resizes without Python's lock, which is half of the time that a record with an image takes. What its
patches are, and what is wrong with a broken image, follows from the record alone, never from the thread that finds it
out or from when it does: whoever asks for patches waits for them, or makes them where no thread has begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Lock
from typing import TypeVar

from torch import Tensor

READY_BYTES = 2**26  # of patches that have been made and not been asked for, at which threads make no more

T = TypeVar("T")
Patches = tuple[Tensor, Tensor]  # pixel_values and image_grid_thw of a record's images, as in `encode.Encoded`


def one_ahead(values: Iterable[T]) -> Iterator[T]:
    """The same values, each once the next one is there."""
    following = iter(values)
    for one in islice(following, 1):
        for other in following:
            yield one
            one = other
        yield one


class MadeAhead:
    """The patches of one record's images, made before they are asked for."""

    def __init__(self, ahead: Ahead, make: Callable[[], Patches]) -> None:
        self._ahead, self.make = ahead, make
        self.made = Future[Patches]()
        self.begun, self.held = False, 0  # whether a thread has it; bytes that wait to be asked for

    def take(self) -> Patches:
        """Raises what making them raises."""
        self._ahead.hand_over(self)
        return self.made.result()

    def drop(self) -> None:
        """They are not needed, or have been taken."""
        self._ahead.drop(self)


class Ahead:
    """Threads that make patches, in the order in which these were begun.

    At most `limit` bytes wait to be asked for, and what each thread was at when they became so many.
    """

    def __init__(self, threads: int, limit: int = READY_BYTES) -> None:
        self._executor, self._idle = ThreadPoolExecutor(threads, "images"), threads
        self._limit, self._ready = limit, 0  # bytes
        self._waiting = deque[MadeAhead]()
        self._lock = Lock()

    def begin(self, make: Callable[[], Patches]) -> MadeAhead:
        one = MadeAhead(self, make)
        with self._lock:
            self._waiting.append(one)
            self._start()
        return one

    def hand_over(self, one: MadeAhead) -> None:
        """Make it here if no thread has it. Until the thread that has is done, make others."""
        if self._withdrawn(one):
            self._make(one)
        while not one.made.done() and (other := self._next()) is not None:
            self._make(other)
        one.made.exception()  # waits
        self._gone(one)

    def drop(self, one: MadeAhead) -> None:
        if not self._withdrawn(one):
            one.made.exception()
            self._gone(one)

    def close(self) -> None:
        """Threads end when they have made what they are at; what they have not begun with is made by whoever asks."""
        with self._lock:
            self._waiting.clear()
            self._limit = 0
        self._executor.shutdown(wait=False)

    def _start(self) -> None:
        """One more thread, where one is idle and has something to do. The lock is held."""
        if self._idle and self._waiting and self._ready < self._limit:
            self._idle -= 1
            self._executor.submit(self._work)

    def _work(self) -> None:
        while (one := self._next(ends=True)) is not None:
            self._make(one)

    def _next(self, ends: bool = False) -> MadeAhead | None:
        """The first one that no thread has; None: there is none, or enough of them wait to be asked for. With `ends`
        the thread that asks becomes idle then."""
        with self._lock:
            if self._waiting and self._ready < self._limit:
                one = self._waiting.popleft()
                one.begun = True
                return one
            self._idle += ends
            return None

    def _make(self, one: MadeAhead) -> None:
        try:
            found = one.make()
        except BaseException as error:  # it is raised where the patches are asked for
            one.made.set_exception(error)
            if isinstance(error, Exception):
                return
            raise  # somebody ends this process
        with self._lock:
            one.held = sum(tensor.nbytes for tensor in found)
            self._ready += one.held
        one.made.set_result(found)

    def _withdrawn(self, one: MadeAhead) -> bool:
        """Whether no thread has it; none will."""
        with self._lock:
            if one.begun:
                return False
            if one in self._waiting:  # not after `close`
                self._waiting.remove(one)
            one.begun = True
            return True

    def _gone(self, one: MadeAhead) -> None:
        """It waits no longer."""
        with self._lock:
            self._ready -= one.held
            one.held = 0
            self._start()
