"""The gate: features of a prompt in, a weight for each of K adapters out. Shapes as in `features`.

All arithmetic is fp32, whatever the dtype to which an engine has cast the parameters, and under autocast too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.data.encode import NO_LOSS
from ds_moe.tasks.gate.features import Features

Select = Literal["soft", "top_k", "hard"]
Per = Literal["example", "layer", "token"]
Modalities = Literal["both", "text", "vision"]

FLAT, FLAT_SHARE = 0.1, 0.01  # least deviation of a feature, as a share of all features' and of their size
FIRST_LOGITS = 0.1  # about how far apart logits / temperature stand at step 0: a gate near uniform that still learns


@dataclass(frozen=True)
class GateSettings:
    """What a gate is made of. `dataclasses.asdict` gives a JSON-able dict, `GateSettings(**it)` the settings again.

    Raises:
        ValueError: values that no gate can have.
    """

    adapters: int  # K
    hidden_size: int  # D
    vision_size: int | None = None  # of the vision features; None: D too
    width: int = 128  # H
    select: Select = "soft"
    top_k: int | None = None  # adapters a decision, with select "top_k" only
    temperature: float = 1.0  # of the weights, not of the loss
    per: Per = "example"
    layers: int = 1  # L, with per "layer" only
    modalities: Modalities = "both"

    def __post_init__(self) -> None:
        if min(self.adapters, self.hidden_size, self.width, self.layers) < 1:
            raise ValueError(f"adapters, hidden_size, width and layers must be at least 1: {self}")
        for name, known in (("select", Select), ("per", Per), ("modalities", Modalities)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {get_args(known)}")
        if (self.select == "top_k") != (self.top_k is not None):
            raise ValueError(f"top_k={self.top_k} must be given with select 'top_k' and only there: {self.select!r}")
        if self.top_k is not None and not 1 <= self.top_k <= self.adapters:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and the number of adapters, {self.adapters}")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.per != "layer" and self.layers != 1:
            raise ValueError(f"layers={self.layers} needs per 'layer', not {self.per!r}")


class GateDecision(NamedTuple):
    """Both fp32 with grad, and of one shape: (B, K) per example, (B, L, K) per layer, (B, S, K) per token."""

    logits: Tensor
    weights: Tensor  # add up to 1 over the adapters


class Fp32Linear(nn.Linear):
    """Computes in fp32. Its own forward reads its weight: that is where ZeRO-3 has gathered it."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)


class Fp32LayerNorm(nn.LayerNorm):
    """Computes in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class Standardize(nn.Module):
    """(x - mean) / std of each feature, from the first batch that is trained on (as ActNorm, Kingma & Dhariwal 2018).

    Pooled features of different requests differ little beside what they have in common: without this most of a
    LayerNorm's output is the same for all, and a gate takes many times the steps. Until `fit` it changes nothing.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean.float()) / self.std.float()

    @torch.no_grad()
    def fit(self, count: Tensor, total_D: Tensor, squares_D: Tensor) -> None:
        """From sums over `count` samples; without any, nothing is changed."""
        if count == 0:
            return
        mean_D = total_D / count
        variance_D = (squares_D / count - mean_D.square()).clamp(min=0)
        # What hardly varies, beside the other features or beside its own size, is noise: it must not be blown up.
        least = torch.maximum(FLAT * variance_D.mean().sqrt(), FLAT_SHARE * mean_D.square().mean().sqrt())
        self.mean.copy_(mean_D)
        self.std.copy_(variance_D.sqrt().clamp(min=least.clamp(min=1e-6)))


