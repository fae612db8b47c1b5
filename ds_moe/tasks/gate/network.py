"""The gate turns the features of a prompt into a weight for each of K adapters. Shapes are those of `features.py`.

All arithmetic is fp32, also under autocast and if an engine has cast the parameters to another dtype.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.data.encode import NO_LOSS
from ds_moe.tasks.gate.features import Features

FLAT, FLAT_SHARE = 0.1, 0.01  # least deviation of a feature, as shares of all features' deviation and of their size
FIRST_LOGITS = 0.1  # rough deviation of logits / temperature at step 0: the gate is near uniform, and can still learn


@dataclass(frozen=True)
class GateSettings:
    """The sizes and options of a gate. `dataclasses.asdict` makes a JSON-able dict of them.

    Raises:
        ValueError: `top_k` beyond the adapters; `GateConfig` and its rules refuse what else no gate can have.
    """

    adapters: int  # K
    hidden_size: int  # D
    vision_size: int | None = None  # of the vision features; None: D too
    width: int = 128  # H
    select: Literal["soft", "top_k", "hard"] = "soft"
    top_k: int | None = None  # adapters that a decision uses, with select "top_k" only
    temperature: float = 1.0  # of the weights; the loss is taken at temperature 1
    per: Literal["example", "layer", "token"] = "example"
    layers: int = 1  # L, with per "layer" only
    modalities: Literal["both", "text", "vision"] = "both"

    def __post_init__(self) -> None:
        if self.top_k is not None and not 1 <= self.top_k <= self.adapters:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and the number of adapters, {self.adapters}")


class GateDecision(NamedTuple):
    """fp32 logits and weights with grad: both (B, K) per example, (B, L, K) per layer, or (R, S, K) per token."""

    logits: Tensor
    weights: Tensor  # sum to 1 over the adapters


class Fp32Linear(nn.Linear):
    """Computes in fp32. The weight is read in this module's own forward, for which ZeRO-3 has gathered it."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class Fp32LayerNorm(nn.LayerNorm):
    """Computes in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Standardize(nn.Module):
    """(x - mean) / std of each feature, where `fit` sets mean and std (as in ActNorm, Kingma & Dhariwal 2018).

    Pooled features of different requests have much in common and differ little. A LayerNorm alone would make nearly the
    same output of all of them, and a gate would need many times the steps. Before `fit`, features are not changed.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean.float()) / self.std.float()

    @torch.no_grad()
    def fit(self, count: Tensor, total_D: Tensor, squares_D: Tensor) -> None:
        """Set mean and std from sums over `count` samples of the first batch; 0 samples change nothing."""
        if count == 0:
            return
        mean_D = total_D / count
        variance_D = (squares_D / count - mean_D.square()).clamp(min=0)
        # A feature that varies far less than the others, or than its size, is noise, which must not be amplified.
        least = torch.maximum(FLAT * variance_D.mean().sqrt(), FLAT_SHARE * mean_D.square().mean().sqrt())
        self.mean.copy_(mean_D)
        self.std.copy_(variance_D.sqrt().clamp(min=least.clamp(min=1e-6)))


class GateNetwork(nn.Module):
    """Standardize -> LayerNorm of each modality -> concatenation -> Linear -> GELU -> Linear.

    The first linear layer consists of two, one for text and one for vision with the presence flag, whose outputs are
    summed. That is the same function, and a gate per token then needs no copy of the vision features for each token. A
    sample without an image gets the learned `no_image` in place of its normalised vision features, and the flag 0.

    With only one modality, the inputs of the other are zeros (for vision: no sample has an image). The parameters are
    the same, and each of them gets a gradient, which may be zero.
    """

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        self.settings = settings
        vision_size = settings.vision_size or settings.hidden_size
        self.text_scale, self.vision_scale = Standardize(settings.hidden_size), Standardize(vision_size)
        self.text_norm = Fp32LayerNorm(settings.hidden_size)
        self.vision_norm = Fp32LayerNorm(vision_size)
        self.no_image = nn.Parameter(torch.zeros(vision_size))  # zero is the centre of normalised features
        self.text_in = Fp32Linear(settings.hidden_size, settings.width)
        self.vision_in = Fp32Linear(vision_size + 1, settings.width, bias=False)
        self.out = Fp32Linear(settings.width, settings.layers * settings.adapters)
        # Weights of zero would give the layers below no gradient in the first step.
        nn.init.normal_(self.out.weight, std=FIRST_LOGITS * min(1.0, settings.temperature) / settings.width**0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Features) -> GateDecision:
        """Decide. In training, `select` "hard" draws Gumbel noise from the device's global random state.

        Raises:
            ValueError: a gate per token without the tokens' embeddings.
        """
        settings, text, vision_BD = self.settings, features.text_BD, features.vision_BD
        present_B1 = features.present_B.bool().unsqueeze(1)
        if settings.per == "token":
            if features.token_RSD is None:
                raise ValueError("a gate per token needs Features.token_RSD")
            text = features.token_RSD
        if settings.modalities == "vision":
            text = torch.zeros_like(text)
        if settings.modalities == "text":
            vision_BD, present_B1 = torch.zeros_like(vision_BD), torch.zeros_like(present_B1)
        with torch.autocast(text.device.type, enabled=False):
            vision_BD = torch.where(present_B1, self.vision_norm(self.vision_scale(vision_BD)), self.no_image.float())
            vision_BH = self.vision_in(torch.cat([vision_BD, present_B1.float()], dim=1))
            if settings.per == "token":  # (R, 1 or S, H)
                sequence_S = features.sequence_S
                vision_BH = vision_BH.unsqueeze(1) if sequence_S is None else vision_BH[sequence_S].unsqueeze(0)
            hidden = self.text_in(self.text_norm(self.text_scale(text)))  # (B, H) or (R, S, H)
            logits = self.out(F.gelu(hidden + vision_BH))
            if settings.per == "layer":
                logits = logits.unflatten(-1, (settings.layers, settings.adapters))
            return GateDecision(logits, select(logits, settings, self.training))


