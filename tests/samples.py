"""Encoded samples for tests: changed ones (without their image, two joined into one), one with a video; and the loss of
each of a batch."""

import torch
import torch.nn.functional as F

from ds_moe.data.chat import Sample, Turn
from ds_moe.data.encode import Encoded, encode
from tests.data.clips import drawn, listed


def without_image(one, image_token_id):
    kept = one.input_ids != image_token_id
    return Encoded(one.input_ids[kept], one.labels[kept], one.prompt)


def joined(one, other):
    """One sample that holds the images and tokens of both."""
    parts = ("input_ids", "labels", "pixel_values", "image_grid_thw")
    tensors = {name: torch.cat([getattr(one, name), getattr(other, name)]) for name in parts}
    return Encoded(prompt=one.prompt, **tensors)


def filmed(processor, frames=5, seed=0):
    """A sample with a video, of 6 tokens for each two frames."""
    question = Turn("user", (listed(drawn(frames, 16, 24, seed)), "Which way?"))
    return encode(Sample((question, Turn("assistant", ("7",))), "film:1"), processor, 256, 2**20)


def losses(logits, batch):
    """(B,) the summed cross entropy of each sample, over the tokens that have a label."""
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), reduction="none")
    of_sample = batch.sequence_of_token[:, 1:].flatten()
    return torch.zeros(batch.samples).index_add(0, of_sample.clamp(min=0), torch.where(of_sample < 0, 0.0, each))
