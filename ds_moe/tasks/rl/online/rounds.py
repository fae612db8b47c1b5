"""The rounds of a run, seen from all ranks: weights are handed over, rollouts are waited for, a round begins."""

import hashlib
import json
import time
from concurrent.futures import Future, wait
from dataclasses import asdict

import torch
import torch.distributed as dist

from ds_moe.checkpoint.base import base_identity
from ds_moe.checkpoint.changes import BOOKKEEPING
from ds_moe.checkpoint.progress import Progress
from ds_moe.config.rules.engine import engine_of, steps_of_round
from ds_moe.config.run import RunConfig
from ds_moe.config.tasks import TASK_SECTIONS
from ds_moe.distributed import over_ranks
from ds_moe.errors import UserError
from ds_moe.rollout.engine import EnginesGone
from ds_moe.rollout.reward import RewardPool
from ds_moe.tasks.rl.online.engines import compared_dtype, make_engine
from ds_moe.tasks.rl.online.handover import HandOver
from ds_moe.tasks.rl.online.probe import WeightsCheck
from ds_moe.tasks.rl.online.round import RoundMaker
from ds_moe.tasks.rl.online.round_file import RoundFacts, finished_round, round_file
from ds_moe.tasks.rl.online.sampler import Sampler
from ds_moe.tasks.rl.online.stream import OnlineStream
from ds_moe.tasks.task import TrainingParts

POLL_S = 0.2  # seconds between looks at the rollouts that are waited for
SAID = (EnginesGone, UserError)  # failures that are one line, on every rank
WAITING = "rollouts"  # what a rank does meanwhile, for the watchdog


