"""sglang's server, unmodified, as of 0.5.23; read from its sources, never run against one.

Every completion is an entry of a batch with a seed of its own: those that sglang makes of one entry share it.
"""

from dataclasses import dataclass
from pathlib import Path

from ds_moe.errors import UserError
from ds_moe.rollout.engine import Completion, Prompt, Sampling
from ds_moe.rollout.http import Http, Json, Malformed
from ds_moe.rollout.images import data_uri
from ds_moe.rollout.server_api import (
    CONTROL_S,
    SMALL,
    Wanted,
    check_logprobs,
    check_prompt,
    check_routing,
    finished,
    token_ids,
)

ROUTING_FLAG = "--enable-return-routed-experts"
FULL_SOFTMAX: Json = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "stop": [],
    "stop_token_ids": [],
    "n": 1,
}


@dataclass(frozen=True)
class SglangApi:
    wanted: Wanted

    def check(self, http: Http) -> str:
        http.get("/health", CONTROL_S, SMALL)
        about = _object(http.get("/model_info", CONTROL_S, SMALL), http.url + "/model_info")
        settings = _object(http.get("/server_info", CONTROL_S, SMALL), http.url + "/server_info")
        name, wanted = about.get("served_model_name", about.get("model_path")), self.wanted
        wrong = []
        if wanted.model is not None and name != wanted.model:
            wrong.append(f"serves {name!r}, not {wanted.model!r} (set rl.engine.model)")
        if wanted.routing and settings.get("enable_return_routed_experts") is not True:
            wrong.append(f"it returns no routed experts, which moe.replay needs (add {ROUTING_FLAG})")
        if problem := wanted.wrong_dtype(settings.get("dtype")):  # "auto" makes float16 of float32
            wrong.append(problem)
        longest = settings.get("context_length")  # None: what the model's config says
        if type(longest) is int and longest < wanted.longest:
            text = f"a prompt and its completion may have {wanted.longest} tokens"
            wrong.append(f"--context-length is {longest}, but {text} (start it with at least that many)")
        if wrong:
            raise UserError("\n".join(f"{http.url}: {line}" for line in wrong))
        dtype, version = settings.get("dtype"), about.get("weight_version")
        return f"{http.url}: sglang {settings.get('version')} serves {name} in dtype {dtype}, weights {version!r}"

    def sample(self, http: Http, prompt: Prompt, sampling: Sampling, seed: int, timeout_s: float) -> list[Completion]:
        answer = http.post("/generate", request(prompt, sampling, seed, self.wanted.routing), timeout_s)
        return self.read(answer, prompt, sampling, f"{http.url}/generate")

    def read(self, answer: object, prompt: Prompt, sampling: Sampling, where: str) -> list[Completion]:
        """The completions in the answer to a request."""
        if not isinstance(answer, list) or len(answer) != sampling.completions:
            found = len(answer) if isinstance(answer, list) else "no list of"
            raise Malformed(f"{where}: {found} completions, where {sampling.completions} were asked for")
        completions = []
        for one in answer:
            one = _object(one, where)
            about = _object(one.get("meta_info"), where)
            check_prompt(one.get("prompt_token_ids"), prompt, where)
            ids = token_ids(one.get("output_ids"), "the ids of a completion", where)
            reason = about.get("finish_reason")
            reason = finished(reason.get("type") if isinstance(reason, dict) else reason, where)
            pairs = about.get("output_token_logprobs")
            pairs = [pair for pair in pairs if isinstance(pair, list) and pair] if isinstance(pairs, list) else []
            logprobs = check_logprobs([pair[0] for pair in pairs], ids, where, "is a router in between?")
            if [pair[1] if len(pair) > 1 else None for pair in pairs] != ids:
                raise Malformed(f"{where}: log-probs of other tokens than those of the completion")
            experts = about.get("routed_experts")
            if self.wanted.routing:
                rows = len(prompt.token_ids) + len(ids) - 1
                experts = check_routing(experts, "sglang", rows, where, ROUTING_FLAG)
            completions.append(Completion(ids, logprobs, experts, "sglang", reason, ""))
        return completions

    def version(self, http: Http) -> str:
        version = _object(http.get("/model_info", CONTROL_S, SMALL), http.url + "/model_info").get("weight_version")
        if not isinstance(version, str):
            raise Malformed(f"{http.url}/model_info: no version of the weights (is it sglang 0.5.23 or newer?)")
        return version

    def pause(self, http: Http, timeout_s: float) -> None:
        """What is in flight goes back to the queue, and is computed anew from its beginning by the new weights."""
        http.post("/pause_generation", {"mode": "retract"}, timeout_s, SMALL)

    def load(self, http: Http, folder: Path, version: str, timeout_s: float) -> None:
        """The cache is flushed with the load, which fails where that does. The version is named last: a request that
        fails in between leaves the old one on the server."""
        body: Json = {"model_path": str(folder), "flush_cache": True, "abort_all_requests": False}
        answer = _object(http.post("/update_weights_from_disk", body, timeout_s, SMALL), http.url)
        if answer.get("success") is not True:
            raise UserError(f"{http.url}/update_weights_from_disk: {answer.get('message')}")
        http.post("/update_weight_version", {"new_version": version, "abort_all_requests": False}, CONTROL_S, SMALL)

    def resume(self, http: Http) -> None:
        http.post("/continue_generation", {}, CONTROL_S, SMALL)


def request(prompt: Prompt, sampling: Sampling, seed: int, routing: bool) -> Json:
    """Body of the request for the completions of a prompt. sglang finds the images' places in the ids."""
    count = sampling.completions
    how = {"temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens, **FULL_SOFTMAX}
    body: Json = {
        "input_ids": [prompt.token_ids] * count,
        "sampling_params": [{**how, "sampling_seed": seed + number} for number in range(count)],
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "return_prompt_token_ids": True,
        "return_routed_experts": routing,
        "routed_experts_start_len": 0,
        "stream": False,
    }
    if prompt.images:
        body["image_data"] = [[data_uri(image) for image in prompt.images]] * count
    return body


def _object(value: object, where: str) -> Json:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: {type(value).__name__} where an object is expected (is it sglang?)")
    return value
