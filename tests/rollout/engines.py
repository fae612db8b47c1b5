"""Engines, prompts and a collector of completions for the tests of the client."""

import pytest

from ds_moe.config.rollout import EngineConfig
from ds_moe.rollout.engine import Completion, Prompt, Sampling
from ds_moe.rollout.servers import Servers

SAMPLING = Sampling(completions=2, max_new_tokens=5, temperature=1.0, seed=3)


def prompts(count: int) -> list[Prompt]:
    return [Prompt([10 + number, 5, 6, 7], [], where=f"prompts.jsonl:{number + 1}") for number in range(count)]


def engine(*fakes, note=None, routing=True, longest=64, dtype=None, **keys) -> Servers:
    keys = {"timeout_s": 5.0, "wait_s": 5.0, "in_flight": 4, **keys}
    config = EngineConfig(urls=[fake.url for fake in fakes], **keys)
    return Servers(config, routing=routing, longest=longest, dtype=dtype, note=note or (lambda line: None))


class Collected(dict[int, list[Completion]]):
    """What `deliver` was given; a prompt that comes twice is an error."""

    def __call__(self, number: int, completions: list[Completion]) -> None:
        assert number not in self, f"prompt {number} is delivered twice"
        self[number] = completions


def sample(servers: Servers, count: int, sampling: Sampling = SAMPLING) -> Collected:
    found = Collected()
    servers.sample(prompts(count), sampling, found)
    assert found.keys() == set(range(count))
    return found


def greedy(servers: Servers, prompt: Prompt, max_new_tokens: int) -> list[Completion]:
    """The most likely answer of each server, in the order of their urls; whatever it is, it is taken for right."""
    found: dict[str, Completion] = {}

    def problem(server, completions):
        [found[server]] = completions

    servers.prove([prompt], max_new_tokens, problem)
    return [found[server.url] for server in servers._servers if server.url in found]


def raises(kind, text):
    return pytest.raises(kind, match=text)
