"""Ranks of test_online: runs with rl.engine in one launch. Argument: JSON list of [name, overrides, fault].

The engine is plain transformers in the process of rank 0, which spares the start of another one. A fault is
"wrong" or "stale" (weights after a hand-over), "gone" (in the second round), "slow" (seconds of a round), or
"kill:WHERE:ROUND", where rank 0 ends by SIGKILL. Reports by name: the result, or the error.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError
from ds_moe.export.live import LiveExport
from ds_moe.export.model import DTYPES
from ds_moe.rollout.engine import EnginesGone
from ds_moe.tasks.rl.online import round as round_module
from ds_moe.tasks.rl.online import rounds as rounds_module
from ds_moe.tasks.rl.online.engines import engine_dtype
from ds_moe.tasks.rl.online.local import _completion, _message
from ds_moe.tasks.rl.online.local_worker import LocalModel
from ds_moe.tasks.rl.online.stream import OnlineStream
from ds_moe.tasks.rl.online.task import OnlinePolicyOptimization
from ds_moe.train import train
from tests.launcher import leave, report

RUN = "tests/runs/online.yaml"
REWARD = ["rl.reward.function=tests/distributed/online_reward.py:score", "rl.reward.processes=1"]


class EngineHere:
    """Satisfies `RolloutEngine`."""

    def __init__(self, config, fault):
        self._model, self._fault = LocalModel(DTYPES[engine_dtype(config)]), fault
        self.published, self.rounds = [], 0

    def check(self):
        return ["in the process of rank 0"]

    def sample(self, prompts, sampling, deliver, pulse):
        self.rounds += 1
        if self._fault == "gone" and self.rounds == 2:
            raise EnginesGone("no server has answered for 1 s")
        if self._fault.startswith("slow"):
            for _ in range(int(10 * float(self._fault.split(":")[1]))):
                pulse()
                time.sleep(0.1)
        kill(self._fault, "sampling", self.rounds - 1)
        asked = {"temperature": sampling.temperature, "max_new_tokens": sampling.max_new_tokens, "seed": sampling.seed}
        found = self._model.sample([_message(one) for one in prompts], sampling.completions, **asked)["completions"]
        for number, answers in enumerate(found):
            completions = [_completion(one, sampling.max_new_tokens) for one in answers]
            deliver(number, [one for one in completions if not set(sampling.forbidden) & set(one.token_ids)])

    def publish(self, folder, version):
        kill(self._fault, "publishing", len(self.published))
        self.published.append(version)
        if self._fault == "stale" and len(self.published) == 2:
            self._model._version = version
            return
        self._model.load(str(folder), version)
        if self._fault == "wrong" and len(self.published) == 2:
            model, _ = self._model._loaded
            for name, parameter in model.named_parameters():
                if name.endswith("experts.down_proj"):
                    parameter.data = parameter.data.roll(1, 0)

    def prove(self, prompts, max_new_tokens, problem):
        found = [self._model.sample([_message(one)], 1, 0.0, max_new_tokens, 0)["completions"][0][0] for one in prompts]
        if text := problem("the engine", [_completion(one, max_new_tokens) for one in found]):
            raise UserError(text)

    def close(self):
        pass


def kill(fault, where, number):
    if fault == f"kill:{where}:{number}":
        print(f"killed in {where}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def killing(fault):
    """Patches that end rank 0 before one of its doings."""
    counts = Counter()

    def before(owner, name, where):
        function = getattr(owner, name)

        def called(*arguments, **keywords):
            if os.environ["RANK"] == "0":
                kill(fault, where, counts[where])
                counts[where] += 1
            return function(*arguments, **keywords)

        return patch.object(owner, name, called)

    stack = ExitStack()
    stack.enter_context(before(round_module, "finish_round", "file"))
    stack.enter_context(before(OnlineStream, "open", "open"))
    stack.enter_context(before(LiveExport, "_complete", "writing"))
    stack.enter_context(before(OnlinePolicyOptimization, "metrics", "metrics"))
    return stack


def run(name, overrides, fault=""):
    config = load_run(RUN, [*(REWARD if "rl.engine=null" not in overrides else []), *overrides])
    engines = []

    def made(config, note):
        engines.append(EngineHere(config, fault))
        return engines[-1]

    before = Path(config.train.output_dir, "rollouts")
    with patch.object(rounds_module, "make_engine", made), killing(fault):
        try:
            found = {"result": train(config)}
        except Exception as error:
            found = {"error": str(error), "kind": type(error).__name__}
    rounds = sorted(path.name for path in before.glob("*.json*"))
    report(**{name: {**found, "published": engines[0].published if engines else [], "rounds": rounds}})


def main():
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        run(*case)
    leave()


if __name__ == "__main__":
    main()
