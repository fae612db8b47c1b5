"""The keys of `rl.engine`, the servers that sample the completions of a run, and of `rl.reward`, which judges them."""

import re
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
    timeout_s: float = Field(
        default=600.0, gt=0
    )  # of one request; a server that is slower loses it to another, local ends the run
    wait_s: float = Field(default=900.0, ge=0)  # while no server answers, before the run ends with a checkpoint
    prompts: int = Field(default=128, gt=0)  # of a round, each a record of data.train
    completions: int = Field(default=8, gt=1)  # of each prompt; their rewards are compared with each other
    max_new_tokens: int = Field(default=1024, gt=0)  # of a completion
    lag: int = Field(default=0, ge=0)  # rounds that sampling may be ahead of training
    resample: int = Field(default=0, ge=0)  # how often prompts of equal rewards are exchanged for others in a round
    keep_rounds: int | None = Field(default=None, gt=0)  # whose files stay, of those that were trained on; default: all
    weights_dir: str | None = Field(default=None, min_length=1)  # handed over in it; default: weights of output_dir
    weights_dtype: Literal["fp32", "bf16"] | None = None  # of these weights; default: train.precision

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
    try:
        parts.hostname.encode("idna")  # as the look-up of a name does it
    except UnicodeError:
        return f"{url!r} has no name of a host"
    if parts.username is not None or parts.password is not None:
        return f"the url of {parts.hostname} contains a name or password"  # which the message must not repeat
    if parts.query or parts.fragment or any(not character.isprintable() or character.isspace() for character in url):
        return f"{url!r} is more than the address of a server"
    if parts.path.endswith("/v1"):
        return f"{url!r} ends with /v1, which the client adds"
    return None


OVERLONG = "overlong"  # the name of the penalty for length among the parts of a reward
BUILT_IN_REWARDS = ("exact", "contains")
FUNCTION = re.compile(
    r"(?P<file>.+\.py):(?P<of_file>[^\W\d]\w*)|(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<of_module>[^\W\d]\w*)"
)


class RewardFunction(Section):
    """One of several rewards, whose weighted sum is the reward of a completion."""

    function: str  # exact, contains, "file.py:name" or "package.module:name"
    weight: float = 1.0
    name: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")  # in curves; default: the function's

    @field_validator("function")
    @classmethod
    def _is_a_function(cls, function: str) -> str:
        return _checked_function(function)

    @property
    def curve(self) -> str:
        """The name under which it is reported."""
        return self.name or self.function.rpartition(":")[2]


class RewardConfig(Section):
    """What a sampled completion is worth. Functions of the user run in processes of their own, beside the trainer."""

    function: str = "exact"  # exact, contains, "file.py:name" (beside the run file or below the working directory) or
    # "package.module:name"; called as name(completion, answer, record)
    functions: list[RewardFunction] = []  # instead, where there are several
    timeout_s: float = Field(
        default=10.0, gt=0, le=86_400
    )  # of one call; a slower one is killed, its completion dropped
    processes: int = Field(default=2, gt=0, le=256)  # in which functions are called at the same time
    memory_gb: float = Field(
        default=8.0, gt=0
    )  # GiB of data of each of these processes, whose calls then raise MemoryError
    max_failed: float = Field(default=0.5, ge=0, lt=1)  # share of recent completions; when more fail, the run ends
    overlong_buffer: int | None = Field(default=None, gt=0)  # the last tokens before max_new_tokens, which cost reward
    overlong_penalty: float = Field(default=1.0, gt=0)  # at max_new_tokens; it grows linearly within the buffer

    @field_validator("function")
    @classmethod
    def _is_a_function(cls, function: str) -> str:
        return _checked_function(function)

    @property
    def all(self) -> list[RewardFunction]:
        """Every reward, whether it was written as the only one or as one of several."""
        return self.functions or [RewardFunction(function=self.function)]

    @property
    def own_functions(self) -> list[RewardFunction]:
        """Those that are no built-in ones, and so run in processes of their own."""
        return [one for one in self.all if one.function not in BUILT_IN_REWARDS]


def _checked_function(function: str) -> str:
    if function not in BUILT_IN_REWARDS and not FUNCTION.fullmatch(function):
        forms = f'{", ".join(BUILT_IN_REWARDS)}, "file.py:name" or "package.module:name"'
        raise PydanticCustomError("reward", "{text}", {"text": f"must be one of {forms}"})
    return function
