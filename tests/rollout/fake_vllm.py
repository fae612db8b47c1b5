"""A server on loopback that speaks vLLM's forms and can be told to misbehave.

    with FakeVllm() as fake:
        fake.fail("500", 2)          # the next two requests for completions
        ...
        fake.die(); fake.start()     # restarted: with the weights that it had at first, and version "default"
        assert fake.calls[-1].path == "/resume"

It samples nothing: `answer` makes the completions, by default ids and experts that depend on prompt, seed and weights.
"""

import base64
import hashlib
import io
import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

FAULTS = (
    "500",  # an error that may pass
    "400",  # one that does not
    "slow",  # no answer for `slow_s` seconds
    "hang_up",  # the connection is closed without an answer
    "cut_body",  # it ends in the middle of the answer
    "no_json",
    "null_routes",
    "cut_routes",  # an array of fewer rows
    "no_logprobs",
    "nan",  # what vLLM answers where a log-prob is NaN: HTTP 400
    "nan_logprob",  # what a proxy may make of it
    "abort",  # finish_reason
    "few",  # one completion less than asked for
    "other_prompt",  # ids of another template
    "die",  # the server ends with every connection to it
)
NAN = {"error": {"message": "Out of range float values are not JSON compliant", "type": "BadRequestError", "code": 400}}


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Made:
    """One completion of `answer`: ids, log-probs, and experts (prompt + completion - 1, layers, top_k)."""

    token_ids: list[int]
    logprobs: list[float]
    experts: np.ndarray


Answer = Callable[[list[int], dict[str, Any], int, "FakeVllm"], Made]  # of ids of the prompt, the request, a number


