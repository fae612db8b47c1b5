"""Image processors that resize with PIL against transformers' own with torchvision: other pixels by rounding alone.

What those made is kept beside this file; where torchvision is installed, they make it anew.
"""

from importlib.util import find_spec

import pytest
import torch

from tests.models.image_cases import CASES, by_ours, by_transformers, stored

# Of 255. Both round between their two passes. Pillow 13 resizes the height first where that is cheaper, up to 12 and
# torchvision always last: with Pillow 12.3 it would be 2.
LEVELS = 5


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_with_torchvision_but_for_rounding(name):
    expected, found = stored()[name], by_ours(CASES[name])
    assert found.keys() == expected.keys()
    for of, value in expected.items():
        assert found[of].shape == value.shape, of
        apart = (found[of].int() - value.int()).abs()
        if of.startswith("pixel_values"):
            assert apart.max() <= LEVELS, of
        else:
            assert apart.max() == 0, of


@pytest.mark.skipif(find_spec("torchvision") is None, reason="these processors of transformers need torchvision")
@pytest.mark.parametrize("name", CASES)
def test_the_kept_values_are_what_they_make_today(name):
    made = by_transformers(CASES[name])
    assert made.keys() == stored()[name].keys()
    assert all(torch.equal(value, stored()[name][of]) for of, value in made.items())
