"""vLLM's server, unmodified, as of 0.32.

Text is asked for by its ids, prompts with images as conversations, which come back with the ids that were made of them.
A request says every field of sampling: what it leaves out the server takes from the model's generation_config.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ds_moe.errors import UserError
from ds_moe.rollout.engine import Completion, Prompt, Sampling
from ds_moe.rollout.http import Http, Json, Malformed, Refused
from ds_moe.rollout.images import data_uri
from ds_moe.rollout.server_api import (
    CONTROL_S,
    SMALL,
    Wanted,
    check_logprobs,
    check_prompt,
    check_routing,
    entries,
    finished,
    token_ids,
)

ROUTING_FLAG = "--enable-return-routed-experts"
DEV_MODE = "VLLM_SERVER_DEV_MODE=1"
FULL_SOFTMAX: Json = {  # what a request says beside the temperature, so that nothing is cut off or changed
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "bad_words": [],
    "allowed_token_ids": None,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop": [],
    "stop_token_ids": [],
    "use_beam_search": False,
    "watermarking": False,
    "stream": False,
}


@dataclass(frozen=True)
class VllmApi:
    wanted: Wanted
    names: dict[str, str] = field(default_factory=dict)  # of the model, by url, once it has been asked for

    def check(self, http: Http) -> str:
        http.get("/health", CONTROL_S, SMALL)
        name, longest = self._model(http)
        settings = self._settings(http)
        wrong = list(self._wrong(settings, longest))
        if wrong:
            raise UserError("\n".join(f"{http.url}: {line}" for line in wrong))
        routed = "with routed experts" if _routes(settings) else "without routed experts"
        version = self.version(http)
        return f"{http.url}: vLLM serves {name} in {_dtype(settings)}, {routed}, {longest} tokens, weights {version!r}"

    def _model(self, http: Http) -> tuple[str, int]:
        """Name of the model, and how many tokens a prompt and its completion may have."""
        found = {str(one.get("id")): one for one in entries(http.get("/v1/models", CONTROL_S, SMALL), "data", http.url)}
        name = self.wanted.model
        if name is None and len(found) == 1:
            [name] = found
        if name not in found:
            asked = "several models" if name is None else f"no model {name!r}"
            raise UserError(f"{http.url} serves {asked}, but {', '.join(found) or 'none'} (set rl.engine.model)")
        self.names[http.url] = name
        longest = found[name].get("max_model_len")
        if type(longest) is not int:
            raise Malformed(f"{http.url}/v1/models: no max_model_len (is another program behind the url?)")
        return name, longest

    def _settings(self, http: Http) -> Json:
        try:
            info = http.get("/server_info?config_format=json", CONTROL_S, SMALL)
        except Refused as error:
            if error.status != 404:
                raise
            fix = f"start it with {DEV_MODE} in its environment"
            raise UserError(f"{http.url} has no endpoints for weights ({fix})") from error
        settings = info.get("vllm_config") if isinstance(info, dict) else None
        if not isinstance(settings, dict) or not isinstance(settings.get("model_config"), dict):
            raise Malformed(f"{http.url}/server_info: no settings (is it vLLM 0.32 or newer?)")
        return settings

    def _wrong(self, settings: Json, longest: int) -> Iterator[str]:
        """A line for each setting under which a run would train on wrong numbers, or stop later."""
        mode = _of(settings["model_config"], "logprobs_mode")
        if mode != "processed_logprobs":
            yield f"its log-probs are {mode}, not those of what was sampled (add --logprobs-mode processed_logprobs)"
        if self.wanted.routing and not _routes(settings):
            yield f"it returns no routed experts, which moe.replay needs (add {ROUTING_FLAG})"
        if problem := self.wanted.wrong_dtype(_dtype(settings)):
            yield problem
        if longest < self.wanted.longest:
            wanted = f"a prompt and its completion may have {self.wanted.longest} tokens"
            yield f"--max-model-len is {longest}, but {wanted} (start it with at least that many)"

    def sample(self, http: Http, prompt: Prompt, sampling: Sampling, seed: int, timeout_s: float) -> list[Completion]:
        name = self.names.get(http.url) or self._model(http)[0]
        path, body = request(prompt, sampling, seed, name)
        try:
            answer = http.post(path, body, timeout_s)
        except Refused as error:
            if "JSON compliant" in str(error):  # a NaN among the log-probs, which vLLM cannot write
                fix = "try another --dtype of the server"
                raise Malformed(f"{http.url}{path}: the server computes NaN: {error} ({fix})") from error
            raise
        return self.read(answer, prompt, sampling, f"{http.url}{path}")

    def read(self, answer: object, prompt: Prompt, sampling: Sampling, where: str) -> list[Completion]:
        """The completions in the answer to a request."""
        choices: dict[int, Json] = {}
        for choice in entries(answer, "choices", where):
            if type(index := choice.get("index")) is not int:
                raise Malformed(f"{where}: a completion has the number {index!r} (is another program behind the url?)")
            choices[index] = choice
        if choices.keys() != set(range(sampling.completions)):
            raise Malformed(f"{where}: {len(choices)} completions, where {sampling.completions} were asked for")
        chat = isinstance(answer, dict) and "prompt_token_ids" in answer
        completions = []
        for choice in map(choices.__getitem__, range(sampling.completions)):
            check_prompt(answer["prompt_token_ids"] if chat else choice.get("prompt_token_ids"), prompt, where)
            ids = token_ids(choice.get("token_ids"), "the ids of a completion", where)
            reason = finished(choice.get("finish_reason"), where)
            logprobs = check_logprobs(_logprobs(choice), ids, where, "is a proxy between trainer and server?")
            experts = choice.get("routed_experts")
            if self.wanted.routing:
                rows = len(prompt.token_ids) + len(ids) - 1
                experts = check_routing(experts, "vllm_http", rows, where, ROUTING_FLAG)
            completions.append(Completion(ids, logprobs, experts, "vllm_http", reason, ""))
        return completions

    def version(self, http: Http) -> str:
        answer = http.get("/weight_info", CONTROL_S, SMALL)
        if not isinstance(answer, dict) or not isinstance(answer.get("weight_version"), str):
            raise Malformed(f"{http.url}/weight_info: no version of the weights (is it vLLM 0.32 or newer?)")
        return answer["weight_version"]

    def pause(self, http: Http, timeout_s: float) -> None:
        http.post("/pause?mode=keep", None, timeout_s, SMALL)

    def load(self, http: Http, folder: Path, version: str, timeout_s: float) -> None:
        body: Json = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        http.post("/collective_rpc", body, timeout_s, SMALL)
        http.post("/update_weight_version", {"new_version": version}, CONTROL_S, SMALL)

    def resume(self, http: Http) -> None:
        http.post("/resume", None, CONTROL_S, SMALL)


def request(prompt: Prompt, sampling: Sampling, seed: int, model: str) -> tuple[str, Json]:
    """Path and body of the request for the completions of a prompt."""
    body: Json = {
        "model": model,
        "n": sampling.completions,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": seed,
        "return_token_ids": True,
        "routed_experts_prompt_start": 0,
        **FULL_SOFTMAX,
    }
    if not prompt.images:
        return "/v1/completions", {**body, "prompt": prompt.token_ids, "logprobs": 0, "echo": False}
    chat: Json = {"messages": with_images(prompt), "logprobs": True, "top_logprobs": 0}
    chat |= {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False}
    if prompt.tools:  # the template shows them; what the model writes stays text
        chat |= {"tools": prompt.tools, "tool_choice": "none"}
    return "/v1/chat/completions", {**body, **chat}


def with_images(prompt: Prompt) -> list[Json]:
    """The conversation in OpenAI's form, each image in its place."""
    images = iter(prompt.images)
    messages: list[Json] = []
    for message in prompt.messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                {"type": "image_url", "image_url": {"url": data_uri(next(images))}}
                if part.get("type") == "image"
                else part
                for part in content
            ]
            message = {**message, "content": parts}
        messages.append(message)
    return messages


def _logprobs(choice: Json) -> object:
    """Log-probs of a choice, in the form of either endpoint."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return None
    if isinstance(content := found.get("content"), list):
        return [one.get("logprob") if isinstance(one, dict) else None for one in content]
    return found.get("token_logprobs")


def _dtype(settings: Json) -> str:
    return str(_of(settings["model_config"], "dtype")).removeprefix("torch.")


def _routes(settings: Json) -> bool:
    return _of(settings.get("aux_output_config"), "enable_return_routed_experts") is True


def _of(section: object, key: str) -> object:
    return section.get(key) if isinstance(section, dict) else None
