"""Answers that a real vLLM 0.32 gave, read by the client: `recorded/vllm.json`, cut to what concerns it."""

import json
from pathlib import Path

import pytest

from ds_moe.errors import UserError
from ds_moe.replay.traces import decode
from ds_moe.rollout.engine import Prompt, Sampling
from ds_moe.rollout.http import words_of
from ds_moe.rollout.server_api import Wanted
from ds_moe.rollout.vllm import VllmApi

RECORDED = json.loads((Path(__file__).parent / "recorded" / "vllm.json").read_text())
API = VllmApi(Wanted(routing=True, longest=512))
SAMPLING = Sampling(completions=2, max_new_tokens=3, temperature=1.0, seed=5)
URL = "http://127.0.0.1:8000"


def answer(what):
    return RECORDED[what]["answer"]


def prompt_of(what):
    found = answer(what)
    return Prompt(found.get("prompt_token_ids") or found["choices"][0]["prompt_token_ids"], [])


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_completions(endpoint):
    prompt = prompt_of(endpoint)
    made = API.read(answer(endpoint), prompt, SAMPLING, URL)
    assert len(made) == 2 and made[0].token_ids != made[1].token_ids
    for one, choice in zip(made, answer(endpoint)["choices"], strict=True):
        assert (
            one.token_ids == choice["token_ids"] and one.finish_reason == "length" and one.routing_format == "vllm_http"
        )
        assert len(one.logprobs) == 3 and all(value <= 0 for value in one.logprobs)
        assert len(decode(one.routing, kind="vllm_http").ids) == len(prompt.token_ids) + 2


def test_another_prompt_is_refused():
    ids = prompt_of("/v1/chat/completions").token_ids
    with pytest.raises(UserError, match=f"{len(ids)} token ids, where the trainer has {len(ids) + 1}"):
        API.read(answer("/v1/chat/completions"), Prompt([*ids, 1], []), SAMPLING, URL)


class Answering:
    url = URL

    def get(self, path, timeout_s, most=0):
        return None if path == "/health" else answer(path.split("?")[0])


def test_settings():
    assert API.check(Answering()) == (
        f"{URL}: vLLM serves policy in bfloat16, with routed experts, 512 tokens, weights 'seed 1'"
    )
    with pytest.raises(UserError, match="--max-model-len is 512, but a prompt and its completion may have 513"):
        VllmApi(Wanted(routing=True, longest=513)).check(Answering())


@pytest.mark.parametrize(
    "what, status, said",
    [
        ("outside the vocabulary", 400, "Token id 99999 is out of vocabulary"),
        ("too long", 400, "This model's maximum context length is 512 tokens"),
        ("another model", 404, "The model `other` does not exist"),
        ("an unknown endpoint", 404, "Not Found"),
    ],
)
def test_the_server_s_own_words(what, status, said):
    assert RECORDED[what]["status"] == status and words_of(answer(what)).startswith(said)
