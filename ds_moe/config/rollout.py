"""The keys of `rl.engine`: the servers that sample the completions of a run."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ds_moe.config.sections import Section


class EngineConfig(Section):
    """Where completions come from: unmodified servers of vLLM or sglang, or a model of this machine (local)."""

    kind: Literal["vllm", "sglang", "local"] = "vllm"
    urls: list[str] = []  # of the servers, such as http://127.0.0.1:8000; all of them serve the same model
    model: str | None = Field(default=None, min_length=1)  # the name that the servers give it; default: their only one
    key_from: str | None = Field(default=None, min_length=1)  # environment variable with the servers' API key
    in_flight: int = Field(default=64, gt=0)  # requests that a server answers at a time
    timeout_s: float = Field(default=600.0, gt=0)  # of one request; a slower answer is asked of another server
    wait_s: float = Field(default=900.0, ge=0)  # while no server answers, before the run ends with a checkpoint

    @field_validator("urls")
    @classmethod
    def _urls_are_addresses(cls, urls: list[str]) -> list[str]:
        tidy = [url.rstrip("/") for url in urls]
        for url in tidy:
            if problem := _url_problem(url):
                raise PydanticCustomError("url", "{text}", {"text": f"{problem} (write http://HOST:PORT)"})
        if twice := [url for url in tidy if tidy.count(url) > 1]:
            raise PydanticCustomError("url", "{text}", {"text": f"{twice[0]} stands there twice (remove one)"})
        return tidy


def _url_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{url!r} is no url: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"{url!r} is no url of a server"
    if parts.username is not None or parts.password is not None:
        return f"the url of {parts.hostname} contains a name or password"  # which the message must not repeat
    if parts.query or parts.fragment or any(character.isspace() for character in url):
        return f"{url!r} is more than the address of a server"
    if parts.path.endswith("/v1"):
        return f"{url!r} ends with /v1, which the client adds"
    return None