class FakeVllm:
    def __init__(
        self,
        answer: Answer | None = None,
        encode: Callable[[list[dict[str, Any]], list[Image.Image]], list[int]] | None = None,
        *,
        layers: int = 2,
        experts: int = 8,
        top_k: int = 2,
        vocabulary: int = 300,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            answer: makes a completion; None: of ids below `vocabulary`.
            encode: token ids of a conversation (its images as {"type": "image"}) and its images.
            settings: what `/server_info` says otherwise than a server that is right for reinforcement with replay:
                dotted keys of vllm_config, and "max_model_len", "model", "dev_mode" (False: no endpoints for weights).
        """
        self.answer, self.encode = answer or made_up, encode
        self.layers, self.experts, self.top_k, self.vocabulary = layers, experts, top_k, vocabulary
        self.settings = {"max_model_len": 512, "model": "policy", "dev_mode": True, **(settings or {})}
        self.calls: list[Call] = []
        self.slow_s = 3.0
        self.delay_s = 0.0  # of every request for completions
        self.held_until: Callable[[], object] = lambda: True  # no completions are answered before this is true
        self.failing_reloads = 0  # so many of the next ones answer 500
        self.dying_reloads = 0  # at so many of the next ones the server ends
        self.wrong_reloads = 0  # so many of the next ones answer 200 and load nothing
        self.poisoned: dict[int, str] = {}  # fault of every request whose prompt begins with an id; text alone
        self.served: list[tuple[str, bool]] = []  # faults that requests met, and whether they were greedy ones
        self._faults: deque[tuple[str, bool | None]] = deque()
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._down = threading.Event()
        self.port = 0
        self._forget()

    def _forget(self) -> None:
        self.folder, self.version = "at the start", "default"
        self.paused = False
        self.most_at_once = self._at_once = 0

    # --- what tests tell it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, fault: str, times: int = 1, greedy: bool | None = None) -> None:
        """Let the next requests for completions fail so: those at temperature 0 (greedy), the others, or any (None)."""
        assert fault in FAULTS, fault
        with self._lock:
            self._faults.extend([(fault, greedy)] * times)

    @property
    def open_faults(self) -> list[str]:
        """Those that no request has met yet."""
        return [fault for fault, _ in self._faults]

    def start(self) -> "FakeVllm":
        """Listen: at first on a port that is free, after `die` on the same."""
        self._forget()
        self._connections: set[socket.socket] = set()
        self._http = _Listener(("127.0.0.1", self.port), _handler_of(self))
        self.port = self._http.server_address[1]
        self._down.clear()
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def die(self) -> None:
        """Close the port and every connection."""
        http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.server_close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._down.set()

    def start_after_death(self, pause_s: float) -> None:
        """Start again as soon as it has died, now or later, and been away for `pause_s` seconds."""

        def start() -> None:
            self._down.wait()
            time.sleep(pause_s)
            self.start()

        threading.Thread(target=start, daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._http is not None

    def asked(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path.split("?")[0] == path]

    def __enter__(self) -> "FakeVllm":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.die()

    # --- answers

    def _get(self, path: str) -> tuple[int, object]:
        if path == "/health":
            return 200, None
        if path == "/v1/models":
            longest = self.settings["max_model_len"]
            return 200, {"object": "list", "data": [{"id": self.settings["model"], "max_model_len": longest}]}
        if self.settings["dev_mode"]:
            if path == "/server_info?config_format=json":
                return 200, {"vllm_config": self._config(), "vllm_env": {}, "system_env": {}}
            if path == "/weight_info":
                return 200, {"weight_version": self.version}
            if path == "/is_paused":
                return 200, {"is_paused": self.paused}
        return 404, {"detail": "Not Found"}

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model_config": {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"},
            "aux_output_config": {"enable_return_routed_experts": True},
        }
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            if name:
                config[section][name] = value
        return config

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        if path in ("/v1/completions", "/v1/chat/completions"):
            return self._complete(path, body)
        if not self.settings["dev_mode"]:
            return 404, {"detail": "Not Found"}
        if path == "/pause?mode=keep":
            self.paused = True
            return 200, {"status": "paused"}
        if path == "/resume":
            self.paused = False
            return 200, {"status": "resumed"}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if path == "/collective_rpc" and body.get("method") == "reload_weights":
            assert self.paused, "weights were loaded while requests are computed"
            if self.dying_reloads:
                self.dying_reloads -= 1
                threading.Thread(target=self.die).start()
                raise ConnectionAbortedError
            if self.failing_reloads:
                self.failing_reloads -= 1
                return 500, {"error": {"message": "no such folder", "type": "InternalServerError", "code": 500}}
            if self.wrong_reloads:
                self.wrong_reloads -= 1
            else:
                self.folder = body["kwargs"]["weights_path"]
            return 200, {"results": [None]}
        return 404, {"detail": "Not Found"}

    def _complete(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        with self._lock:
            fault = self._fault_of(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self._completed(path, body, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _fault_of(self, body: dict[str, Any]) -> str | None:
        greedy = body.get("temperature") == 0
        entry = next((one for one in self._faults if one[1] in (None, greedy)), None)
        if entry is not None:
            self._faults.remove(entry)
        fault = entry[0] if entry else self.poisoned.get(body.get("prompt", [None])[0])
        if fault is not None:
            self.served.append((fault, greedy))
        return fault

    def _completed(self, path: str, body: dict[str, Any], fault: str | None) -> tuple[int, object]:
        if fault == "die":
            self.die()  # before the connection ends: whoever sees that finds no server
        if fault in ("hang_up", "die"):
            raise ConnectionAbortedError
        if fault in ("500", "400"):
            return int(fault), {"error": {"message": f"the server says {fault}", "type": "Error", "code": int(fault)}}
        if fault == "nan":
            return 400, NAN
        time.sleep(self.slow_s if fault == "slow" else self.delay_s)
        while self.alive and (self.paused or not self.held_until()):
            time.sleep(0.01)
        chat = "messages" in body
        prompt = self._prompt_of(body["messages"]) if chat else body["prompt"]
        if body["model"] != self.settings["model"]:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        if len(prompt) >= self.settings["max_model_len"]:
            return 400, {"error": {"message": "prompt is longer than the maximum model length", "code": 400}}
        made = [self.answer(prompt, body, number, self) for number in range(body["n"])]
        choices = [self._choice(one, number, body, chat, prompt, fault) for number, one in enumerate(made)]
        if fault == "few":
            choices = choices[1:]
        answer: dict[str, Any] = {"id": "x", "model": body["model"], "choices": choices, "usage": {}}
        if chat:
            answer["prompt_token_ids"] = changed(prompt) if fault == "other_prompt" else prompt
        return 200, _Broken(fault, answer) if fault in ("cut_body", "no_json") else answer

    def _choice(
        self, one: Made, number: int, body: dict[str, Any], chat: bool, prompt: list[int], fault: str | None
    ) -> dict[str, Any]:
        rows = one.experts[:-1] if fault == "cut_routes" else one.experts
        routed = self._config()["aux_output_config"]["enable_return_routed_experts"] and fault != "null_routes"
        logprobs = [math.nan] * len(one.logprobs) if fault == "nan_logprob" else one.logprobs
        short = len(one.token_ids) == body["max_tokens"]
        choice: dict[str, Any] = {
            "index": number,
            "finish_reason": "abort" if fault == "abort" else "length" if short else "stop",
            "token_ids": one.token_ids if body.get("return_token_ids") else None,
            "routed_experts": npy(rows) if routed else None,
        }
        if fault == "no_logprobs":
            return {**choice, "logprobs": None, "prompt_token_ids": prompt}
        if chat:
            content = [{"token": f"t{one}", "logprob": value, "top_logprobs": []} for value in logprobs]
            return {**choice, "message": {"role": "assistant", "content": "text"}, "logprobs": {"content": content}}
        return {
            **choice,
            "text": "text",
            "prompt_token_ids": changed(prompt) if fault == "other_prompt" else prompt,
            "logprobs": {"token_logprobs": logprobs, "tokens": [], "top_logprobs": [], "text_offset": []},
        }

    def _prompt_of(self, messages: list[dict[str, Any]]) -> list[int]:
        assert self.encode is not None, "FakeVllm(encode=...) makes the ids of conversations"
        images, plain = [], []
        for message in messages:
            parts = message["content"]
            if isinstance(parts, list):
                found = [image_of(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
                images += found
                parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            plain.append({**message, "content": parts})
        return self.encode(plain, images)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        pass  # a connection that ended: what tests do to it


@dataclass(frozen=True)
class _Broken:
    fault: str
    answer: dict[str, Any]


def _handler_of(fake: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            super().setup()
            with fake._lock:
                fake._connections.add(self.connection)

        def finish(self) -> None:
            with fake._lock:
                fake._connections.discard(self.connection)
            super().finish()

        def do_GET(self) -> None:
            fake.calls.append(Call("GET", self.path, {}))
            self._reply(*fake._get(self.path))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            fake.calls.append(Call("POST", self.path, body))
            self._reply(*fake._post(self.path, body))

        def _reply(self, status: int, answer: object) -> None:
            broken = answer if isinstance(answer, _Broken) else None
            data = b"" if answer is None else json.dumps(broken.answer if broken else answer).encode()
            if broken and broken.fault == "no_json":
                data = b"<html>busy</html>"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if broken and broken.fault == "cut_body" else data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def made_up(prompt: list[int], body: dict[str, Any], number: int, fake: FakeVllm) -> Made:
    """Ids, log-probs and experts that depend on prompt, seed, number and the folder that is loaded."""
    seed = None if body["temperature"] == 0 else (body["seed"], number)
    digest = hashlib.sha256(repr((prompt, seed, fake.folder)).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    ids = rng.integers(0, fake.vocabulary, body["max_tokens"]).tolist()
    rows = len(prompt) + len(ids) - 1
    routes = rng.random((rows, fake.layers, fake.experts)).argsort(-1)[..., : fake.top_k].astype(np.uint8)
    return Made(ids, (-rng.random(len(ids)) - 0.01).tolist(), routes)


def npy(array: np.ndarray) -> str:
    """As vLLM sends routed experts: base64 of the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def image_of(url: str) -> Image.Image:
    assert url.startswith("data:image/png;base64,"), url[:40]
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


def changed(ids: list[int]) -> list[int]:
    return [*ids[:-1], ids[-1] + 1]