def select(logits: Tensor, settings: GateSettings, training: bool) -> Tensor:
    """Turn logits into weights of the same shape; adapters are the last dimension. NaN logits give NaN weights.

    soft: softmax(logits / temperature).
    top_k: the same over the k largest logits, and zeros elsewhere. With k = 1 the weight is the constant 1, so that
    only `gate_loss` teaches the gate; to choose one adapter and learn from the model's loss, use "hard".
    hard: one-hot, with the gradient of the softmax (straight-through); in training of logits + Gumbel noise (a sample).
    Among tied logits, torch decides which are chosen; their number is exact.
    """
    if settings.select == "top_k":
        chosen = logits.topk(settings.top_k or 1, dim=-1).indices
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
        return torch.softmax(logits.masked_fill(~kept, float("-inf")) / settings.temperature, dim=-1)
    if settings.select == "soft":
        return torch.softmax(logits / settings.temperature, dim=-1)
    if training:
        logits = logits - torch.empty_like(logits).exponential_().log()
    soft = torch.softmax(logits / settings.temperature, dim=-1)
    one_hot = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())  # the difference is exactly 0, or NaN


def gate_loss(
    decision: GateDecision, labels_B: Tensor, mask_BS: Tensor | None = None, class_weights: Tensor | None = None
) -> Tensor:
    """The sum over samples of weight * cross entropy of the adapter label: an fp32 scalar, which the trainer divides.

    The logits are taken at temperature 1. For a gate per layer, a sample's loss is averaged over the layers; for a gate
    per token, over the sample's tokens in the mask (a sample without any adds 0).

    Args:
        labels_B: int64 adapter of each sample; -100: none, which adds 0.
        mask_BS: the tokens that count, for gates per token only; None: all, including padding.
        class_weights: (K,) weight of a sample of each adapter; None: 1.
    """
    logits = decision.logits.float()
    weights = None if class_weights is None else class_weights.to(logits)
    labels = labels_B if logits.dim() == 2 else labels_B.unsqueeze(1).expand(logits.shape[:2])
    losses = F.cross_entropy(logits.movedim(-1, 1), labels, weights, ignore_index=NO_LOSS, reduction="none")
    return _per_sample(losses, mask_BS).sum()


def entropy(weights: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B,) fp32 entropy of the gate in nats, averaged over layers, or over tokens of the mask. 0 for one-hot weights.

    The gradient is finite, even at weights of 0.
    """
    weights = weights.float()
    logs = weights.clamp(min=torch.finfo(torch.float32).tiny).log()
    return _per_sample(-(weights * logs).sum(-1), mask_BS)


def divergence(logits: Tensor, reference_logits: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B,) fp32 KL(softmax(reference) || softmax(logits)) in nats, averaged over layers, or over tokens of the mask.

    The reference is the supervised gate, without a gradient; both are taken at temperature 1. In this direction the
    divergence is large if the gate gives up an adapter that the reference uses, and the gradient, softmax(logits) -
    softmax(reference), does not vanish for a collapsed gate. In the other direction the gradient has the gate's own
    probability as a factor, so that an adapter whose probability has become 0 would never return.
    """
    target = reference_logits.detach().float().log_softmax(-1)
    losses = F.kl_div(logits.float().log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return _per_sample(losses, mask_BS)


def _per_sample(values: Tensor, mask_BS: Tensor | None) -> Tensor:
    """(B,) from (B,) or (B, L or S): the mean of each row; with a mask, over its true entries (0 if there are none)."""
    if mask_BS is None:
        return values if values.dim() == 1 else values.mean(1)
    if mask_BS.shape != values.shape:
        raise ValueError(f"a mask of tokens, {tuple(mask_BS.shape)}, for a gate that is not per token: {values.shape}")
    return values.masked_fill(~mask_BS.bool(), 0.0).sum(1) / mask_BS.bool().sum(1).clamp(min=1)
