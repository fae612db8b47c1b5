"""What the gate sees: features of the request (text) and of the screen (vision), as pure functions of tensors.

Shape suffixes of this folder, where they differ from the legend in `ds_moe/moe/decision.py`:

    K adapters    L decoder layers with a gate of their own    I images of a micro-batch    H width of the gate's MLP

D is the width of the text embeddings, which is also what the vision tower projects to. Features are fp32.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe.data.encode import NO_LOSS


@dataclass
class Features:
    """Features of B samples, the input of a `GateNetwork`."""

    text_BD: Tensor  # fp32, of the request; zeros for a sample without text
    vision_BD: Tensor  # fp32, (B, D) or (B, 2 D), of the screen; zeros for a sample without an image
    present_B: Tensor  # bool, whether the sample has an image
    token_BSD: Tensor | None = None  # embedding of every token, any float dtype; only for gates per token
    mask_BS: Tensor | None = None  # bool, the tokens of `token_BSD` that count; only for gates per token


def prompt_mask(
    input_ids_BS: Tensor, attention_mask_BS: Tensor | None, labels_BS: Tensor | None, not_text: Collection[int]
) -> Tensor:
    """(B, S) bool: true for the text tokens that a gate may look at. A row may have none.

    Args:
        attention_mask_BS: non-zero at real tokens, padding on either side; None: every token is real.
        labels_BS: unshifted labels. From a row's first label (!= -100) on, everything is hidden, because the gate must
            not read the answer that it helps to give. None: nothing is hidden, which only suits prompts.
        not_text: ids that are not text: image, video, vision start and end.
    """
    mask_BS = torch.ones_like(input_ids_BS, dtype=torch.bool)
    if attention_mask_BS is not None:
        mask_BS = attention_mask_BS != 0
    for token_id in not_text:
        mask_BS = mask_BS & (input_ids_BS != token_id)
    if labels_BS is not None:
        mask_BS = mask_BS & ((labels_BS != NO_LOSS).cumsum(1) == 0)
    return mask_BS


def mean_text(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, D) fp32: the mean of the tokens in the mask, zeros for rows without any. Other tokens may even be NaN."""
    total_BD = hidden_BSD.masked_fill(~mask_BS.unsqueeze(-1), 0.0).sum(1, dtype=torch.float32)
    return total_BD / mask_BS.sum(1, keepdim=True).clamp(min=1)


def last_text(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, D) fp32: the last token in the mask, zeros for rows without any."""
    position_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    return _pick(hidden_BSD, mask_BS, torch.where(mask_BS, position_S, -1).amax(1))


def first_text(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """(B, D) fp32: the first token in the mask, zeros for rows without any.

    These features say nothing about the request. Under causal attention the first token sees only itself, and it is
    the same `<|im_start|>` in every prompt, so that a gate can learn from it no more than how frequent each adapter is.
    The function serves to reproduce published gates, and as a control for the other features.
    """
    position_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    return _pick(hidden_BSD, mask_BS, torch.where(mask_BS, position_S, mask_BS.shape[1] - 1).amin(1))


def _pick(hidden_BSD: Tensor, mask_BS: Tensor, position_B: Tensor) -> Tensor:
    """(B, D) fp32: the token at each row's position; zeros for rows without a token in the mask."""
    row_B = torch.arange(len(position_B), device=position_B.device)
    picked_BD = hidden_BSD[row_B, position_B].float()
    return picked_BD.masked_fill(~mask_BS.any(1, keepdim=True), 0.0)


POOLS = {"embeddings": mean_text, "layer": mean_text, "last": last_text, "first": first_text}  # by `gate.text`


def image_counts(input_ids_BS: Tensor, image_token_id: int, vision_start_id: int) -> Tensor:
    """(B,) int64: the number of images of each sample. Never waits for the device.

    An image is a vision start that an image token follows; a video has other tokens.
    """
    starts = input_ids_BS[:, :-1] == vision_start_id
    return (starts & (input_ids_BS[:, 1:] == image_token_id)).sum(1)


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
