"""What the rewards of a rollout file can teach: their spread, and the groups in which all are equal."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from statistics import fmean, pstdev

from ds_moe.tasks.rl.rollouts import Outcome

WARNED_SHARE = 0.5  # of groups with equal rewards


@dataclass(frozen=True)
class RewardSpread:
    """The rewards of all rollouts of a file."""

    rewards: list[float]  # those that are known
    groups: int  # whose rewards make advantages
    equal: int  # of these, groups of equal rewards: their advantages are 0
    lone: int  # of these, groups of one completion
    given: list[float]  # advantages that records bring with them

    @property
    def silent(self) -> str:
        """How many advantages of the file are 0, and why."""
        if self.groups:
            return f"{self.equal} of {self.groups} groups of data.train have equal rewards"
        return f"{self.given.count(0.0)} of {len(self.given)} records of data.train bring an advantage of 0"

    @property
    def fix(self) -> str:
        if not self.groups:
            return "write other advantages, or 'reward' and 'group' in their place"
        if self.equal and self.lone == self.equal:
            return "sample several completions of each prompt, and give them one 'group'"
        return "sample more completions of a prompt, or give a reward that tells them apart"

    def lines(self) -> list[str]:
        """For the opening summary; the last one begins with "warning" where little can be learned."""
        found: list[str] = []
        if self.groups:
            low, high = min(self.rewards), max(self.rewards)
            found.append(
                f"rewards   mean {fmean(self.rewards):.3g}, std {pstdev(self.rewards):.3g}, {low:.3g} to {high:.3g} "
                f"over {len(self.rewards)} rollouts; equal in {self.equal} of {self.groups} groups "
                f"({self.equal / self.groups:.0%})"
            )
        if self.given:
            found.append(
                f"advantages of {len(self.given)} rollouts are their records' own, {self.given.count(0.0)} of them 0"
            )
        if self.groups and self.equal >= WARNED_SHARE * self.groups:
            found.append(f"warning: a group of equal rewards has advantages of 0, and teaches nothing: {self.fix}")
        return found


def reward_spread(remembered: Sequence[object]) -> RewardSpread:
    """Of the `Outcome` that was remembered of every rollout."""
    outcomes = [one for one in remembered if isinstance(one, Outcome)]
    of_group: dict[str, list[float]] = defaultdict(list)
    for one in outcomes:
        if not isnan(one.reward):
            of_group[one.group].append(one.reward)
    earning = {one.group for one in outcomes if isnan(one.advantage)}
    equal = [group for group in earning if len(set(of_group[group])) == 1]
    return RewardSpread(
        rewards=[reward for rewards in of_group.values() for reward in rewards],
        groups=len(earning),
        equal=len(equal),
        lone=sum(len(of_group[group]) == 1 for group in equal),
        given=[one.advantage for one in outcomes if not isnan(one.advantage)],
    )
