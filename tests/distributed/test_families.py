"""Families whose blocks stay, with experts over two ranks: every stage of ZeRO with and without checkpointing.

What differs from tests/distributed/test_parity.py is what DeepSpeed sees: the experts are the layer, and the block
around them is what ZeRO-3 gathers.
"""

import pytest

from tests.distributed.test_parity import GRADIENT, LOSS
from tests.launcher import run_ranks

# Our router with a bias and groups; the family's own router over experts with biases.
FIRST = "glm4_moe gpt_oss"
TEXT = "qwen2_moe qwen3_next deepseek_v3 mixtral olmoe minimax_m2 nemotron_h hy_v3 gemma4_text granitemoe zaya flint"
IMAGES = (
    "aria gemma4 glm4v_moe glm5_next internvl kimi_k25 minimax_m3_vl mistral3 qwen3_5_moe qwen3_omni_moe_thinker "
    "qwen4_exp step3p7"
)


@pytest.mark.slow
@pytest.mark.parametrize("families", [FIRST.split(), TEXT.split(), IMAGES.split()], ids=["routers", "text", "images"])
def test_parity_under_expert_parallelism_and_zero(families, show):
    run = run_ranks("tests/distributed/families_ranks.py", 2, families)
    lines = ["family                    ZeRO  checkpointing   loss difference   gradient difference / largest entry"]
    for family, stage, checkpointing, loss, gradient in run.json["rows"]:
        lines.append(f"{family:24} {stage:>5}  {str(checkpointing):>13}   {loss:15.1e}   {gradient:19.1e}")
    show("\n".join(lines))
    assert len(run.json["rows"]) == 4 * len(families)
    for family, *_, loss, gradient in run.json["rows"]:
        assert loss <= LOSS and gradient <= GRADIENT, family
    broken_loss, broken_gradient = run.json["broken"]
    assert broken_loss > LOSS and broken_gradient > GRADIENT
