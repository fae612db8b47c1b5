"""Every EP size that is advised divides the ranks and the experts."""

import itertools

import pytest

from ds_moe.config.check import model_problems
from ds_moe.config.deepspeed import deepspeed_problems
from ds_moe.config.divisors import ep_size_problem, fitting_ep_sizes
from ds_moe.config.run_file import load_run
from ds_moe.doctor.plans import ep_sizes
from ds_moe.models.presets import preset_config

EXPERTS = [1, 2, 5, 7, 8, 9, 30, 128]
RANKS = [1, 2, 3, 5, 6, 8, 9, 12, 64]


@pytest.mark.parametrize(("ranks", "experts"), [*itertools.product(RANKS, EXPERTS)])
def test_all_that_fit_are_advised_and_no_other(ranks, experts):
    fits = [size for size in range(1, 200) if ranks % size == 0 and experts % size == 0]
    assert fitting_ep_sizes(ranks, experts) == fits
    config = preset_config("tiny-vl-moe")
    config.text_config.num_experts = experts
    assert ep_sizes(config, ranks) == fits
    advised = ", ".join(map(str, fits)) + (" do" if len(fits) > 1 else " does")
    for size in range(1, 13):
        of_ranks, of_experts = (ep_size_problem(size, ranks, experts, of=of) for of in ("ranks", "experts"))
        assert (of_ranks is None) == (ranks % size == 0) and (of_experts is None) == (experts % size == 0)
        assert of_ranks is None or f"the {ranks} ranks ({advised}, and the model's {experts} experts)" in of_ranks
        assert of_experts is None or f"model's {experts} experts ({advised}, and the {ranks} ranks)" in of_experts


def test_what_is_not_known_is_left_out():
    assert fitting_ep_sizes(6, None) == [1, 2, 3, 6]
    assert ep_size_problem(4, 6, None, of="ranks") == "moe.ep_size 4 does not divide the 6 ranks (1, 2, 3, 6 do)"
    assert ep_size_problem(4, 6, None, of="experts") is None
    assert ep_sizes(preset_config("tiny-vl-dense"), 6) == [1]


@pytest.mark.parametrize(
    ("ranks", "experts", "ep_size", "advised"),
    [(6, 8, 3, "1, 2 do"), (3, 9, 2, "1, 3 do"), (3, 8, 8, "1 does"), (9, 15, 2, "1, 3 do")],
)
def test_both_places_that_complain_advise_the_same(ranks, experts, ep_size, advised):
    config = load_run("tests/runs/resume.yaml", [f"moe.ep_size={ep_size}"])
    model = preset_config("tiny-vl-moe")
    model.text_config.num_experts = experts
    _, complaints = deepspeed_problems(config, ranks, True, None, experts)
    found = model_problems(config, model, ranks) + [line for line in complaints if "ep_size" in line]
    assert len(found) == (experts % ep_size > 0) + (ranks % ep_size > 0) > 0
    assert all(f"({advised}, and the " in line for line in found), found


def test_ranks_that_share_rows_divide_the_ranks():
    config = load_run("tests/runs/packed.yaml", ["data.eval=digits", "train.sequence_parallel=4"])
    _, complaints = deepspeed_problems(config, 6, True)
    expected = (
        "override train.sequence_parallel=4: train.sequence_parallel 4 does not divide the 6 ranks (1, 2, 3, 6 do)"
    )
    assert expected in complaints
    assert not any("sequence_parallel" in line for line in deepspeed_problems(config, 8, True)[1])
