"""A run goes on, or ends in one line, whichever server is lost, late or wrong, and at whichever moment."""

import threading
import time
from pathlib import Path

import pytest

from ds_moe.errors import UserError
from ds_moe.rollout import requests as requests_module
from ds_moe.rollout.engine import EnginesGone
from ds_moe.rollout.http import Abandoned, Malformed
from ds_moe.rollout.server import PublishedWeights
from ds_moe.rollout.server_api import Wanted, finished
from ds_moe.rollout.vllm import VllmApi
from tests.rollout.engines import SAMPLING, engine, greedy, prompts, sample
from tests.rollout.fake_vllm import made_up

FIRST, SECOND = Path("/weights/v1"), Path("/weights/v2")


pytestmark = pytest.mark.usefixtures("impatient")


def in_order(*fakes, **keys):
    """An engine whose servers have weights and were found to answer as they do, and what it notes."""
    notes = []
    servers = engine(*fakes, note=notes.append, **keys)
    servers.publish(FIRST, "run:1")
    servers.prove(prompts(2), 3, is_of(FIRST, *fakes))
    return servers, notes


def is_of(folder, *fakes):
    """What judges answers to `prompts(2)`: those of a folder are right."""
    bodies = {"temperature": 0, "max_tokens": 3}

    def problem(server, found):
        [fake] = [one for one in fakes if one.url == server]
        loaded, fake.folder = fake.folder, str(folder)
        expected = [made_up(one.token_ids, bodies, 0, fake).token_ids for one in prompts(2)]
        fake.folder = loaded
        return None if [one.token_ids for one in found] == expected else f"{server} answers as if it had other weights"

    return problem


# --- the hand-over


def test_the_only_server_is_back_after_it_was_lost_in_the_hand_over(fake):
    servers, _ = in_order(fake, wait_s=20.0)
    fake.die()
    fake.start_after_death(0.2)
    servers.publish(SECOND, "run:2")
    assert (fake.folder, fake.version) == (str(SECOND), "run:2")


@pytest.mark.parametrize("fault", "500 hang_up cut_body nan slow few".split())
def test_a_fault_in_the_comparison_is_asked_again(fake, fault):
    fake.slow_s = 2.0
    servers, _ = in_order(fake, timeout_s=1.0)
    fake.fail(fault)
    servers.publish(SECOND, "run:2")
    servers.prove(prompts(2), 3, is_of(SECOND, fake))
    assert fake.served == [(fault, True)]
    assert {one.version for made in sample(servers, 2).values() for one in made} == {"run:2"}


def test_a_server_that_is_lost_in_the_comparison_is_waited_for(fake):
    servers, _ = in_order(fake, wait_s=20.0)
    fake.fail("die")
    fake.start_after_death(0.3)
    servers.prove(prompts(2), 3, is_of(FIRST, fake))
    assert fake.folder == str(FIRST)
    fake.die()
    with pytest.raises(EnginesGone):
        servers._config = servers._config.model_copy(update={"wait_s": 0.1})
        servers.prove(prompts(2), 3, is_of(FIRST, fake))


def test_an_answer_that_is_never_right_ends_the_comparison_in_one_line(fake):
    servers, _ = in_order(fake, wait_s=60.0)
    fake.fail("nan", 100)
    with pytest.raises(UserError, match="no server is left: .*computes NaN.*--dtype"):
        servers.prove(prompts(2), 3, is_of(FIRST, fake))


@pytest.mark.parametrize("settings", [{"dev_mode": False}, {"model_config.logprobs_mode": "raw_logprobs"}])
def test_one_server_that_is_wrong_in_the_hand_over_is_left_out(fake, other, settings):
    servers, notes = in_order(fake, other)
    other.die()
    other.settings |= settings
    other.start()
    servers._servers[1].lose("an answer was lost")
    servers.publish(SECOND, "run:2")
    assert any(other.url in line and "left out" in line for line in notes)
    other.calls.clear()
    sample(servers, 4)
    assert not other.calls
    fake.settings |= settings
    servers._servers[0].lose("an answer was lost")
    with pytest.raises(UserError, match="no server is left"):
        servers.publish(SECOND, "run:3")


# --- servers that come late


def late(fake, other, wrong_reloads):
    """Two servers, the second of which is down at the hand-over and back before the round."""
    servers, notes = in_order(fake, other)
    other.die()
    servers.publish(SECOND, "run:2")
    servers.prove(prompts(2), 3, is_of(SECOND, fake, other))
    other.start()
    other.wrong_reloads = wrong_reloads
    other.calls.clear()
    return servers, notes, lambda: [call for call in other.asked("/v1/completions") if call.body["temperature"]]


