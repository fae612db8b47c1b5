"""Twenty rounds on servers that misbehave in every way the fake one knows, with a trainer that is killed: no round is
lost or there twice, none is sampled by other weights than the run's."""

import json
import threading
import time
from contextlib import ExitStack

import pytest
import torch

from ds_moe.models.presets import build_preset
from ds_moe.models.processor import save_processor, tiny_processor
from ds_moe.replay.traces import decode
from ds_moe.tasks.rl.online.local_worker import LocalModel
from tests.distributed.test_online import assert_rounds, curve
from tests.launcher import start_ranks
from tests.records import chat
from tests.rollout.fake_vllm import FakeVllm, Made

ROUNDS = 20
PASSING = ["500", "hang_up", "slow", "cut_body", "no_json", "null_routes", "cut_routes", "no_logprobs", "nan"]
PASSING += ["nan_logprob", "abort", "few", "die", "reload", "die in a reload"]


class Models:
    """What servers compute with: the folder that each has loaded, by plain transformers."""

    def __init__(self, start):
        self._start, self._models, self._lock = str(start), {}, threading.Lock()

    def answer(self, prompt, body, number, fake):
        folder = self._start if fake.folder == "at the start" else fake.folder
        with self._lock:
            if folder not in self._models:  # a folder of a step is never another one
                self._models[folder] = LocalModel(torch.float32)
                self._models[folder].load(folder, "")
            asked = {"temperature": body["temperature"], "max_new_tokens": body["max_tokens"]}
            asked["seed"] = (body.get("seed") or 0) + number
            found = self._models[folder].sample([{"tokens": prompt, "images": []}], 1, **asked)["completions"][0][0]
        return Made(found["token_ids"], found["logprobs"], decode(found["routing"], kind="record").ids)


@pytest.fixture
def files(tmp_path):
    model = build_preset("tiny-moe")
    model.save_pretrained(tmp_path / "model")
    save_processor(tiny_processor("text"), tmp_path / "model")
    lines = [json.dumps(chat(f"question {number}", "7")) for number in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def words(files, fakes, *more):
    return [
        "tests/runs/online.yaml",
        f"model={{path: {files / 'model'}}}",
        f"data.train={files / 'prompts.jsonl'}",
        f"train.output_dir={files / 'run'}",
        "rl.engine.kind=vllm",
        f"rl.engine.urls=[{', '.join(fake.url for fake in fakes)}]",
        *("rl.engine.timeout_s=3.0", "rl.engine.wait_s=60.0", "rl.engine.completions=2"),
        *("rl.reward.function=tests/distributed/online_reward.py:score", "rl.reward.processes=1"),
        *(f"train.steps={ROUNDS}", "checkpoint.keep=2"),
        *more,
    ]


def finished(files):
    return len(list((files / "run/rollouts").glob("round_*.json")))


def misbehave(fault, fake, greedy):
    """Let a request for a round fail, or one of the comparison after a hand-over, or the hand-over itself."""
    if fault == "reload":
        fake.failing_reloads = 1
    elif fault == "die in a reload":
        fake.dying_reloads = 1
    else:
        fake.slow_s = 4.0
        fake.fail(fault, greedy=greedy)


def assert_served(fakes):
    """Every fault has met a request, whichever server had it to give, in a round and in a comparison."""
    assert not any(fake.open_faults or fake.failing_reloads or fake.dying_reloads for fake in fakes)
    served = {entry for fake in fakes for entry in fake.served}
    assert {fault for fault, _ in served} >= {fault for fault in PASSING if "reload" not in fault}
    assert {greedy for _, greedy in served} == {False, True}


@pytest.mark.slow
@pytest.mark.parametrize("servers, lag", [(2, 0), (1, 1)])
def test_no_round_is_lost_or_sampled_by_other_weights(files, servers, lag):
    models, more = Models(files / "model"), [f"rl.engine.lag={lag}", *(["rl.correction=tis"] if lag else [])]
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeVllm(models.answer)) for _ in range(servers)]
        one, told, kills = fakes[0], [], {6: [], 13: fakes[:1]}  # the second time a server dies with the trainer
        one.paused = True  # a trainer that is gone has left it so
        run = start_ranks("ds_moe.train", 2, words(files, fakes, *more))
        began = time.monotonic()
        while run.returncode is None:
            assert time.monotonic() - began < 500
            time.sleep(0.05)
            done = finished(files)
            while len(told) < 2 * len(PASSING) and len(told) <= 2 * done:
                fault = PASSING[len(told) % len(PASSING)]
                misbehave(fault, fakes[len(told) % servers], greedy=len(told) % 3 == 2)
                told.append(fault)
            for fake in fakes:
                if not fake.alive:
                    threading.Timer(0.5, fake.start).start()  # with its first weights, under version "default"
                    time.sleep(0.6)
            if kills and done >= min(kills):
                run.kill()
                run.wait()
                for fake in kills.pop(min(kills)):
                    fake.die()
                run = start_ranks("ds_moe.train", 2, words(files, fakes, *more))
        assert run.wait() == 0, run.tails()
        assert told == 2 * PASSING
        assert not any(fake.paused for fake in fakes)
        assert_served(fakes)
    assert_rounds(files / "run", ROUNDS)
    mismatch = curve(files / "run", "rl/mismatch_k3")
    assert sorted(mismatch) == list(range(1, ROUNDS + 1))
    behind = set()
    for number in range(ROUNDS):
        lines = (files / f"run/rollouts/round_{number:06d}.jsonl").read_text().splitlines()
        behind |= {number - int(json.loads(line)["version"].rpartition(":")[2]) for line in lines}
    assert behind <= {0, lag} and (lag or max(mismatch.values()) < 1e-8), (behind, mismatch)


@pytest.mark.slow
def test_servers_that_lie_or_are_gone_end_the_run_in_one_line(files):
    models = Models(files / "model")
    with FakeVllm(models.answer) as one, FakeVllm(models.answer) as other:
        run = start_ranks("ds_moe.train", 2, words(files, [one, other], "train.lr=1e-2"))
        while finished(files) < 2:
            assert run.returncode is None, run.output
            time.sleep(0.05)
        other.wrong_reloads = 1000
        assert run.wait() != 0
        assert "was given the weights" in run.log(0) and "exit" not in run.log(0).splitlines()[-1]
        done = finished(files)
        last = max(int(path.name[5:]) for path in (files / "run/checkpoints").glob("step_*"))
        assert last <= done
        other.wrong_reloads = 0
        run = start_ranks("ds_moe.train", 2, words(files, [one, other], "train.lr=1e-2", "rl.engine.wait_s=2.0"))
        run.wait_for(f"round {done} from step")
        one.die()
        other.die()
        assert run.wait() != 0
        assert "error: rl.engine: no server of rl.engine.urls answers for" in run.log(0)
        saved = sorted((files / "run/checkpoints").glob("step_*"))[-1]
        assert f"checkpoint {saved}" in run.log(0)
