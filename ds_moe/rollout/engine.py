"""What a reinforcement run asks of an inference engine, whichever it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the answer that is to be sampled.

    Attributes:
        token_ids: as the trainer encodes it, image tokens expanded. An engine that makes other ids of `messages`
            serves another template or processor.
        messages: in the form of transformers' chat templates; an item `{"type": "image"}` takes the next of `images`.
        images: at the size at which the model's processor leaves them as they are.
        where: file and line of the record, for messages.
    """

    token_ids: list[int]
    messages: list[dict[str, object]]
    images: list[Image.Image] = field(default_factory=list)
    tools: list[dict[str, object]] | None = None  # functions that the template shows, of a prompt with images
    where: str = ""


@dataclass(frozen=True)
class Completion:
    """What an engine sampled after a prompt.

    Attributes:
        token_ids: of the completion alone, its end token included where it has one.
        logprobs: of each of them, under the distribution that was sampled.
        routing: experts of prompt and completion in the form `routing_format`, see `replay.traces`; None: not recorded.
        finish_reason: "length" where the answer was cut at the most tokens asked for.
        version: of the weights that sampled it.
    """

    token_ids: list[int]
    logprobs: list[float]
    routing: object | None
    routing_format: str
    finish_reason: Literal["stop", "length", "abort"]
    version: str


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: from the full softmax, so that log-probs are those of what was sampled."""

    completions: int  # of each prompt
    max_new_tokens: int
    temperature: float
    seed: int
    forbidden: tuple[int, ...] = ()  # a completion with one of these ids, such as image tokens, is left out


class EnginesGone(Exception):
    """No server has answered for as long as the run is willing to wait."""


# Name of a server and its greedy completions (log-probs at temperature 1) -> what is wrong with them, or None. It is
# called from several threads, for one server a time.
Problem = Callable[[str, Sequence[Completion]], str | None]


class RolloutEngine(Protocol):
    """Servers, or a model of this machine. One process of a job, rank 0, has it."""

    def check(self) -> list[str]:
        """What the engine is, a line each. Raises `UserError` for settings that would train on wrong numbers, in one
        line with the flag to set."""
        ...

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        deliver: Callable[[int, list[Completion]], None],
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        """Sample all prompts; `deliver(number of the prompt, its completions)` is called from this thread, as they
        come, once for each prompt. A completion that is lost for good is missing from its list.

        Args:
            pulse: called about once a second from this thread. What it or `deliver` raises ends the sampling.

        Raises:
            EnginesGone: after waiting.
            UserError: where an engine says that it was asked for what it cannot do.
        """
        ...

    def publish(self, folder: Path, version: str) -> None:
        """Make the engine sample from the weights of `folder`, a plain Hugging Face folder in hub layout, once nothing
        that is in flight can mix them with older ones. A server that does not answer now gets them before it is asked
        again. May be called while another thread is in `sample`.

        Raises:
            EnginesGone: after waiting.
            UserError: no server could load them.
        """
        ...

    def prove(self, prompts: Sequence[Prompt], max_new_tokens: int, problem: Problem) -> None:
        """Have the most likely answers to all prompts judged, of every server that has been given the weights. One that
        is given them later is judged before it samples, and left out where there is a problem.

        Raises:
            EnginesGone: after waiting.
            UserError: what `problem` has found in a server that answers now.
        """
        ...

    def close(self) -> None:
        """Leave nothing paused, and end what was started."""
        ...
