"""The client against a fake server: what it asks, how it retries, hands weights over, and what it refuses."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ds_moe.errors import UserError
from ds_moe.replay.traces import decode
from ds_moe.rollout import requests as requests_module
from ds_moe.rollout import server as server_module
from ds_moe.rollout.engine import EnginesGone, Prompt, Sampling
from tests.rollout.engines import SAMPLING, Collected, engine, greedy, prompts, sample
from tests.rollout.fake_vllm import made_up

FOLDER = Path("/weights/v1")


pytestmark = pytest.mark.usefixtures("impatient")


def body_of(fake, number=0):
    return fake.asked("/v1/completions")[number].body


# --- what is asked and read


def test_completions_are_what_the_server_made(fake):
    servers = engine(fake)
    assert servers.check()[0].startswith(f"{fake.url}: vLLM serves policy in float32, with routed experts")
    servers.publish(FOLDER, "run:1")
    for number, made in sample(servers, 3).items():
        prompt = prompts(3)[number].token_ids
        [body] = [call.body for call in fake.asked("/v1/completions") if call.body["prompt"] == prompt]
        for place, one in enumerate(made):
            expected = made_up(prompt, body, place, fake)
            assert one.token_ids == expected.token_ids and one.logprobs == expected.logprobs
            assert np.array_equal(decode(one.routing, kind=one.routing_format).ids, expected.experts)
            assert (one.finish_reason, one.version) == ("length", "run:1")


def test_every_field_of_sampling_is_sent(fake):
    """What a request leaves out a server takes from the folder's generation_config.json."""
    sample(engine(fake), 2, Sampling(2, 5, 0.7, 3))
    body, other = body_of(fake, 0), body_of(fake, 1)
    said = {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "n": 2}
    said |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 5, "min_tokens": 0, "logit_bias": None}
    said |= {"logprobs": 0, "return_token_ids": True, "ignore_eos": False, "stop": [], "watermarking": False}
    assert said.items() <= body.items()
    assert body["seed"] != other["seed"]


def test_seeds_belong_to_prompts(fake, other):
    """However the prompts are spread over servers, the same are sampled."""

    def ids(*servers):
        return {n: [c.token_ids for c in found] for n, found in sample(engine(*servers), 6).items()}

    one = ids(fake)
    for _ in range(20):  # on a busy machine the first server may have answered all before the other is asked
        assert ids(fake, other) == one
        if other.asked("/v1/completions"):
            break
    assert other.asked("/v1/completions")
    again = sample(engine(fake), 6, Sampling(2, 5, 1.0, seed=4))
    assert again[0][0].token_ids != one[0][0]


def test_images_go_as_conversations(fake):
    from PIL import Image

    image = Image.new("RGB", (16, 16), (1, 2, 3))
    seen = []

    def encode(messages, images):
        seen.append((messages, [one.getpixel((0, 0)) for one in images]))
        return [7, 8, 9]

    fake.encode = encode
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    found = Collected()
    engine(fake).sample([Prompt([7, 8, 9], messages, [image])], SAMPLING, found)
    assert seen == [(messages, [(1, 2, 3)])] and len(found[0]) == 2
    [call] = fake.asked("/v1/chat/completions")
    assert {"logprobs": True, "top_logprobs": 0, "temperature": 1.0, "top_k": -1}.items() <= call.body.items()


def test_completions_with_forbidden_ids_are_left_out(fake):
    everything = sample(engine(fake), 4)
    unwanted = everything[2][1].token_ids[3]
    kept = sample(engine(fake), 4, Sampling(2, 5, 1.0, 3, forbidden=(unwanted,)))
    for number, made in everything.items():
        assert kept[number] == [one for one in made if unwanted not in one.token_ids]
    assert len(kept[2]) < 2


def test_no_more_requests_than_in_flight(fake):
    fake.delay_s, fake.held_until = 0.02, lambda: fake.most_at_once >= 3
    sample(engine(fake, in_flight=3), 12)
    assert fake.most_at_once == 3


# --- faults


@pytest.mark.parametrize(
    "fault",
    "500 hang_up cut_body no_json null_routes cut_routes no_logprobs nan nan_logprob abort few".split(),
)
def test_what_may_pass_is_asked_again(fake, fault):
    right = sample(engine(fake), 3)
    fake.fail(fault, 2)
    assert sample(engine(fake), 3) == right


