"""What completions are worth: `RewardPool`, which calls the reward functions of a run apart from the trainer."""

import hashlib
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ds_moe.config.rollout import BUILT_IN_REWARDS, FUNCTION, OVERLONG, RewardConfig, RewardFunction
from ds_moe.data.chat import final_answer
from ds_moe.errors import UserError, one_line, shown
from ds_moe.rollout.reward_process import Failure, RewardProcess
from ds_moe.rollout.reward_program.functions import LARGEST
from ds_moe.rollout.reward_program.protocol import Json

RECENT = 256  # completions whose share of failures ends a run
FEWEST = 16  # of them, before it is judged
SAID = 20  # kinds of failures that are said, each once
MOST_SOURCE = 1 << 20  # bytes of the file of a function


def exact(completion: str, answer: str) -> float:
    """1 where what stands behind the thought is the answer."""
    return float(final_answer(completion).strip() == answer.strip())


def contains(completion: str, answer: str) -> float:
    """1 where the answer stands somewhere behind the thought."""
    return float(answer.strip() in final_answer(completion))


BUILT_IN: dict[str, Callable[[str, str], float]] = dict(zip(BUILT_IN_REWARDS, (exact, contains), strict=True))


@dataclass(frozen=True)
class Candidate:
    """A completion that is to be judged.

    Attributes:
        completion: its text, thought included, without control tokens.
        answer: the reference, the last answer of the record.
        record: what else a function may want to know, as JSON has it: messages, kind, where.
        tokens: of the completion, its end token included.
        where: file and line of the record, for messages.
    """

    completion: str
    answer: str
    record: Json = field(default_factory=dict)
    tokens: int = 0
    where: str = ""


@dataclass(frozen=True)
class Scored:
    """What a completion is worth: the weighted sum of `parts`, the value of each reward by its name.

    The penalty for length, where one is asked for, is the part "overlong": 0 or below, and counts as it is.
    """

    reward: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Waiting:
    """A completion whose functions are at work, for `RewardPool.collect`."""

    case: Candidate
    future: "Future[dict[str, float] | Failure]"  # of the functions that are no built-in ones, by their names


