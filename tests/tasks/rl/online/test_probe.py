"""The comparison after a hand-over: what passes, what stops a run."""

import pytest
import torch

from ds_moe.errors import UserError
from ds_moe.rollout.engine import Completion
from ds_moe.tasks.rl.online.probe import OwnAnswer, WeightsCheck

TOKENS = [3, 1, 4]


def own(seed=0, shift=0.0):
    logprob_NV = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    for place, token in enumerate(TOKENS):
        logprob_NV[place, token] = -0.1 - shift
    return OwnAnswer(TOKENS, logprob_NV)


def found(answer, tokens=TOKENS, error=0.0):
    return Completion(tokens, [value + error for value in answer.of(tokens)], None, "record", "length", "r:1")


class Servers:
    def __init__(self, *of_servers):
        self._of_servers = of_servers

    def prove(self, prompts, max_new_tokens, problem):
        for number, found in enumerate(self._of_servers, start=1):
            if text := problem(f"server {number}", [found] * len(prompts)):
                raise UserError(text)


def compared(check, own_answer, *of_servers):
    check.compare(Servers(*of_servers), "r:1", [None], [own_answer])


def test_the_same_weights_pass_and_others_are_named():
    answer = own()
    compared(WeightsCheck("fp32"), answer, found(answer), found(answer, error=1e-4))
    with pytest.raises(UserError, match="server 2 was given the weights r:1 .* differ by 0.01 on average"):
        compared(WeightsCheck("fp32"), answer, found(answer), found(answer, error=0.01))
    compared(WeightsCheck("bf16"), answer, found(answer, error=0.05))
    for error in (0.3, float("nan")):
        with pytest.raises(UserError, match="server 1 was given the weights"):
            compared(WeightsCheck("bf16"), answer, found(answer, error=error))
    with pytest.raises(UserError, match="it answers nothing"):
        compared(WeightsCheck("fp32"), answer, found(answer, tokens=[]))


def test_another_answer_passes_only_where_it_is_as_likely():
    answer = own()
    answer.logprob_NV[1, 6] = answer.logprob_NV[1, 1] - 1e-4  # a tie, which rounding decides
    compared(WeightsCheck("fp32"), answer, found(answer, tokens=[3, 6, 0]))
    with pytest.raises(UserError, match="its greedy token is less likely than the trainer's"):
        compared(WeightsCheck("fp32"), answer, found(answer, tokens=[3, 5, 0]))


def test_an_engine_that_keeps_its_weights_is_told_from_one_that_follows():
    """Its log-probs are within the tolerance of bf16, but exactly those of before."""
    before, after = own(), own(shift=0.1)
    check = WeightsCheck("bf16")
    compared(check, before, found(before))
    compared(check, after, found(after))
    with pytest.raises(UserError, match="exactly those of before, the trainer's have moved by 0.1"):
        compared(check, before, found(after))
    check, number = WeightsCheck("bf16"), 0
    with pytest.raises(UserError, match="exactly those of before, the trainer's have moved by 0.02"):
        for number in range(9):  # by less than the limit each time
            compared(check, own(shift=0.01 * number), found(before))
    assert number == 2
    check = WeightsCheck("fp32")
    compared(check, before, found(before))
    with pytest.raises(UserError, match="exactly those of before, the trainer's have moved by 0.1"):
        compared(check, after, found(before))  # and far apart, as others would be
    check = WeightsCheck("bf16")
    for number in range(15):
        answer = own(shift=0.01 * number)
        compared(check, answer, found(answer))  # one that follows may go as far as it likes
    check = WeightsCheck("bf16")
    for _ in range(2):  # an update that moves nothing leaves the answers as they are
        compared(check, before, found(before))
