"""Sizes of memory on a command line."""

from argparse import ArgumentTypeError

import pytest

from ds_moe.config.sizes import gib


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(
            (text, 80.0)
            for text in ("80", "80.0", "80GB", "80gb", "80G", "80 GB", "80GiB", "80gib", "81920MB", "81920M")
        ),
        *((text, 0.5) for text in ("0.5", ".5", "512MiB", "0.5g")),
        ("1.5TB", 1536.0),
        ("2T", 2048.0),
    ],
)
def test_a_size_is_read_in_gib(text, size):
    assert gib(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-80", "nan", "inf", "9" * 400, "GB", "80XB", "80GBs", "80 80", "8O", "1,5GB", "80iB", "80B"],
)
def test_what_is_no_size_is_said_in_one_line(text):
    with pytest.raises(ArgumentTypeError) as raised:
        gib(text)
    assert str(raised.value) == f"{text} is no size of memory; write it as 80GB, 80GiB, 81920MB or 80 (GiB)"
