"""One round of rollouts: prompts are asked, completions are scored, and a file of them is written. Rank 0 alone."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ds_moe.checkpoint.files import sha256_of
from ds_moe.config.rollout import EngineConfig
from ds_moe.config.run import RunConfig
from ds_moe.data.processor import Processor
from ds_moe.data.special_tokens import text_of
from ds_moe.errors import UserError
from ds_moe.rollout.engine import Completion, RolloutEngine, Sampling
from ds_moe.rollout.reward import Candidate, RewardPool, Scored, Waiting
from ds_moe.tasks.rl.online.prompts import Asked, Prompts
from ds_moe.tasks.rl.online.round_file import (
    RoundFacts,
    finish_round,
    finished_round,
    forget_rounds,
    no_room_for_round,
    remove_rounds,
    round_file,
)
from ds_moe.tasks.rl.write import Record, write_rollouts

LEAST = 2  # completions of a prompt, whose rewards can be compared
ASKED_AGAIN = 3  # times that a round with less than half of its prompts is filled up
SEEDS = 1 << 12  # of one round


class RunEnded(Exception):
    """The run ends while a round is sampled."""


@dataclass
class Group:
    """The completions of a prompt that can be trained on, with what they are worth."""

    asked: Asked
    completions: list[Completion] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing can be learned of it: its rewards are equal."""
        return len({score.reward for score in self.scores}) < LEAST


