"""What is said of a rollout file's rewards: real values, any scale and sign, groups that teach nothing."""

import math

import pytest

from ds_moe.tasks.registry import TASKS
from ds_moe.tasks.rl.rewards import reward_spread
from ds_moe.tasks.rl.rollouts import Outcome, _advantages

GROUPS = {"a": [1.0, 0.0, 0.0, 1.0], "b": [1.0, 1.0, 1.0], "c": [0.5], "d": [0.25, 0.75]}


def remembered(groups, transform=lambda reward: reward):
    return [
        Outcome(transform(reward), group, math.nan, routed=True)
        for group, rewards in groups.items()
        for reward in rewards
    ]


def test_the_spread_of_a_file():
    [told, warned] = reward_spread(remembered(GROUPS)).lines()
    # 6.5 / 10; squares: 5 x 1 + .25 + .0625 + .5625, of which .65 squared is taken
    deviation = math.sqrt((5 + 0.25 + 0.0625 + 0.5625) / 10 - 0.65**2)
    assert told == f"rewards   mean 0.65, std {deviation:.3g}, 0 to 1 over 10 rollouts; equal in 2 of 4 groups (50%)"
    assert warned.startswith("warning: a group of equal rewards has advantages of 0") and "more completions" in warned
    assert TASKS["rl"].records_summary(remembered(GROUPS)) == [told, warned]
    assert TASKS["sft"].records_summary([None, None]) == []


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize(
    "transform",
    [lambda r: 1000 * r, lambda r: 1e-3 * r, lambda r: -r, lambda r: r - 5, lambda r: -300 * r - 0.1, lambda r: r / 3],
    ids=["large", "small", "negative", "shifted", "both", "thirds"],
)
def test_groups_of_equal_rewards_are_those_without_an_advantage_on_any_scale(transform, std):
    outcomes = remembered(GROUPS, transform)
    spread = reward_spread(outcomes)
    silent = {one.group for one, advantage in zip(outcomes, _advantages(outcomes, std), strict=True) if advantage == 0}
    assert silent == {"b", "c"} and (spread.groups, spread.equal, spread.lone) == (4, 2, 1)
    least, most = sorted(map(transform, (0.0, 1.0)))
    assert f"{least:.3g} to {most:.3g}" in spread.lines()[0]


def test_one_group_only():
    [told] = reward_spread(remembered({"a": [-2.0, 4.0]})).lines()
    assert told == "rewards   mean 1, std 3, -2 to 4 over 2 rollouts; equal in 0 of 1 groups (0%)"
    told, warned = reward_spread(remembered({"a": [-2.0, -2.0]})).lines()
    assert "std 0, -2 to -2" in told and "equal in 1 of 1 groups (100%)" in told and "another" not in warned


def test_prompts_of_one_completion_each_need_more_of_them():
    alone = reward_spread(remembered({"a": [1.0], "b": [0.0], "c": [0.3]}))
    assert alone.fix == "sample several completions of each prompt, and give them one 'group'"
    assert alone.lines()[-1].endswith(alone.fix)
    mixed = reward_spread(remembered({"a": [1.0], "b": [0.0, 0.0]}))
    assert mixed.fix == "sample more completions of a prompt, or give a reward that tells them apart"


def test_few_equal_groups_are_told_and_not_warned_of():
    lines = reward_spread(remembered({"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 1.0]})).lines()
    assert len(lines) == 1 and "equal in 1 of 3 groups (33%)" in lines[0]


def test_advantages_of_the_records_own_are_no_group():
    given = [Outcome(math.nan, "here:1", 0.0, False), Outcome(1.0, "a", -2.0, False), Outcome(1.0, "a", 0.0, False)]
    assert reward_spread(given).silent == "2 of 3 records of data.train bring an advantage of 0"
    assert "'reward' and 'group'" in reward_spread(given).fix
    assert reward_spread(given).lines() == ["advantages of 3 rollouts are their records' own, 2 of them 0"]
    both = reward_spread([*given, *remembered({"a": [0.0], "b": [1.0, 1.0]})])
    # In group a one advantage is made from the rewards 1, 1 and 0.
    assert (both.groups, both.equal) == (2, 1) and len(both.lines()) == 3
