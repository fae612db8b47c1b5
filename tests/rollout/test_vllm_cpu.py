"""The client against a real vLLM on CPUs: exact where both compute in fp32, and weights handed over exactly."""

import copy

import pytest
import torch

from ds_moe.config.moe import MoEConfig
from ds_moe.errors import UserError
from ds_moe.models.convert import convert
from ds_moe.rollout.engine import Sampling
from tests.rollout.engines import greedy
from tools.bench.replay.bench import LIVE, compare
from tools.bench.rollout.engine import CASES, questions, rollouts_of, serving
from tools.vllm_cpu.install import missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=missing() or "")]
SAMPLING = Sampling(completions=2, max_new_tokens=16, temperature=1.0, seed=7)


@torch.no_grad()
def greedy_of(model, begin, prompt, processor, count):
    """Ids and log-probs of the most likely answer, by plain transformers without a cache."""
    from ds_moe.data.encode import collate_prompts

    ids, logprobs = [], []
    inputs = collate_prompts([begin], processor).inputs
    inputs = {key: value for key, value in inputs.items() if key not in ("attention_mask",)}
    for _ in range(count):
        scores = model(**inputs).logits[0, -1].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        new = torch.tensor([[ids[-1]]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(new)], 1)
    return ids, logprobs


@pytest.mark.parametrize("name", CASES)
def test_engine_and_trainer_agree_in_fp32(name, tmp_path, show):
    """Router rows and log-probs, before and after weights were handed over; greedy answers as plain transformers'."""
    case, notes = CASES[name], []
    folders = {seed: case.write(tmp_path / f"weights{seed}", seed) for seed in (0, 1)}
    begins = questions(case, 0, 6)
    with serving(folders[0], tmp_path / "vllm.log", "float32", note=notes.append) as (server, servers):
        for seed in folders:
            if seed:
                servers.publish(folders[seed], f"seed {seed}")
            model = case.model(seed)
            trainer = copy.deepcopy(model)
            convert(trainer, MoEConfig())
            rollouts = rollouts_of(servers, begins, SAMPLING, case.processor)
            figures = compare(trainer, case.processor, rollouts)
            rows = sum(len(one.trace.ids) for one in rollouts) * len(rollouts[0].trace.ids[0])
            off = figures["modes"][LIVE]["max"]
            differ = f"{figures['routers']:.2%} differ, log-probs off by {off:.1e}"
            show(f"{name}, weights {seed}: {rows} router rows, {differ}")
            assert figures["routers"] == 0 and off <= 1e-5
            if not seed:  # greedy answers are those of weights that were handed over
                servers.publish(folders[seed], f"seed {seed}")
            [answer] = greedy(servers, begins[0][0], 8)
            ids, logprobs = greedy_of(model, begins[0][1], begins[0][0], case.processor, 8)
            assert answer.token_ids == ids[: len(answer.token_ids)]
            assert answer.logprobs == pytest.approx(logprobs[: len(answer.token_ids)], abs=1e-4)
        if case.kind == "text":  # back with the weights of its start, and given those of now before it is asked
            server.kill()
            server.start()
            again = compare(trainer, case.processor, rollouts_of(servers, begins, SAMPLING, case.processor))
            assert again["routers"] == 0 and again["modes"][LIVE]["max"] <= 1e-5
            assert any("is back, with weights 'seed 1'" in line for line in notes)
        with pytest.raises(UserError, match="no server is left: .* cannot load"):
            servers.publish(tmp_path / "nowhere", "seed 2")
    assert not [line for line in notes if "paused" in line and "left out" not in line]