class RoundMaker:
    """Makes the rounds of a run. Its methods are called from one thread.

    Args:
        run: identity of the run, with which versions of weights begin.
        stopping: whether the run has ended meanwhile.

    Attributes:
        trained: version of weights -> rounds that they were trained for, of those that the engine was given.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: EngineConfig,
        prompts: Prompts,
        processor: Processor,
        engine: RolloutEngine,
        rewards: RewardPool,
        run: str,
        stopping: Callable[[], bool],
    ) -> None:
        self._config, self._settings, self._prompts, self._processor = config, settings, prompts, processor
        self._engine, self._rewards, self._stopping = engine, rewards, stopping
        self._run = f"{run} {rewards.digest}".strip()  # a round that other functions have judged is another one
        self._vocabulary = len(processor.tokenizer)  # a model's is often padded, and engines sample from all of it
        self.trained: dict[str, int] = {}
        self.version, self.step = "", 0  # of the weights that the engine has

    def round(self, number: int, begin: int) -> RoundFacts:
        """The round whose first prompt is at `begin`: as an earlier process has finished it, or sampled now.

        Raises what `RolloutEngine.sample` and `RewardPool.collect` raise, and `UserError` where the disk has no room.
        """
        file = round_file(self._config.train.output_dir, number)
        if (found := finished_round(file)) is not None and self._is_of_now(found, begin):
            return found
        forget_rounds(self._config.train.output_dir, number)
        if problem := no_room_for_round(self._config.train.output_dir):  # before anything is sampled in vain
            raise UserError(f"round {number} of rollouts: {self._config.at('train.output_dir')}: {problem}")
        self._seconds, self._counts = Counter[str](), Counter[str]()
        groups, end = self._groups(number, begin)
        records = [record for group in groups for record in self._records(group)]
        write_rollouts(records, file)
        facts = RoundFacts(
            number,
            self._run,
            begin,
            end,
            self.version,
            self.step,
            len(records),
            sha256_of(file),
            self._figures(groups, number),
        )
        finish_round(file, facts)
        if self._settings.keep_rounds is not None:  # rounds up to `lag` before this one are still trained on
            remove_rounds(self._config.train.output_dir, number - self._settings.lag - self._settings.keep_rounds - 1)
        return facts

    def _is_of_now(self, found: RoundFacts, begin: int) -> bool:
        """Whether a round that is there is the one that would be sampled now, by weights that are not too old."""
        same = found.run == self._run and found.begin == begin
        return same and (found.step == self.step or (self._settings.lag > 0 and found.step < self.step))

    def _groups(self, number: int, begin: int) -> tuple[list[Group], int]:
        """The groups of a round, in the order of their prompts, and the position behind the last prompt."""
        wanted, position, tries = self._settings.prompts, begin, 0
        groups: list[Group] = []
        aside: list[Group] = []  # of equal rewards, exchanged for others
        while len(groups) < wanted:
            asked, position = self._prompts.take(position, wanted - len(groups))
            found = self._sampled(asked, number, number * SEEDS + tries)
            exchanges, tries = tries < self._settings.resample, tries + 1
            aside += [group for group in found if exchanges and group.equal]
            groups += [group for group in found if not (exchanges and group.equal)]
            if not exchanges and (
                2 * (len(groups) + len(aside)) >= wanted or tries > self._settings.resample + ASKED_AGAIN
            ):
                break
        taken_back = aside[: wanted - len(groups)]
        self._counts["exchanged"] = len(aside) - len(taken_back)
        groups += taken_back
        if not groups:
            lost = ", ".join(f"{count} {what}" for what, count in self._counts.items() if count)
            raise UserError(f"round {number} of rollouts: not one prompt has {LEAST} completions to compare ({lost})")
        return sorted(groups, key=lambda group: group.asked.position), position

    def _sampled(self, asked: list[Asked], number: int, seed: int) -> list[Group]:
        """What is left of the completions of some prompts."""
        settings, began = self._settings, time.perf_counter()
        groups = [Group(one) for one in asked]

        def deliver(index: int, completions: list[Completion]) -> None:
            self._take(groups[index], completions, number)

        def pulse() -> None:
            if self._stopping():
                raise RunEnded

        sampling = Sampling(
            completions=settings.completions,
            max_new_tokens=settings.max_new_tokens,
            temperature=self._config.rl.temperature,
            seed=(self._config.train.seed * (1 << 20) + seed) % 2**31,
            forbidden=forbidden_tokens(self._processor),
        )
        self._engine.sample([one.prompt for one in asked], sampling, deliver, pulse)
        sampled = time.perf_counter()
        self._score(groups, pulse)
        self._seconds["sample"] += sampled - began
        self._seconds["score"] += time.perf_counter() - sampled
        return [group for group in groups if len(group.completions) >= LEAST]

    def _take(self, group: Group, completions: Sequence[Completion], number: int) -> None:
        """Keep the completions of weights that are known and not too old, and let rewards begin."""
        self._counts["lost"] += self._settings.completions - len(completions)
        for one in completions:
            trained = self.trained.get(one.version)
            if one.finish_reason == "abort" or not one.token_ids or max(one.token_ids) >= self._vocabulary:
                self._counts["lost"] += 1
            elif trained is None or number - trained > self._settings.lag:
                self._counts["too old"] += 1
            else:
                group.completions.append(one)
                group.waiting.append(self._rewards.submit(self._case(group.asked, one)))

    def _case(self, asked: Asked, completion: Completion) -> Candidate:
        text = text_of(completion.token_ids, self._processor, self._config.data.content_tokens)
        record = {"messages": asked.prompt.messages, "kind": asked.sample.kind, "where": asked.sample.where}
        return Candidate(text, asked.answer, record, len(completion.token_ids), asked.sample.where)

    def _score(self, groups: list[Group], pulse: Callable[[], None]) -> None:
        scores = iter(self._rewards.collect([one for group in groups for one in group.waiting], pulse))
        for group in groups:
            both = [(one, next(scores)) for one in group.completions]
            group.completions = [one for one, score in both if score is not None]
            group.scores = [score for _, score in both if score is not None]
            self._counts["without reward"] += len(both) - len(group.scores)

    def _records(self, group: Group) -> list[Record]:
        asked = group.asked
        records = []
        for one, score in zip(group.completions, group.scores, strict=True):
            record: Record = {
                "tokens": asked.prompt.token_ids + one.token_ids,
                "completion_mask": [0] * len(asked.prompt.token_ids) + [1] * len(one.token_ids),
                "logprobs": [min(value, 0.0) for value in one.logprobs],
                "completion": text_of(one.token_ids, self._processor, self._config.data.content_tokens),
                "reward": score.reward,
                "reward_parts": score.parts,
                "group": f"{asked.position} {asked.sample.where}",
                "answer": asked.answer,
                "images": asked.sample.images,
                "version": one.version,
            }
            if one.routing is not None:
                record |= {"routing": one.routing, "routing_format": one.routing_format}
            records.append(record | ({"kind": asked.sample.kind} if asked.sample.kind else {}))
        return records

    def _figures(self, groups: list[Group], number: int) -> dict[str, float]:
        completions = [one for group in groups for one in group.completions]
        scores = [score for group in groups for score in group.scores]
        parts = sorted({name for score in scores for name in score.parts})
        return {
            "round_reward": fmean(score.reward for score in scores),
            **{f"reward_{name}": fmean(score.parts.get(name, 0.0) for score in scores) for name in parts},
            "lag": fmean(number - self.trained[one.version] for one in completions),
            "truncated": fmean(one.finish_reason == "length" for one in completions),
            "completion_tokens": fmean(len(one.token_ids) for one in completions),
            "dropped_completions": float(
                self._counts["lost"] + self._counts["too old"] + self._counts["without reward"]
            ),
            "too_old": float(self._counts["too old"]),
            "without_reward": float(self._counts["without reward"]),
            "exchanged_prompts": float(self._counts["exchanged"]),
            "sample_s": self._seconds["sample"],
            "score_s": self._seconds["score"],
        }


def forbidden_tokens(processor: Processor) -> tuple[int, ...]:
    """Tokens that stand for pixels, which no completion can bring."""
    named = (processor.image_token_id, getattr(processor, "video_token_id", None))
    return tuple(token for token in named if token is not None)