class RewardPool:
    """The rewards of a run. Rank 0 has one, as a context manager; every method is called from one thread at a time.

        with RewardPool(config.rl.reward, max_new_tokens, note, config.at) as rewards:
            waiting = [rewards.submit(case) for case in cases]  # returns at once; functions are at work
            scored = rewards.collect(waiting)                   # in the same order; None: its reward failed, drop it

    Functions of the user run in processes of their own, which see no accelerator and nothing of the job. A call that
    fails or takes longer than timeout_s costs its completion, never the run: the process is killed with all that came
    of it, and another one is started. The first failure of each kind is said once, in one line, to `note`.
    The files of functions are read once, here: an edit counts from the next start on. An edit of a module that they
    import, or that a function is named by, is found when a process is started in the place of another, whose
    completions then have no reward.

    Attributes:
        failures: how many completions were dropped, by kind of failure.
        scored: how many completions were collected in all.
    """

    def __init__(
        self,
        config: RewardConfig,
        max_new_tokens: int,
        note: Callable[[str], None] = print,
        at: Callable[[str], str] = lambda key: "run file",
    ) -> None:
        """Start the processes and import every function in each of them.

        Args:
            max_new_tokens: of a completion, at which the penalty for length is largest.
            note: tells the person who runs the job one line; called from `collect`.
            at: where a key of the run file was written, for messages: `RunConfig.at`.

        Raises:
            UserError: a function cannot be read, imported or called with three arguments. One line.
        """
        self._config, self._longest, self._note, self._at = config, max_new_tokens, note, at
        self._recent: deque[bool] = deque(maxlen=RECENT)  # whether each failed
        self._said: set[str] = set()
        self._processes: list[RewardProcess] = []
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self.failures: Counter[str] = Counter()
        self.scored = 0
        self._closed = False
        self._own = [_described(one, config, at) for one in config.own_functions]
        self._code: dict[str, str] = {}  # of the modules that they are made of, beside the files that were read
        if self._own:
            self._start()

    def _start(self) -> None:
        config = self._config
        memory = int(config.memory_gb * 2**30)
        try:
            for _ in range(config.processes):
                self._processes.append(RewardProcess(self._own, config.timeout_s, memory))
            for process in self._processes:
                if (failed := process.ready()) is not None:
                    key = "rl.reward.functions" if config.functions else "rl.reward.function"
                    function = next((one["function"] for one in self._own if one["name"] == failed.name), "")
                    raise UserError(one_line(f"{self._at(key)}: {key} {function}: {failed.error}"))
            self._code, *others = [process.code or {} for process in self._processes]
            if any(code != self._code for code in others):
                raise UserError(
                    f"{self._at('rl.reward')}: the code of rewards was edited just now: start the run again"
                )
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            threading.Thread(target=self._work, args=(process,), name="reward", daemon=True).start()

    def _work(self, process: RewardProcess) -> None:
        """A thread for each process: completions one after another, whoever is free takes the next."""
        while (waiting := self._queue.get()) is not None:
            case = waiting.case
            asked: Json = {"completion": case.completion, "answer": case.answer, "record": case.record}
            try:
                waiting.future.set_result(process.ask(asked))
            except BaseException as error:  # such as a record that JSON cannot hold: a mistake of the caller
                waiting.future.set_exception(error)

    def submit(self, case: Candidate) -> Waiting:
        """Begin to score a completion."""
        waiting = Waiting(case, Future())
        if self._own:
            self._queue.put(waiting)
        else:
            waiting.future.set_result({})
        return waiting

    def collect(
        self, waiting: Sequence[Waiting], while_waiting: Callable[[], None] = lambda: None
    ) -> list[Scored | None]:
        """What the completions are worth, in the order of `waiting`; None where a reward failed.

        Args:
            while_waiting: called about once a second; what it raises ends the wait.

        Raises:
            UserError: more than max_failed of the last completions failed (of 256, or of as many as there were, but not
                of fewer than 16).
        """
        found = []
        for one in waiting:
            while not one.future.done():
                done, _ = wait([one.future], timeout=1.0)
                if not done:
                    while_waiting()
            values = one.future.result()
            scored = values if isinstance(values, Failure) else self._weighted(one.case, values)
            self._count(one.case, scored)
            found.append(None if isinstance(scored, Failure) else scored)
        return found

    def score(self, cases: Sequence[Candidate]) -> list[Scored | None]:
        """`submit` and `collect` in one."""
        return self.collect([self.submit(case) for case in cases])

    def _weighted(self, case: Candidate, values: dict[str, float]) -> Scored | Failure:
        parts, total = {}, 0.0
        for one in self._config.all:
            built_in = BUILT_IN.get(one.function)
            value = built_in(case.completion, case.answer) if built_in else values[one.curve]
            parts[one.curve] = value
            total += one.weight * value
        if self._config.overlong_buffer is not None:
            parts[OVERLONG] = overlong(case.tokens, self._longest, self._config)
            total += parts[OVERLONG]
        if abs(total) > LARGEST:
            return Failure("too large a sum", f"the weighted sum is {total:g}, which is beyond {LARGEST:g}")
        return Scored(total, parts)

    def _count(self, case: Candidate, scored: Scored | Failure) -> None:
        if self._closed:  # the run ends, and what was asked meanwhile says nothing about the function
            return
        self.scored += 1
        self._recent.append(isinstance(scored, Failure))
        if not isinstance(scored, Failure):
            return
        kind = f"{scored.name}: {scored.kind}" if scored.name else scored.kind
        self.failures[kind] += 1
        if kind not in self._said and len(self._said) < SAID:
            self._said.add(kind)
            name = f" {scored.name}" if scored.name else ""
            of = f"{case.where}, " if case.where else ""
            self._note(one_line(f"reward{name}: {scored.error} ({of}completion {shown(case.completion, 60)}, dropped)"))
        failed, recent, most = sum(self._recent), len(self._recent), self._config.max_failed
        if recent >= FEWEST and failed > most * recent:
            text = f"the reward failed for {failed} of the last {recent} completions ({self.failure_counts()})"
            raise UserError(f"{self._at('rl.reward')}: {text}; rl.reward.max_failed is {most:g}: mend the function")

    def failure_counts(self) -> str:
        """Kinds of failures with their counts, the most frequent ones; empty without a failure."""
        return ", ".join(f"{count} {kind}" for kind, count in self.failures.most_common(5))

    @property
    def digest(self) -> str:
        """Of the files of all functions, as they were read, and of the modules that they import; empty where there are
        none. Installed packages do not count, but for one that a function is named by."""
        sources = [str(one["source"]) for one in self._own if "source" in one]
        sources += [f"{name} {digest}" for name, digest in sorted(self._code.items())]
        return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:12] if sources else ""

    def lines(self) -> list[str]:
        """What rewards there are, a line each, for a summary."""
        digests = {str(one["name"]): self._digest_of(one) for one in self._own}
        found = []
        for one in self._config.all:
            weight = "" if len(self._config.all) == 1 else f", weight {one.weight:g}"
            digest = f", sha256 {digests[one.curve][:12]}" if digests.get(one.curve) else ""
            name = one.function if one.curve == one.function else f"{one.curve} is {one.function}"
            found.append(f"reward {name}{weight}{digest}")
        return found

    def _digest_of(self, told: Json) -> str:
        if "source" in told:
            return hashlib.sha256(str(told["source"]).encode()).hexdigest()
        return self._code.get(str(told["module"]), "")

    def close(self) -> None:
        """End every process, and all that came of it. What was not collected is lost: it has no reward."""
        self._closed = True
        for process in self._processes:
            process.close()
            self._queue.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def overlong(tokens: int, longest: int, config: RewardConfig) -> float:
    """The soft penalty for length of DAPO (2503.14476, eq. 13): 0 up to `overlong_buffer` tokens before the longest
    completion, then in even steps down to -`overlong_penalty` there."""
    assert config.overlong_buffer is not None
    beyond = tokens - (longest - config.overlong_buffer)
    return -config.overlong_penalty * min(max(beyond / config.overlong_buffer, 0.0), 1.0) + 0.0  # no -0.0


def _described(one: RewardFunction, config: RewardConfig, at: Callable[[str], str]) -> Json:
    """A function as its processes are told: with the text of its file, or the name of its module."""
    match = FUNCTION.fullmatch(one.function)
    assert match is not None  # the config holds no other
    told: Json = {"name": one.curve, "function": one.function}
    if match["file"] is None:
        return {**told, "module": match["module"], "attribute": match["of_module"]}
    file = Path(match["file"]).absolute()
    key = "rl.reward.functions" if config.functions else "rl.reward.function"
    try:
        if file.stat().st_size > MOST_SOURCE:
            raise ValueError(f"larger than {MOST_SOURCE >> 20} MiB")
        source = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise UserError(f"{at(key)}: {key} {one.function}: cannot read {file}: {reason}") from error
    return {**told, "module": file.stem, "attribute": match["of_file"], "file": str(file), "source": source}