def test_a_late_server_that_loads_wrong_samples_nothing(fake, other):
    servers, notes, asked = late(fake, other, wrong_reloads=100)

    def left_out():
        return any(f"{other.url} answers as if it had other weights; it is left out" in line for line in notes)

    fake.held_until = left_out
    sample(servers, 16)
    assert other.asked("/v1/completions") and not asked() and left_out()


def test_a_late_server_samples_once_it_was_compared(fake, other):
    servers, _, asked = late(fake, other, wrong_reloads=0)
    fake.held_until = asked
    sample(servers, 16)
    first = [call.body["temperature"] for call in other.asked("/v1/completions")]
    assert first[:2] == [0.0, 0.0] and asked() and len(first) - len(asked()) == 2


def test_a_server_that_was_lost_in_the_comparison_is_compared_before_it_samples(fake, other):
    servers, notes = in_order(fake, other)
    other.wrong_reloads = 100
    other.fail("500", greedy=True)
    servers.publish(SECOND, "run:2")
    servers.prove(prompts(2), 3, is_of(SECOND, fake, other))
    other.calls.clear()
    fake.held_until = lambda: any("left out" in line for line in notes)
    sample(servers, 16)
    assert all(call.body["temperature"] == 0 for call in other.asked("/v1/completions"))


def test_a_look_from_before_a_hand_over_loads_the_weights_of_now(fake):
    servers, _ = in_order(fake)
    [server] = servers._servers
    fake.die()
    fake.start()  # with the weights of its start
    with server._changing:
        look = threading.Thread(target=server.prepare, args=(servers._current,))
        look.start()
        servers._weights = PublishedWeights(SECOND, "run:2")
    look.join()
    assert fake.version == "run:2"


# --- prompts


@pytest.mark.parametrize("fault, tries", [("nan", requests_module.TRIES), ("400", 1), ("other_prompt", 1)])
def test_one_prompt_that_cannot_be_answered_does_not_end_the_run(fake, fault, tries):
    """Order and seeds of prompts are the same when a run goes on: it would end there again and again."""
    servers, notes = in_order(fake)
    fake.poisoned = {11: fault}
    assert [len(made) for _, made in sorted(sample(servers, 4).items())] == [2, 0, 2, 2]
    assert fake.served == [(fault, False)] * tries
    assert [line for line in notes if line.startswith("prompts.jsonl:2 is given up")]
    found = {}
    servers.sample(prompts(2)[1:], SAMPLING, found.__setitem__)  # as where a prompt is exchanged for another
    assert found == {0: []}


def test_a_fault_of_most_prompts_is_not_theirs(fake):
    servers, _ = in_order(fake)
    fake.poisoned = {10 + number: "400" for number in range(12)}
    with pytest.raises(UserError, match="the server says 400"):
        sample(servers, 16)


# --- what a server says of itself


@pytest.mark.parametrize("found, given", [("torch.bfloat16", "fp32"), ("torch.float16", "bf16")])
def test_another_dtype_than_that_of_the_weights_is_one_line(fake, found, given):
    fake.settings["model_config.dtype"] = found
    name = {"fp32": "float32", "bf16": "bfloat16"}[given]
    said = f"its dtype is {found[6:]}, but it is given weights in {given} .start it with --dtype {name}"
    with pytest.raises(UserError, match=said):
        engine(fake, dtype=given).check()
    fake.settings["model_config.dtype"] = f"torch.{name}"
    assert engine(fake, dtype=given).check()


@pytest.mark.parametrize("wrong", [["stop"], {"type": "stop"}, None, 3])
def test_words_of_another_form_are_no_traceback(wrong):
    with pytest.raises(Malformed):
        finished(wrong, "somewhere")
    with pytest.raises(Malformed):
        VllmApi(Wanted(False, 64)).read({"choices": [{"index": wrong}]}, prompts(1)[0], SAMPLING, "somewhere")


# --- the end


def test_close_ends_a_wait(fake):
    servers, _ = in_order(fake, wait_s=600.0)
    fake.die()
    raised = []

    def publish():
        try:
            servers.publish(SECOND, "run:2")
        except UserError as error:
            raised.append(str(error))

    thread = threading.Thread(target=publish)
    thread.start()
    time.sleep(0.2)
    servers.close()
    thread.join(20)
    assert raised == ["rl.engine: closed while it waited for a server"]


def test_nothing_is_paused_after_close(fake):
    servers, _ = in_order(fake)
    [server] = servers._servers
    server._paused = fake.paused = True  # as a hand-over leaves it that is under way
    servers.close()
    with pytest.raises(Abandoned):  # its thread, which goes on
        server.hand_over(PublishedWeights(SECOND, "run:2"))
    assert not fake.paused


def test_answers_are_those_of_all_servers(fake, other):
    servers, _ = in_order(fake, other)
    assert len(greedy(servers, prompts(1)[0], 3)) == 2
