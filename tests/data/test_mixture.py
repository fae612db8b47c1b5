"""Mixtures meet their shares exactly, at every point of an epoch and over epochs."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import DataConfig
from ds_moe.data.position import position_problems
from ds_moe.data.record_kind import SourceFacts
from ds_moe.data.sources.mixture import Mixture, mixed, mixture_of, whole_numbers
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from tests.data.sources import lines, records


class Sizes:
    """Records of sources of these sizes."""

    def __init__(self, *sizes):
        self.sources = tuple(SourceFacts(str(size), size, "") for size in sizes)

    def __len__(self):
        return sum(one.records for one in self.sources)


def quotas(sizes, sources, **mixture):
    data = DataConfig(train=[{"path": str(number), **one} for number, one in enumerate(sources)], mixture=mixture)
    found = mixture_of(data, Sizes(*sizes))
    return found and found.quotas


def source_of(order, sizes):
    return np.searchsorted(np.cumsum(sizes), order, side="right")


@pytest.mark.parametrize("seed", range(8))
def test_every_beginning_of_an_epoch_has_the_shares_to_within_the_bound(seed):
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 7))
    mixture = Mixture(tuple(draw.integers(1, 60, count).tolist()), tuple(draw.integers(1, 90, count).tolist()))
    share_S = np.array(mixture.quotas) / mixture.records
    bound_S = 0.5 + share_S * (count - 2) / 2
    for epoch in range(3):
        source_N = source_of(mixed(mixture, seed, epoch, True), mixture.sizes)
        taken_NS = np.cumsum(source_N[:, None] == np.arange(count), axis=0)
        off_NS = np.abs(taken_NS - np.arange(1, mixture.records + 1)[:, None] * share_S)
        assert (off_NS <= bound_S + 1e-9).all() and tuple(taken_NS[-1]) == mixture.quotas


@pytest.mark.parametrize("shuffle", [True, False])
def test_passes_go_on_over_epochs_and_each_pass_has_another_order(shuffle):
    mixture = Mixture((7, 20), (10, 3))
    drawn = np.concatenate([mixed(mixture, 5, epoch, shuffle) for epoch in range(14)])
    first = drawn[drawn < 7]
    for start in range(0, len(first), 7):
        assert sorted(first[start : start + 7]) == list(range(7))
    orders = {tuple(first[start : start + 7]) for start in range(0, 140, 7)}
    assert len(orders) > 15 if shuffle else orders == {tuple(range(7))}
    seen = Counter(drawn[drawn >= 7].tolist())
    assert set(seen.values()) == {2, 3} and len(seen) == 20  # 42 of 20: each twice, two of them once more


def test_a_source_that_is_added_leaves_the_orders_of_the_others():
    two, three = mixed(Mixture((9, 9), (9, 9)), 1, 0, True), mixed(Mixture((9, 9, 4), (9, 9, 4)), 1, 0, True)
    assert [one for one in three if one < 18 and one < 9] == [one for one in two if one < 9]
    assert [one for one in three if 9 <= one < 18] == [one for one in two if one >= 9]


def test_shares_become_whole_numbers():
    assert quotas([30, 70], [{}, {}]) == (30, 70)
    assert quotas([30, 70], [{"weight": 1}, {"weight": 3}]) == (25, 75)
    assert quotas([30, 70], [{"weight": 1}, {}]) == (50, 50)
    assert quotas([30, 70], [{"weight": 1}, {"weight": 1}], epoch="shortest") == (30, 30)
    assert quotas([30, 70], [{"weight": 1}, {"weight": 1}], epoch="longest") == (70, 70)
    assert quotas([30, 70], [{"epochs": 2}, {"epochs": 0.5}]) == (60, 35) and quotas([30, 70], [{"epochs": 2}, {}]) == (
        60,
        70,
    )
    assert quotas([100, 900], [{}, {}], temperature=2) == (250, 750) and quotas(
        [100, 900], [{}, {}], temperature=1
    ) == (100, 900)
    assert quotas([30], [{}]) is None and quotas([30], [{"epochs": 2}]) == (60,)
    assert whole_numbers(10, [Fraction(1, 3)] * 3) == [4, 3, 3]
    with pytest.raises(UserError, match="an epoch would have 30,000,000,030 records, of which at most 2,147,483,648"):
        quotas([30, 30], [{"weight": 1}, {"weight": 1e-9}], epoch="longest")
    with pytest.raises(UserError, match="an epoch of 31 records has none of '0'"):
        quotas([1, 30], [{"weight": 0.001}, {"weight": 1}])


@pytest.fixture
def config(folder, run_config):
    (folder / "a.jsonl").write_bytes(lines(records(9, "a")))
    (folder / "b.jsonl").write_bytes(lines(records(30, "b")))

    def build(*sources, **data) -> RunConfig:
        train = [{"path": str(folder / f"{name}.jsonl"), **shares} for name, shares in sources]
        return run_config("x", {"train": train, "max_length": 128, **data}, micro_batch_size=1, global_batch_size=6)

    return build


def stream(config, processor):
    return TrainStream(config, processor, rank=0, world_size=1)


def test_a_steps_samples_have_the_shares_and_are_told_apart_by_source(config, text_processor):
    found = stream(config(("a", {"weight": 1}), ("b", {"weight": 2})), text_processor)
    assert found.kinds == ("a", "b") and found.steps_per_epoch == 7  # 39 records
    for step, _ in zip(found, range(6), strict=False):
        assert sorted(int(batch.kind_B) for batch in step) == [0, 0, 1, 1, 1, 1]


def test_a_resume_with_other_sources_or_shares_is_refused_by_name(config, text_processor, folder):
    shares = ("a", {"weight": 1}), ("b", {"weight": 2})
    state = stream(config(*shares), text_processor).state_dict()
    same = stream(config(*shares), text_processor)
    same.load_state_dict(state)

    def refusal(*sources, **data):
        with pytest.raises(UserError) as caught:
            stream(config(*sources, **data), text_processor).load_state_dict(state)
        return str(caught.value)

    assert "records of each source in an epoch was '13, 26' in the checkpoint and is '20, 19' now" in refusal(
        ("a", {}), ("b", {"weight": 1})
    )
    assert "data.train.0 sha256 was" in refusal(("b", {"name": "x", "weight": 1}), ("b", {"weight": 2}))
    assert "data.train.1 sha256 was" in refusal(("a", {})) and "is 'absent' now" in refusal(("a", {}))
    (folder / "b.jsonl").write_bytes(lines(records(31, "b")))
    changed = refusal(*shares)
    assert "data.train.1 sha256 was" in changed and "data.train.0" not in changed and "data.train sha256" not in changed
    assert position_problems(state, {key: value for key, value in state.items() if "sha256" not in key}) == []
