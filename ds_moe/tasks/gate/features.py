"""What the gate sees: features of the request (text) and of the screen (vision), as pure functions of tensors.

Shape suffixes of this folder, where they differ from the legend in `ds_moe/moe/decision.py`:

    K adapters    L decoder layers with a gate of their own    I images of a micro-batch    H width of the gate's MLP

D is the width of the text embeddings, which is also what the vision tower projects to. Features are fp32.

Tokens lie in padded rows, one sample each (R is B), or in one packed row (R is 1). `lengths` tells the two apart: the
tokens of each sample of a packed row, in order; None for padded rows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_moe.data.encode import NO_LOSS

Lengths = tuple[int, ...] | None


@dataclass
class Features:
    """Features of B samples, the input of a `GateNetwork`."""

    text_BD: Tensor  # fp32, of the request; zeros for a sample without text
    vision_BD: Tensor  # fp32, (B, D) or (B, 2 D), of the screen; zeros for a sample without an image
    present_B: Tensor  # bool, whether the sample has an image
    token_RSD: Tensor | None = None  # embedding of every token, any float dtype; this and the next for gates per token
    mask_RS: Tensor | None = None  # bool, the tokens of `token_RSD` that count
    sequence_S: Tensor | None = None  # int64, the sample of each token of a packed row; None: rows are padded


def of_samples(reduce: Callable[[Tensor, int], Tensor], values_RS: Tensor, lengths: Lengths) -> Tensor:
    """(B, ...): what `reduce`, which is given values and the dimension of tokens, makes of each sample's tokens."""
    if lengths is None:
        return reduce(values_RS, 1)
    return torch.cat([reduce(values, 1) for values in values_RS.split(lengths, dim=1)])


