"""sglang's forms, written down from the sources of 0.5.23: no server of it was run."""

import base64

import numpy as np
import pytest
from PIL import Image

from ds_moe.errors import UserError
from ds_moe.replay.traces import decode
from ds_moe.rollout.engine import Prompt, Sampling
from ds_moe.rollout.http import Malformed
from ds_moe.rollout.server_api import Wanted
from ds_moe.rollout.sglang import SglangApi, request

PROMPT = Prompt([5, 6, 7], [])
SAMPLING = Sampling(completions=2, max_new_tokens=2, temperature=0.7, seed=3)
API = SglangApi(Wanted(routing=True, longest=64))


def answer():
    """Of two completions of two tokens: rows of 2 layers x top-2, one for each input token but the last."""
    experts = np.arange(4 * 2 * 2, dtype="<i4") % 8
    about = {
        "id": "a",
        "finish_reason": {"type": "length", "length": 2},
        "prompt_tokens": 3,
        "weight_version": "run:1",
        "output_token_logprobs": [[-0.5, 11, None], [-1.25, 12, None]],
        "routed_experts": base64.b64encode(experts.tobytes()).decode(),
    }
    return [
        {"text": "x", "output_ids": [11, 12], "prompt_token_ids": [5, 6, 7], "meta_info": dict(about)} for _ in range(2)
    ]


class Recorded:
    """Answers of a server, by path; keeps what it was asked."""

    url = "http://127.0.0.1:30000"

    def __init__(self, **changed):
        settings = {"enable_return_routed_experts": True, "dtype": "auto", "context_length": None, "version": "0.5.23"}
        self.answers = {
            "/health": None,
            "/model_info": {"served_model_name": "policy", "weight_version": "default"},
            "/server_info": settings,
            "/generate": answer(),
            "/pause_generation": {"status": "ok"},
            "/update_weights_from_disk": {"success": True, "message": "Succeeded to update model weights."},
            "/update_weight_version": {"success": True, "new_version": "run:1"},
            "/continue_generation": {"status": "ok"},
        }
        for path, value in changed.items():
            self.answers[f"/{path}"] = value
        self.calls = []

    def get(self, path, timeout_s, most=0):
        return self.answers[path]

    def post(self, path, body, timeout_s, most=0):
        self.calls.append((path, body))
        return self.answers[path]


def test_completions_are_read_exactly():
    http = Recorded()
    one, two = API.sample(http, PROMPT, SAMPLING, 40, 60.0)
    assert one.token_ids == [11, 12] and one.logprobs == [-0.5, -1.25] and one.finish_reason == "length"
    trace = decode(one.routing, kind=one.routing_format, layers=2, top_k=2)
    assert trace.ids.shape == (4, 2, 2) and trace.ids[3].tolist() == [[4, 5], [6, 7]]
    assert two == one


def test_each_completion_has_a_seed_of_its_own():
    body = request(PROMPT, SAMPLING, 40, routing=True)
    assert body["input_ids"] == [[5, 6, 7]] * 2 and body["return_routed_experts"] is True
    assert [one["sampling_seed"] for one in body["sampling_params"]] == [40, 41]
    said = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_new_tokens": 2, "n": 1}
    assert said.items() <= body["sampling_params"][0].items()


def test_images_go_beside_the_ids():
    body = request(Prompt([5, 9, 7], [], [Image.new("RGB", (8, 8))]), SAMPLING, 0, routing=False)
    assert len(body["image_data"]) == 2 and body["image_data"][0][0].startswith("data:image/png;base64,")


def changed(**about):
    found = answer()
    found[0]["meta_info"] |= about
    return found


@pytest.mark.parametrize(
    "given, said",
    [
        (changed(routed_experts=None), "--enable-return-routed-experts"),
        (changed(routed_experts=base64.b64encode(bytes(4 * 15)).decode()), "no whole 4 rows"),
        (changed(output_token_logprobs=None), "0 log-probs of 2 tokens"),
        (changed(output_token_logprobs=[[-0.5, 11, None], [float("nan"), 12, None]]), "nan is no log-prob"),
        (changed(output_token_logprobs=[[-0.5, 11, None], [-1.0, 13, None]]), "of other tokens"),
        (changed(finish_reason={"type": "abort"}), "'abort'"),
        (answer()[:1], "1 completions, where 2"),
        ({"text": "one alone"}, "no list of completions"),
    ],
)
def test_answers_that_cannot_be_used(given, said):
    with pytest.raises(Malformed, match=said):
        API.read(given, PROMPT, SAMPLING, "url")


def test_other_ids_of_the_prompt_are_refused():
    with pytest.raises(UserError, match="3 token ids, where the trainer has 4; the first to differ is 3"):
        API.read(answer(), Prompt([5, 6, 7, 8], []), SAMPLING, "url")


def test_weights_are_loaded_before_they_are_named(tmp_path):
    http = Recorded()
    API.pause(http, 60.0)
    API.load(http, tmp_path, "run:1", 60.0)
    API.resume(http)
    paths = ["/pause_generation", "/update_weights_from_disk", "/update_weight_version", "/continue_generation"]
    assert [path for path, _ in http.calls] == paths
    assert http.calls[0][1] == {"mode": "retract"} and http.calls[1][1]["model_path"] == str(tmp_path)
    with pytest.raises(UserError, match="no weights"):
        API.load(Recorded(update_weights_from_disk={"success": False, "message": "no weights"}), tmp_path, "x", 60.0)


def test_settings():
    assert "sglang 0.5.23 serves policy" in API.check(Recorded())
    assert API.version(Recorded()) == "default"
    with pytest.raises(UserError) as raised:
        API.check(Recorded(server_info={"enable_return_routed_experts": False, "context_length": 32}))
    [routes, length] = str(raised.value).splitlines()
    assert "add --enable-return-routed-experts" in routes and "--context-length is 32" in length
    with pytest.raises(UserError, match="serves 'policy', not 'mine' .set rl.engine.model"):
        SglangApi(Wanted(True, 64, "mine")).check(Recorded())
