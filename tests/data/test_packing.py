"""Which samples lie in which packed row: a pure function of sizes, order and ranks."""

import time
from itertools import product

import numpy as np
import pytest

from ds_moe.data.order import FILLER, EpochOrder
from ds_moe.data.packing import PackedRows, plan_rows


def sizes(samples, most, seed=0):
    """Tokens as skewed as those of screenshots, and patches of every other sample."""
    draw = np.random.default_rng(seed)
    tokens_N = np.clip(draw.lognormal(np.log(most / 10), 0.9, samples).astype(np.int64) + 1, 1, most)
    patches_N = np.where(draw.random(samples) < 0.5, 4 * (tokens_N * draw.random(samples)).astype(np.int64), 0)
    return tokens_N, patches_N


def packed(records, global_batch_size, world_size, capacity=512, seed=0, cost=0.1, bad=()):
    tokens_N, patches_N = sizes(records, capacity)
    tokens_N[list(bad)] = 0
    order = EpochOrder(tokens_N, global_batch_size, seed, shuffle=True, length_grouping=True)
    return PackedRows(order, tokens_N, patches_N, cost, capacity, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_of_a_step_lies_in_one_row_that_holds_it(world_size):
    plan = packed(100, 37, world_size, bad=(5, 6))
    for step in range(2 * plan.order.steps_per_epoch):
        rows = plan.of_step(step)
        drawn = sorted(index for index in plan.order.global_batch(step) if index not in (FILLER, 5, 6))
        assert sorted(index for micro_step in rows for row in micro_step for index in row if index >= 0) == drawn
        assert all(len(micro_step) == world_size for micro_step in rows)
        used = [[sum(plan.tokens[row]) for row in micro_step if row != [FILLER]] for micro_step in rows]
        assert max(map(max, used)) <= plan.capacity
        least = -(-int(plan.tokens[drawn].sum()) // (plan.capacity * world_size))
        assert len(rows) in (least, least + 1) and all(used)  # no micro-step in which nobody has anything
        assert all(row for micro_step in rows for row in micro_step)


def test_the_same_samples_make_a_step_on_any_number_of_ranks_and_only_ranks_change_the_rows():
    def of(plan, step):
        return sorted(index for micro_step in plan.of_step(step) for row in micro_step for index in row if index >= 0)

    one = [of(packed(100, 37, 1), step) for step in range(6)]
    for world_size in (2, 3, 5, 16):
        assert [of(packed(100, 37, world_size), step) for step in range(6)] == one
    assert [of(packed(100, 37, 1, seed=1), step) for step in range(6)] != one
    assert packed(100, 37, 3).of_step(4) == packed(100, 37, 3).of_step(4) != packed(100, 37, 3, seed=1).of_step(4)


def test_as_few_micro_steps_as_hold_the_samples():
    """Balancing alone would leave these sizes one row more: the longest three then have a row each, and 4 + 4 + 4 + 2
    go nowhere."""
    tokens_N = np.array([7, 6, 6, 4, 4, 3])
    assert len(plan_rows(tokens_N, tokens_N.astype(float), capacity=10, world_size=3)) == 1
    tight_N = np.array([6, 6, 5, 5, 4, 4])  # 30 of 30
    rows = plan_rows(tight_N, np.array([1.0, 2, 3, 4, 5, 6]), capacity=10, world_size=3)
    assert [sorted(tight_N[row].sum() for row in micro_step) for micro_step in rows] == [[10, 10, 10]]
    assert len(plan_rows(np.array([6, 6, 6]), np.ones(3), capacity=10, world_size=2)) == 2  # 18 of 20, but none is cut


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_a_rank_with_nothing_gets_a_filler_and_micro_steps_stay_as_many_on_every_rank(samples):
    plan = packed(100, 8, 8, bad=range(samples, 100))
    rows = (
        plan.of_step(0)
        if samples == 0
        else next(rows for rows in map(plan.of_step, range(13)) if any(row != [FILLER] for row in rows[0]))
    )
    assert len(rows) == 1 and len(rows[0]) == 8 and [FILLER] in rows[0]


def test_rows_are_balanced_by_patches_too():
    tokens_N = np.full(16, 100)
    patches_N = np.array([400, 0, 0, 0] * 4)

    def of_ranks(cost):
        [micro_step] = plan_rows(tokens_N, tokens_N + cost * patches_N, capacity=1000, world_size=4)
        return [int(patches_N[row].sum()) for row in micro_step]

    assert of_ranks(0.5) == [400] * 4
    assert sorted(of_ranks(0.0)) == [0, 0, 0, 1600]


def test_few_tokens_wait_for_the_slowest_rank():
    for world_size, capacity in product((2, 8, 64), (1024, 4096)):
        tokens_N, patches_N = sizes(world_size * 60, 1024, seed=world_size)
        order = EpochOrder(tokens_N, len(tokens_N), 0, shuffle=True, length_grouping=True)
        plan = PackedRows(order, tokens_N, patches_N, 0.0, capacity, world_size)
        fill = plan.fill(plan.of_step(0))
        assert fill.tokens == tokens_N.sum() and fill.critical_share > 0.95
        assert fill.share == tokens_N.sum() / (capacity * world_size * fill.micro_steps) > 0.5


def test_a_step_of_512_ranks_is_laid_out_at_once():
    tokens_N, patches_N = sizes(25_000, 1350)
    for capacity in (4096, int(tokens_N.sum() / 1024 * 1.004)):  # the second leaves next to no room
        began = time.process_time()
        rows = plan_rows(tokens_N, tokens_N + 0.1 * patches_N, capacity, 512)
        assert time.process_time() - began < 2  # far less on an idle machine; here others may run
        assert sum(len(row) for micro_step in rows for row in micro_step) == 25_000