def test_a_slow_answer_is_asked_of_another_server(fake, other):
    right = sample(engine(fake), 2)
    fake.slow_s = 60.0
    fake.fail("slow")
    began = time.monotonic()
    assert sample(engine(fake, other, timeout_s=1.0), 2) == right
    assert time.monotonic() - began < fake.slow_s


@pytest.mark.parametrize(
    "fault, said",
    [
        ("null_routes", "--enable-return-routed-experts"),
        ("no_logprobs", "no log-probs of 5 tokens"),
        ("nan", "NaN.*--dtype"),
        ("nan_logprob", "is no log-prob.*--dtype"),
        ("cut_routes", "7 tokens, where 8 were routed"),
        ("500", "the server says 500"),
    ],
)
def test_what_does_not_pass_ends_in_one_line(fake, fault, said):
    fake.fail(fault, 100)
    with pytest.raises(UserError, match=said) as raised:
        sample(engine(fake), 1)
    assert "\n" not in str(raised.value) and len(fake.asked("/v1/completions")) == requests_module.TRIES


@pytest.mark.parametrize("fault, said", [("400", "HTTP 400: the server says 400"), ("other_prompt", "prompts.jsonl:1")])
def test_a_wrong_request_ends_at_once(fake, fault, said):
    fake.fail(fault)
    with pytest.raises(UserError, match=said):
        sample(engine(fake), 1)
    assert len(fake.asked("/v1/completions")) == 1


def test_one_prompt_that_no_server_answers_is_left_out(fake):
    notes = []

    def answer(prompt, body, number, fake):
        if prompt[0] == 11:
            raise ConnectionAbortedError
        return made_up(prompt, body, number, fake)

    fake.answer = answer
    found = sample(engine(fake, note=notes.append), 4)
    assert [len(found[number]) for number in range(4)] == [2, 0, 2, 2]
    assert any("prompts.jsonl:2 is given up" in line for line in notes)


def test_routes_are_not_missed_where_nobody_replays(fake):
    fake.fail("null_routes", 100)
    assert sample(engine(fake, routing=False), 1)[0][0].routing is None


def test_a_server_that_dies_is_done_without(fake, other):
    servers, notes = engine(fake, other, note=lambda line: notes.append(line)), []
    servers.publish(FOLDER, "run:1")
    right = sample(servers, 6)
    other.delay_s = 0.5  # longer than it takes to see that the first is gone
    fake.fail("die")
    assert sample(servers, 6) == right
    assert any(fake.url in line and "1 other servers go on" in line for line in notes)


def test_a_restarted_server_gets_the_weights_before_it_is_asked(fake):
    """Killed in the middle of a round, and back with the weights of its start."""
    servers, notes = engine(fake, note=lambda line: notes.append(line)), []
    servers.check()
    servers.publish(FOLDER, "run:1")
    right = sample(servers, 6)
    fake.fail("die")
    fake.start_after_death(0.3)
    assert sample(servers, 6) == right
    assert (fake.folder, fake.version) == (str(FOLDER), "run:1") and any("is back" in line for line in notes)


def test_a_server_that_comes_back_and_loads_wrongly_is_left_out(fake, other, monkeypatch):
    """Its reload answers 200, its greedy answers are others than those that the run has accepted."""
    monkeypatch.setattr(server_module, "IDLE_S", 0.05)
    servers, notes = engine(fake, other, note=lambda line: notes.append(line)), []
    servers.publish(FOLDER, "run:1")
    accepted = made_up(prompts(1)[0].token_ids, {"temperature": 0, "max_tokens": 8}, 0, fake)

    def problem(server, found):
        return None if found[0].logprobs == accepted.logprobs else f"{server} computes otherwise"

    servers.prove(prompts(1), 8, problem)
    right = sample(engine(other), 4)
    fake.die()
    fake.wrong_reloads = 1
    other.delay_s = 0.5  # longer than it takes to see what the first answers
    fake.start()
    fake.calls.clear()
    time.sleep(0.1)
    assert {n: [c.token_ids for c in made] for n, made in sample(servers, 4).items()} == {
        n: [c.token_ids for c in made] for n, made in right.items()
    }
    assert [line for line in notes if f"{fake.url} computes otherwise; it is left out" in line]
    assert [call.body["temperature"] for call in fake.asked("/v1/completions")] == [0.0]


