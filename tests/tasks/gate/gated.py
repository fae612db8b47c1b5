"""A gated tiny Qwen3-VL with adapters and a gate that have learned something, and requests with real images for it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ds_moe.config.tasks import GateConfig
from ds_moe.data.chat import Sample, Turn
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, collate, encode
from ds_moe.models.processor import tiny_processor
from ds_moe.tasks.gate.model import install_gate
from ds_moe.tasks.gate.network import GateDecision
from tests.tasks.gate.lora_folders import base

PROCESSOR = tiny_processor("vl")


class Fixed(nn.Module):
    """In place of the router: these weights for every request."""

    def __init__(self, router, weights_K):
        super().__init__()
        self.settings, self.weights_K = router.settings, weights_K

    def forward(self, features):
        weights_BK = self.weights_K.expand(len(features.text_BD), -1)
        return GateDecision(weights_BK, weights_BK)


def fixed(model, weights_K):
    model.adapter_gate = Fixed(model.adapter_gate, weights_K)
    model.adapter_bank.gates.per = "example"
    return model


def gated(folder: Path, model=None, strength=4.0, **keys):
    """The adapters of `folder`, made stronger, and a gate `keys` in a model; its weights are far from even and differ
    by request."""
    torch.manual_seed(10)
    model = base() if model is None else model
    install_gate(model, GateConfig(adapters_in=str(folder), **keys))
    with torch.no_grad():
        for layer in model.adapter_bank.layers.values():
            layer.lora_B *= strength
        for parameter in model.adapter_gate.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        for buffer in model.adapter_gate.buffers():
            buffer += 0.1 * torch.rand(buffer.shape)
        router = model.eval().adapter_gate
        router.out.weight /= 3
        router.out.bias -= model(**batch(), gate_only=True).logits.reshape(-1, len(router.out.bias)).mean(0)
    return model


def sample(images: int, question: str, answer: str) -> Sample:
    pictures = [one.images[0] for one in digits_samples("train")[:: 3 * 7][:images]]
    return Sample((Turn("user", (*pictures, question)), Turn("assistant", (answer,))), where="test:1")


SAMPLES = [
    digits_samples("train")[0],
    sample(0, "Even or odd?", "yes and no"),
    sample(2, "Which of these two images, tell me, is it?", "yes or no"),
    sample(0, "Which number is written, and what do you see?", "7"),
    digits_samples("train")[16],
]
WITHOUT_IMAGES = [SAMPLES[1], SAMPLES[3]]


def encoded(samples: list[Sample] = SAMPLES) -> list[Encoded]:
    return [encode(one, PROCESSOR, 512, 10**6) for one in samples]


def batch(samples: list[Sample] = SAMPLES) -> dict[str, Tensor]:
    """Arguments of a forward as training gives them: right-padded, with labels."""
    return collate(encoded(samples), PROCESSOR).with_labels
