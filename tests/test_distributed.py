"""ds_moe/distributed.py: what ranks say together."""

import pytest

from ds_moe import distributed
from ds_moe.errors import UserError


def test_what_several_ranks_say_is_said_once(monkeypatch):
    monkeypatch.setattr(distributed, "over_ranks", lambda error: [error, None, "b is missing", error])
    with pytest.raises(UserError) as raised:
        distributed.raise_together("a cannot be written")
    assert str(raised.value) == "a cannot be written; b is missing"