def in_rows(values_1S: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(B, longest, ...): what belongs to the tokens of a packed row, padded with zeros on the right."""
    return pad_sequence(list(values_1S.squeeze(0).split(lengths)), batch_first=True)


def sequence_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(S,) int64: the sample of each token of a packed row."""
    sequence_S = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return sequence_S.to(device, non_blocking=True)


def prompt_mask(
    input_ids_RS: Tensor,
    attention_mask_RS: Tensor | None,
    labels_RS: Tensor | None,
    not_text: Collection[int],
    lengths: Lengths = None,
) -> Tensor:
    """(R, S) bool: true for the text tokens that a gate may look at. A sample may have none.

    Args:
        attention_mask_RS: non-zero at real tokens, padding on either side; None: every token is real.
        labels_RS: unshifted labels. From a sample's first label (!= -100) on, everything of it is hidden, because the
            gate must not read the answer that it helps to give. None: nothing is hidden, which only suits prompts.
        not_text: ids that are not text: image, video, vision start and end.
    """
    mask_RS = torch.ones_like(input_ids_RS, dtype=torch.bool)
    if attention_mask_RS is not None:
        mask_RS = attention_mask_RS != 0
    for token_id in not_text:
        mask_RS = mask_RS & (input_ids_RS != token_id)
    if labels_RS is not None:
        labelled = (labels_RS != NO_LOSS).split(lengths or labels_RS.shape[1], dim=1)
        mask_RS = mask_RS & torch.cat([one.cumsum(1) == 0 for one in labelled], dim=1)
    return mask_RS


def mean_text(hidden_RSD: Tensor, mask_RS: Tensor, lengths: Lengths = None) -> Tensor:
    """(B, D) fp32: the mean of a sample's tokens in the mask, zeros if there are none. Other tokens may even be NaN."""
    kept_RSD = hidden_RSD.masked_fill(~mask_RS.unsqueeze(-1), 0.0)
    total_BD = of_samples(lambda one, dim: one.sum(dim, dtype=torch.float32), kept_RSD, lengths)
    return total_BD / of_samples(torch.sum, mask_RS, lengths).clamp(min=1).unsqueeze(1)


def last_text(hidden_RSD: Tensor, mask_RS: Tensor, lengths: Lengths = None) -> Tensor:
    """(B, D) fp32: a sample's last token in the mask, zeros if there is none."""
    position_S = torch.arange(mask_RS.shape[1], device=mask_RS.device)
    return _pick(hidden_RSD, mask_RS, of_samples(torch.amax, torch.where(mask_RS, position_S, -1), lengths), lengths)


def first_text(hidden_RSD: Tensor, mask_RS: Tensor, lengths: Lengths = None) -> Tensor:
    """(B, D) fp32: a sample's first token in the mask, zeros if there is none.

    These features say nothing about the request. Under causal attention the first token sees only itself, and it is
    the same `<|im_start|>` in every prompt, so that a gate can learn from it no more than how frequent each adapter is.
    The function serves to reproduce published gates, and as a control for the other features.
    """
    position_S = torch.arange(mask_RS.shape[1], device=mask_RS.device)
    first_RS = torch.where(mask_RS, position_S, mask_RS.shape[1] - 1)
    return _pick(hidden_RSD, mask_RS, of_samples(torch.amin, first_RS, lengths), lengths)


def _pick(hidden_RSD: Tensor, mask_RS: Tensor, position_B: Tensor, lengths: Lengths) -> Tensor:
    """(B, D) fp32: the token at each sample's position in its row; zeros for samples without a token in the mask."""
    row_B = torch.arange(len(position_B), device=position_B.device)
    picked_BD = hidden_RSD[row_B if lengths is None else 0, position_B].float()
    return picked_BD.masked_fill(~of_samples(torch.any, mask_RS, lengths).unsqueeze(1), 0.0)


POOLS = {"embeddings": mean_text, "layer": mean_text, "last": last_text, "first": first_text}  # by `gate.text`


def image_counts(input_ids_RS: Tensor, image_token_id: int, vision_start_id: int, lengths: Lengths = None) -> Tensor:
    """(B,) int64: the number of images of each sample. Never waits for the device.

    An image is a vision start that an image token follows; a video has other tokens.
    """
    starts_RS = (input_ids_RS[:, :-1] == vision_start_id) & (input_ids_RS[:, 1:] == image_token_id)
    return of_samples(torch.sum, F.pad(starts_RS, (0, 1)), lengths)


def mean_vision(pooled: Sequence[Tensor], counts_B: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(features (B, D) fp32, present (B,) bool): the mean over all vision tokens of all images of each sample.

    A large image has more tokens and so weighs more. A sample without an image gets zeros. This waits for the device
    once, to check the counts. The sums have the same order in every run, because there are no atomic additions.

    Args:
        pooled: (tokens, D) of each image of the micro-batch, in order: the `pooler_output` of `get_image_features`.
        counts_B: the images of each sample, from `image_counts`.

    Raises:
        ValueError: the counts do not sum to the number of images.
    """
    images = int(counts_B.sum())
    if images != len(pooled):
        raise ValueError(f"the prompts have {images} images, but the vision tower gave features of {len(pooled)}")
    if not pooled:
        return counts_B.new_zeros(len(counts_B), width, dtype=torch.float32), counts_B > 0
    total_ID = torch.stack([image.sum(0, dtype=torch.float32) for image in pooled])
    tokens_I = torch.tensor([len(image) for image in pooled], device=total_ID.device)
    end_B1 = counts_B.to(total_ID.device).cumsum(0).unsqueeze(1)
    start_B1 = end_B1 - counts_B.to(total_ID.device).unsqueeze(1)
    image_I = torch.arange(len(pooled), device=total_ID.device)
    own_BI = (start_B1 <= image_I) & (image_I < end_B1)
    # A matmul would compute 0 * NaN, and so spread a NaN to every sample.
    total_BD = torch.where(own_BI.unsqueeze(-1), total_ID, 0.0).sum(1)
    tokens_B = torch.where(own_BI, tokens_I, 0).sum(1)
    return total_BD / tokens_B.clamp(min=1).unsqueeze(1), tokens_B > 0


def vision_statistics(pooled: Sequence[Tensor], counts_B: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(features (B, 2 D), present (B,) bool): beside the means of `mean_vision` the standard deviations.

    A mean tells little about a screen's layout; the variation over the screen tells more (statistics pooling, Snyder et
    al. 2018, x-vectors).
    """
    mean_BD, present_B = mean_vision(pooled, counts_B, width)
    owner_I = torch.arange(len(counts_B), device=counts_B.device).repeat_interleave(counts_B).tolist()
    away = [(image.float() - mean_BD[owner]).square() for image, owner in zip(pooled, owner_I, strict=True)]
    variance_BD, _ = mean_vision(away, counts_B, width)
    return torch.cat([mean_BD, variance_BD.sqrt()], dim=1), present_B
