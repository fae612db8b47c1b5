"""The check of `make rl-demo` sees whether an engine sampled from the weights that it is compared with."""

import base64
import json

import pytest
import torch

from ds_moe.models.presets import build_preset
from ds_moe.models.processor import tiny_processor
from ds_moe.tasks.rl.sample import generate_rollouts, open_prompts
from ds_moe.tasks.rl.write import write_rollouts
from tools.demos.rl import check


@pytest.fixture(scope="module")
def models():
    """A model, and one whose weights are a little different."""
    model, other = build_preset("tiny-vl-moe").eval(), build_preset("tiny-vl-moe").eval()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    return model, other, tiny_processor("vl")


def test_log_probs_tell_other_weights(models, tmp_path):
    model, other, processor = models
    records = generate_rollouts(model, processor, open_prompts("digits", 4, seed=1), per_prompt=2, max_new_tokens=4)
    write_rollouts(records, tmp_path / "rollouts.jsonl")
    read = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    own, others = (check.difference(one, processor, read, tmp_path) for one in (model, other))
    assert own < 1e-5 < 1e-2 < others


def test_greedy_answers_that_differ_are_counted(models):
    model, _, processor = models
    samples = check.probes()
    ours = generate_rollouts(model, processor, samples, per_prompt=1, temperature=0, max_new_tokens=check.NEW_TOKENS)
    answers = [record["tokens"][record["completion_mask"].index(1) :] for record in ours]
    assert check.greedy_check(model, processor, answers) == {
        "greedy_answers": len(samples),
        "greedy_equal": len(samples),
        "greedy_unlike": 0,
    }
    unlikely = answers[0][0] ^ 1
    wrong = [[unlikely, *answers[0][1:]], *answers[1:-1], answers[-1][:-1]]
    found = check.greedy_check(model, processor, wrong)
    assert found["greedy_equal"] == len(samples) - 2 and found["greedy_unlike"] >= 1
    assert check.greedy_check(model, processor, []) == {"greedy_answers": 0, "greedy_equal": 0, "greedy_unlike": 0}


def test_a_server_is_asked_for_the_same_questions_with_their_images():
    sample = check.probes()[0]
    body = check.request_of(sample)
    [message] = body["messages"]
    [image, text] = message["content"]
    assert text == {"type": "text", "text": sample.last_question()} and message["role"] == "user"
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == sample.images[0].data
    assert body["temperature"] == 0 and body["return_token_ids"] and json.loads(json.dumps(body)) == body
    assert check.name_of("42de53be95d2:16") == "step_00000016"