def test_a_restart_between_two_rounds_is_seen(fake, monkeypatch):
    monkeypatch.setattr(server_module, "IDLE_S", 0.1)
    servers = engine(fake)
    servers.publish(FOLDER, "run:1")
    right = sample(servers, 2)
    fake.die()
    fake.start()
    time.sleep(0.15)
    assert sample(servers, 2) == right and fake.folder == str(FOLDER)


def test_all_gone_ends_after_the_wait(fake):
    servers, notes = engine(fake, wait_s=0.3, note=lambda line: notes.append(line)), []
    servers.check()
    fake.die()
    began = time.monotonic()
    with pytest.raises(EnginesGone, match="no server of rl.engine.urls answers.*rl.engine.wait_s"):
        sample(servers, 3)
    assert time.monotonic() - began >= 0.3 and len(notes) == 1


def test_a_server_that_comes_back_with_other_settings_is_left_out(fake, other, monkeypatch):
    monkeypatch.setattr(server_module, "IDLE_S", 0.05)
    servers, notes = engine(fake, other, note=lambda line: notes.append(line)), []
    servers.check()
    fake.die()
    fake.settings["model_config.logprobs_mode"] = "raw_logprobs"
    fake.start()
    time.sleep(0.1)
    sample(servers, 4)
    assert not fake.asked("/v1/completions") and any("--logprobs-mode" in line for line in notes)


def test_what_deliver_or_pulse_raises_ends_the_sampling(fake, monkeypatch):
    monkeypatch.setattr(requests_module, "PULSE_S", 0.05)
    fake.delay_s = 60.0

    def stop():
        raise InterruptedError

    began = time.monotonic()
    with pytest.raises(InterruptedError):
        engine(fake, timeout_s=90.0).sample(prompts(3), SAMPLING, Collected(), stop)
    assert time.monotonic() - began < fake.delay_s
    fake.delay_s = 0.0
    with pytest.raises(InterruptedError):
        engine(fake).sample(prompts(3), SAMPLING, lambda number, made: stop())


# --- weights


def control(fake):
    words = {"/pause?mode=keep": "pause", "/resume": "resume", "/update_weight_version": "version"}
    words |= {"/collective_rpc": "load"}
    return [words[call.path] for call in fake.calls if call.path in words]


def test_weights_are_loaded_by_paused_servers_alone(fake, other):
    servers = engine(fake, other)
    servers.check()
    fake.calls.clear()
    other.calls.clear()
    servers.publish(FOLDER, "run:1")
    for one in (fake, other):
        assert control(one) == ["pause", "load", "version", "resume"] and not one.paused
        assert (one.folder, one.version) == (str(FOLDER), "run:1")
        [call] = one.asked("/collective_rpc")
        assert call.body == {"method": "reload_weights", "kwargs": {"weights_path": str(FOLDER)}}


def test_a_failed_load_is_tried_once_more(fake):
    servers = engine(fake)
    servers.check()
    fake.calls.clear()
    fake.failing_reloads = 1
    servers.publish(FOLDER, "run:1")
    assert control(fake) == ["pause", "load", "load", "version", "resume"]


def test_a_server_that_cannot_load_stays_paused_and_is_left_out(fake, other):
    servers, notes = engine(fake, other, note=lambda line: notes.append(line)), []
    servers.check()
    fake.calls.clear()
    fake.failing_reloads = 100
    servers.publish(FOLDER, "run:1")
    assert {one.version for made in sample(servers, 3).values() for one in made} == {"run:1"}
    servers.publish(FOLDER, "run:2")
    assert len(greedy(servers, prompts(1)[0], 3)) == 1
    servers.close()
    assert control(fake) == ["pause", "load", "load"] and fake.paused and not fake.asked("/v1/completions")
    assert [line for line in notes if "cannot load" in line and "no such folder" in line]


def test_no_server_could_load(fake):
    servers = engine(fake)
    servers.check()
    fake.failing_reloads = 100
    with pytest.raises(UserError, match="no server is left: .* cannot load .*no such folder"):
        servers.publish(FOLDER, "run:1")


