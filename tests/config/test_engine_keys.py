import pytest
from pydantic import ValidationError

from ds_moe.config.rollout import EngineConfig


def test_urls_lose_a_slash_at_their_end():
    assert EngineConfig(urls=["http://127.0.0.1:8000/", "https://gpu-3/vllm"]).urls == [
        "http://127.0.0.1:8000",
        "https://gpu-3/vllm",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:0",
        "http://host:99999",
        "http://host?x=1",
        "http://ho st",
        "http://host/v1",
        "http://[::1",
        "http://10.0.0..7:8000",
        "http://.:80",
        f"http://{'a' * 64}.com",
        "http://host\x00",
        "",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(url):
    with pytest.raises(ValidationError, match="write http://HOST:PORT"):
        EngineConfig(urls=[url])


def test_a_password_is_not_repeated():
    with pytest.raises(ValidationError) as raised:
        EngineConfig(urls=["http://me:secret@host"])
    [error] = raised.value.errors(include_input=False)
    assert "secret" not in error["msg"] and "name or password" in error["msg"]


def test_a_server_is_listed_once():
    with pytest.raises(ValidationError, match="twice"):
        EngineConfig(urls=["http://host:1", "http://host:1/"])


@pytest.mark.parametrize("key, value", [("in_flight", 0), ("timeout_s", 0.0), ("wait_s", -1.0), ("kind", "hf")])
def test_ranges(key, value):
    with pytest.raises(ValidationError):
        EngineConfig(**{key: value})
