"""Encoded samples changed for tests: without their image, or two joined into one; and the loss of each of a batch."""

import torch
import torch.nn.functional as F

from ds_moe.data.encode import Encoded


def without_image(one, image_token_id):
    kept = one.input_ids != image_token_id
    return Encoded(one.input_ids[kept], one.labels[kept], one.prompt)


def joined(one, other):
    """One sample that holds the images and tokens of both."""
    parts = ("input_ids", "labels", "pixel_values", "image_grid_thw")
    tensors = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in parts}
    return Encoded(prompt=one.prompt, **tensors)


def losses(logits, batch):
    """(B,) the summed cross entropy of each sample, over the tokens that have a label."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), reduction="none")
    of_sample = batch.sequence_of_token[:, 1:].flatten()
    return torch.zeros(batch.samples).index_add(0, of_sample.clamp(min=0), torch.where(of_sample < 0, 0.0, each))