def test_weights_wait_for_what_is_in_flight(fake):
    """Another thread samples meanwhile: its completions are of the old weights or the new ones, whole."""
    servers = engine(fake, in_flight=2)
    servers.check()
    servers.publish(FOLDER, "run:1")
    [server], asked = servers._servers, fake.asked
    fake.held_until = lambda: len(asked("/v1/completions")) < 5 or server._shut or server.version == "run:2"
    found = Collected()
    sampling = threading.Thread(target=servers.sample, args=(prompts(12), SAMPLING, found))
    sampling.start()
    while len(asked("/v1/completions")) < 5:  # where the server stops until the hand-over begins
        time.sleep(0.01)
    servers.publish(Path("/weights/v2"), "run:2")
    sampling.join()
    for number, made in found.items():
        [body] = [call.body for call in fake.asked("/v1/completions") if call.body["prompt"][0] == 10 + number]
        for place, one in enumerate(made):
            fake.folder = {"run:1": "/weights/v1", "run:2": "/weights/v2"}[one.version]
            assert one.token_ids == made_up(prompts(12)[number].token_ids, body, place, fake).token_ids
    assert {one.version for made in found.values() for one in made} == {"run:1", "run:2"}


def test_a_look_that_comes_late_loads_no_older_weights(fake):
    """It began before the hand-over of newer ones, and went on when that was done."""
    servers = engine(fake)
    servers.publish(FOLDER, "run:1")
    [server] = servers._servers
    late = threading.Thread(target=server.prepare, args=(lambda: servers._weights,))
    with server._changing:
        late.start()
        servers._weights = server_module.PublishedWeights(Path("/weights/v2"), "run:2")
        with server._drained():
            server._load(servers._weights)
    late.join()
    assert (fake.folder, server.version) == ("/weights/v2", "run:2") and len(fake.asked("/collective_rpc")) == 2


def test_a_server_that_a_dead_trainer_paused_is_resumed(fake):
    fake.paused = True
    servers = engine(fake)
    servers.check()
    assert fake.paused and all(call.method == "GET" for call in fake.calls)  # another run may be loading weights
    sample(servers, 1)
    assert not fake.paused


def test_a_version_of_the_same_name_is_loaded_again_at_the_start(fake):
    """A run that was killed and went back to an older checkpoint may come by the same step with other weights."""
    engine(fake).publish(FOLDER, "run:1")
    engine(fake).publish(Path("/weights/anew"), "run:1")
    assert fake.folder == "/weights/anew"


def test_close_leaves_nothing_paused(fake):
    servers = engine(fake)
    servers.check()
    fake.paused = True
    servers._servers[0]._paused = True  # as a hand-over that was interrupted leaves it
    servers.close()
    assert not fake.paused


def test_greedy_is_asked_of_every_server(fake, other):
    servers = engine(fake, other)
    servers.publish(FOLDER, "run:1")
    other.folder = "something else"  # a load that answered 200 and was wrong
    one, two = greedy(servers, prompts(1)[0], 4)
    assert len(one.token_ids) == 4 and one.token_ids != two.token_ids
    assert body_of(fake)["temperature"] == 0.0


# --- settings


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"model_config.logprobs_mode": "raw_logprobs"}, "add --logprobs-mode processed_logprobs"),
        ({"aux_output_config.enable_return_routed_experts": False}, "add --enable-return-routed-experts"),
        ({"max_model_len": 63}, "--max-model-len is 63, but .* 64 tokens"),
        ({"dev_mode": False}, "VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_flag(fake, settings, said):
    fake.settings |= settings
    with pytest.raises(UserError, match=said) as raised:
        engine(fake).check()
    assert "\n" not in str(raised.value) and fake.url in str(raised.value)


def test_wrong_settings_of_all_servers_are_told_together(fake, other):
    for one in (fake, other):
        one.settings |= {"model_config.logprobs_mode": "raw_logprobs", "max_model_len": 8}
    with pytest.raises(UserError) as raised:
        engine(fake, other).check()
    assert len(str(raised.value).splitlines()) == 4


def test_the_model_is_found_by_its_name(fake):
    with pytest.raises(UserError, match="serves no model 'mine', but policy .set rl.engine.model"):
        engine(fake, model="mine").check()
    assert engine(fake, model="policy").check()


def test_a_key_comes_from_the_environment(fake, monkeypatch):
    with pytest.raises(UserError, match="rl.engine.key_from: the environment has no SERVERS_KEY"):
        engine(fake, key_from="SERVERS_KEY")
    monkeypatch.setenv("SERVERS_KEY", "secret")
    assert engine(fake, key_from="SERVERS_KEY")._servers[0].http._headers["Authorization"] == "Bearer secret"


def test_check_waits_for_the_first_server_alone(fake, other):
    fake.die()
    lines = engine(fake, other).check()
    assert "Connection refused" in lines[0] and "vLLM serves" in lines[1]
    other.die()
    with pytest.raises(EnginesGone):
        engine(fake, other, wait_s=0.1).check()
