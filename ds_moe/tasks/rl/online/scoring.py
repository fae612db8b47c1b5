"""Rewards of completions."""

from collections.abc import Sequence
from typing import NamedTuple

from ds_moe.tasks.rl.online.prompts import Asked
from ds_moe.tasks.rl.sample import REWARDS


class Scored(NamedTuple):
    """The reward of a completion, and the parts that it is the sum of, by name."""

    reward: float
    parts: dict[str, float]


class Scorer:
    """Scores completions by how they compare with the reference."""

    def __init__(self, name: str = "exact") -> None:
        self._name = name

    def score(self, asked: Asked, texts: Sequence[str]) -> list[Scored | None]:
        """The reward of each completion of a prompt; None: it could not be scored, and is left out."""
        values = [REWARDS[self._name](text, asked.answer) for text in texts]
        return [Scored(value, {self._name: value}) for value in values]

    def close(self) -> None:
        """End what was started."""