class GateNetwork(nn.Module):
    """Standardize -> LayerNorm of each modality -> concatenation -> Linear -> GELU -> Linear.

    The first linear layer is kept as two, of the text and of vision with the presence flag, whose outputs add up: the
    same function, and a gate per token needs no copy of the vision features for each token. A sample without an image
    gets the learned `no_image` in place of its normalised vision features, and the flag 0.

    With one modality the other's inputs are zeros (no image anywhere, for vision); the parameters are the same ones,
    and each of them gets a gradient, if only of zeros.
    """

    def __init__(self, settings: GateSettings) -> None:
        super().__init__()
        self.settings = settings
        vision_size = settings.vision_size or settings.hidden_size
        self.text_scale, self.vision_scale = Standardize(settings.hidden_size), Standardize(vision_size)
        self.text_norm = Fp32LayerNorm(settings.hidden_size)
        self.vision_norm = Fp32LayerNorm(vision_size)
        self.no_image = nn.Parameter(torch.zeros(vision_size))  # where normalised features have their centre
        self.text_in = Fp32Linear(settings.hidden_size, settings.width)
        self.vision_in = Fp32Linear(vision_size + 1, settings.width, bias=False)
        self.out = Fp32Linear(settings.width, settings.layers * settings.adapters)
        # Small, not zero: at zero the layers below it would get no gradient in the first step.
        nn.init.normal_(self.out.weight, std=FIRST_LOGITS * min(1.0, settings.temperature) / settings.width**0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Features) -> GateDecision:
        """Decide.

        `select` "hard" draws Gumbel noise in training from the device's global random state.

        Raises:
            ValueError: a gate per token without the tokens' embeddings.
        """
        settings, text, vision_BD = self.settings, features.text_BD, features.vision_BD
        present_B1 = features.present_B.bool().unsqueeze(1)
        if settings.per == "token":
            if features.token_BSD is None:
                raise ValueError("a gate per token needs Features.token_BSD")
            text = features.token_BSD
        if settings.modalities == "vision":
            text = torch.zeros_like(text)
        if settings.modalities == "text":
            vision_BD, present_B1 = torch.zeros_like(vision_BD), torch.zeros_like(present_B1)
        with torch.autocast(text.device.type, enabled=False):
            vision_BD = torch.where(present_B1, self.vision_norm(self.vision_scale(vision_BD)), self.no_image.float())
            vision_BH = self.vision_in(torch.cat([vision_BD, present_B1.float()], dim=1))
            hidden = self.text_in(self.text_norm(self.text_scale(text)))  # (B, H) or (B, S, H)
            logits = self.out(F.gelu(hidden + (vision_BH.unsqueeze(1) if settings.per == "token" else vision_BH)))
            if settings.per == "layer":
                logits = logits.unflatten(-1, (settings.layers, settings.adapters))
            return GateDecision(logits, select(logits, settings, self.training))


def select(logits: Tensor, settings: GateSettings, training: bool) -> Tensor:
    """Weights of the adapters (last dimension), of the shape of the logits. NaN logits give NaN weights.

    soft: softmax(logits / temperature).
    top_k: the same over the k largest, renormalised, zeros elsewhere. With k = 1 the weight is the constant 1, so that
    nothing but `gate_loss` teaches the gate; "hard" is the choice of one that learns from the model's loss.
    hard: one-hot with the gradient of the softmax (straight-through); in training of logits + Gumbel noise (a sample).
    Ties: exactly k, or one, are chosen; which of the tied is torch's choice.
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
    return one_hot + (soft - soft.detach())  # the bracket is exactly 0, or NaN


def gate_loss(
    decision: GateDecision, labels_B: Tensor, mask_BS: Tensor | None = None, class_weights: Tensor | None = None
) -> Tensor:
    """The sum over samples of weight * cross entropy of the adapter label, an fp32 scalar, for the trainer to divide.

    The logits are taken at temperature 1. Per layer it is averaged over the layers, per token over the mask's tokens of
    each sample (a sample without any adds 0).

    Args:
        decision: of any gate.
        labels_B: int64 adapter of each sample, -100 for none (adds 0).
        mask_BS: the tokens that count, for gates per token and only there; None: all, padding included.
        class_weights: (K,) weight of a sample of each adapter; None: 1.
    """
    logits = decision.logits.float()
    weights = None if class_weights is None else class_weights.to(logits)
    labels = labels_B if logits.dim() == 2 else labels_B.unsqueeze(1).expand(logits.shape[:2])
    losses = F.cross_entropy(logits.movedim(-1, 1), labels, weights, ignore_index=NO_LOSS, reduction="none")
    return _per_sample(losses, mask_BS).sum()


def entropy(weights: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B,) fp32 entropy of the gate in nats, averaged over layers, or tokens of the mask. 0 for one-hot weights.

    The gradient is finite at weights of 0 too.
    """
    weights = weights.float()
    logs = weights.clamp(min=torch.finfo(torch.float32).tiny).log()
    return _per_sample(-(weights * logs).sum(-1), mask_BS)


def divergence(logits: Tensor, reference_logits: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    """(B,) fp32 KL(softmax(reference) || softmax(logits)) in nats, averaged over layers, or tokens of the mask.

    The reference is the supervised gate, without a gradient. It stands on the left because this direction is large
    wherever the gate gives up an adapter that the reference uses, and its gradient, softmax(logits) -
    softmax(reference), is as strong for a collapsed gate as for any. The other direction's gradient carries a factor of
    the gate's own probability: an adapter that has gone to 0 would never be called back. Both at temperature 1.
    """
    target = reference_logits.detach().float().log_softmax(-1)
    losses = F.kl_div(logits.float().log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return _per_sample(losses, mask_BS)


def _per_sample(values: Tensor, mask_BS: Tensor | None) -> Tensor:
    """(B,) from (B,) or (B, L or S): the mean of each row, over the mask's entries (0 without any) if given."""
    if mask_BS is None:
        return values if values.dim() == 1 else values.mean(1)
    if mask_BS.shape != values.shape:
        raise ValueError(f"a mask of tokens, {tuple(mask_BS.shape)}, for a gate that is not per token: {values.shape}")
    return values.masked_fill(~mask_BS.bool(), 0.0).sum(1) / mask_BS.bool().sum(1).clamp(min=1)