class Rounds:
    """Begins the rounds of one run in turn (collective).

    Attributes:
        seconds: of the last `begin`, by what was waited for.
    """

    def __init__(self, parts: TrainingParts, stream: OnlineStream) -> None:
        self._parts, self._stream = parts, stream
        engine = engine_of(parts.config)
        assert engine is not None
        self._settings, self._run = engine, run_identity(parts.config, stream.prompts.records.sha256)
        # A server may be paused, loaded twice and asked for every probe, each within `timeout_s`.
        self._most_s = engine.wait_s + 10 * engine.timeout_s
        self._hand_over = HandOver(parts, stream.prompts, self._run)
        self._sampler: Sampler | None = None  # of rank 0
        failure = None
        if parts.topology.rank == 0:
            try:
                self._hand_over.claim()
                self._sampler = self._make_sampler()
            except Exception as error:  # of any kind, because the other ranks are waiting for this one
                failure = error
        raise_on_all(failure)
        self.seconds: dict[str, float] = {}

    def _make_sampler(self) -> Sampler:
        config, prompts, processor = self._parts.config, self._stream.prompts, self._parts.processor
        engine = make_engine(config, self._parts.note)
        for line in engine.check():
            self._parts.note(f"engine    {line}")
        rewards = RewardPool(config.rl.reward, self._settings.max_new_tokens, self._parts.note, config.at)
        for line in rewards.lines():
            self._parts.note(line)

        def maker(stopping):
            return RoundMaker(config, self._settings, prompts, processor, engine, rewards, self._run, stopping)

        return Sampler(engine, rewards, maker, WeightsCheck(compared_dtype(config)))

    def begin(self, progress: Progress) -> RoundFacts:
        """The round that comes next, or the one that a checkpoint was in; the stream is opened at its place.

        Raises:
            Stopped: a signal has come while rollouts were waited for.
            EnginesGone: on every rank.
            UserError: on every rank.
        """
        place, began = self._stream.place, time.perf_counter()
        facts = self._of_checkpoint() if place.step else None
        if place.step and facts is None:
            self._stream.sample_anew()
            place = self._stream.place
        self.seconds = {}
        if facts is None or self._settings.lag:
            self._hand_over(progress.step, place.number, self._sampler)
            self.seconds = {"weights_s": self._hand_over.write_s, "own_answers_s": self._hand_over.answer_s}
            first = place.number if facts is None else place.number + 1
            begin = place.prompt if facts is None else facts.end
            wanted = self._ask(first, begin, progress)
            if facts is None:
                facts = self._waited_for(wanted)
        self.seconds["wait_s"] = time.perf_counter() - began - sum(self.seconds.values())
        progress.file_from = progress.step - self._stream.place.step
        self._stream.open(facts)
        return facts

    def _ask(self, first: int, begin: int, progress: Progress) -> "Future[RoundFacts] | None":
        """Want the rounds that may be sampled now, on rank 0; the first of them."""
        if self._sampler is None:
            return None
        number, left = self._stream.place.number, progress.total_steps - progress.step + self._stream.place.step
        last = min(
            number + self._settings.lag, number + -(-left // steps_of_round(self._parts.config, self._settings)) - 1
        )
        wanted = [self._sampler.want(one, begin if one == first else None) for one in range(first, last + 1)]
        return wanted[0] if wanted else None

    def _of_checkpoint(self) -> RoundFacts | None:
        """The round that the checkpoint was in, if its file is as it was (collective)."""
        place, found = self._stream.place, None
        if self._parts.topology.rank == 0:
            found = finished_round(round_file(self._parts.config.train.output_dir, place.number))
            if found is None or found.sha256 != place.sha256:
                text = f"round {place.number} of rollouts is not there any more as the checkpoint knows it"
                self._parts.note(f"{text}: it is sampled anew")
                found = None
        [saved, *_] = over_ranks(None if found is None else asdict(found))
        return None if saved is None else RoundFacts(**saved)

    def _waited_for(self, wanted: "Future[RoundFacts] | None") -> RoundFacts:
        """What rank 0's thread has made (collective)."""
        done = torch.zeros(1, device=self._parts.topology.device)
        while True:
            if wanted is not None:
                wait([wanted], timeout=POLL_S)
                done.fill_(float(wanted.done() or self._is_stuck()))
            self._parts.turn(WAITING)
            dist.all_reduce(done)
            if done.item():
                break
        failure = None
        if wanted is not None:
            failure = (
                wanted.exception() if wanted.done() else EnginesGone(f"sampling has stood still for {self._most_s:g} s")
            )
        raise_on_all(failure)
        [saved, *_] = over_ranks(None if wanted is None else asdict(wanted.result()))
        assert saved is not None
        return RoundFacts(**saved)

    def _is_stuck(self) -> bool:
        """Whether the thread of rank 0 has shown no life for longer than anything that it does may take. The watchdog
        cannot see it: the ranks that wait for it do move."""
        return self._sampler is not None and self._sampler.quiet_s > self._most_s

    @property
    def load_s(self) -> float:
        """Seconds that the engine took for the weights it was given last, on rank 0."""
        return self._sampler.load_s if self._sampler is not None else 0.0

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()


def raise_on_all(failure: BaseException | None) -> None:
    """Raise what rank 0 has failed with, if it has: there itself, elsewhere as the kind of error that it is, so that
    all ranks end in the same way (collective)."""
    if isinstance(failure, OSError):  # no room, or a folder that cannot be written
        failure = UserError(f"rollouts: {failure}")
    kind = next((one for one in SAID if isinstance(failure, one)), RuntimeError)
    [told, *_] = over_ranks(None if failure is None else (kind.__name__, str(failure)))
    if failure is not None:
        raise failure
    if told is not None:
        raise {one.__name__: one for one in SAID}.get(told[0], RuntimeError)(told[1])


def run_identity(config: RunConfig, data_sha256: str) -> str:
    """The same for a run that goes on as it was, so that rounds which a killed process has finished are its own.

    Another model, data, seed or key that rollouts or weights depend on is another run.
    """
    others = {"deepspeed", *TASK_SECTIONS} - {"rl"}
    kept = {key: value for key, value in config.model_dump(mode="json").items() if key not in others}
    for key in (*BOOKKEEPING, *OF_SERVERS):
        section: dict | None = kept
        *parents, name = key.split(".")
        for parent in parents:
            section = (section or {}).get(parent)
        if section:
            section.pop(name, None)
    whole = json.dumps([kept, base_identity(config), data_sha256], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


# Where completions come from, and how they are asked for and judged: that changes nothing in them.
OF_SERVERS = tuple(f"rl.engine.{key}" for key in ("urls", "model", "key_from", "in_flight", "timeout_s", "wait_s"))
OF_SERVERS += (
    "rl.engine.weights_dir",
    "rl.engine.keep_rounds",
    "train.micro_batch_size",
    "train.tokens_per_micro_batch",
)
OF_SERVERS += tuple(f"rl.reward.{key}" for key in ("processes", "timeout_s", "memory_gb", "max_failed"))
