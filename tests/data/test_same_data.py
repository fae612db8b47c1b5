"""Ranks that read other data than rank 0 end the run together, before the first step."""

import pytest

from ds_moe.data import position
from ds_moe.data.position import check_same_data
from ds_moe.errors import UserError


def test_ranks_that_read_different_data_are_refused(monkeypatch):
    def of_ranks(*others):
        monkeypatch.setattr(position, "over_ranks", lambda own: [own, *others])
        check_same_data({"data.train sha256": "abc", "data.train records": 9})

    of_ranks({"data.train sha256": "abc", "data.train records": 9})
    for other, says in (
        ({"data.train sha256": "abd", "data.train records": 9}, "data.train sha256 is 'abc' on rank 0 and 'abd' on"),
        ({"data.train sha256": "abc"}, "records is 9 on rank 0 and 'absent' on rank 1"),
        ({"data.train sha256": "abc", "data.train records": 9, "more": 1}, "more is 'absent' on rank 0 and 1 on rank"),
    ):
        with pytest.raises(UserError, match=says):
            of_ranks(other)
