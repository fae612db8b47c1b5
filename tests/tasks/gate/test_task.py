"""What the losses of a gate are means over."""

from types import SimpleNamespace

import torch

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.tasks import GateConfig
from ds_moe.tasks.gate import task
from ds_moe.tasks.gate.network import GateDecision, entropy
from tests.tasks.dpo.tiny_policy import CPU

NAMES = ["mail", "maps"]


def test_the_entropy_term_is_a_mean_over_real_samples(monkeypatch):
    """Also of a step that has fewer of them than the global batch, as the last one of an epoch; the loss of the answers
    beside it is a mean over what there is."""
    monkeypatch.setattr(task.dist, "all_reduce", lambda values: None)
    real = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    module = SimpleNamespace(adapter_bank=SimpleNamespace(names=NAMES), reference_logits=None)
    config = SimpleNamespace(
        gate=GateConfig(stage="end_to_end", start="before", entropy_weight=0.5),
        train=SimpleNamespace(global_batch_size=64),
    )
    stream = [[SimpleNamespace(real_B=real_B) for real_B in real]]
    parts = SimpleNamespace(config=config, topology=CPU, engine=SimpleNamespace(module=module), stream=stream)
    made = task.GateTask(parts)
    [step] = made.steps(Progress(1))
    torch.manual_seed(0)
    decisions = [GateDecision(logits, logits.softmax(-1)) for logits in torch.randn(2, 3, 2)]
    found = sum(made._regularisers(one, None, batch.real_B) for one, batch in zip(decisions, step, strict=True)) / 2
    entropies = torch.cat([entropy(one.weights)[real_B] for one, real_B in zip(decisions, real, strict=True)])
    torch.testing.assert_close(found, 0.5 * entropies.mean())
