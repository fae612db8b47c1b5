"""Multiplications of a Qwen3-VL-MoE's head, decoder and vision tower, for samples of one image each.

A backward takes twice its forward everywhere, so that the shares are those of a training step as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PretrainedConfig


class Flops(NamedTuple):
    """Of a forward; two a multiplication."""

    head: float
    decoder: float
    vision: float

    @property
    def shares(self) -> dict[str, float]:
        return {part: value / sum(self) for part, value in self._asdict().items()}


def forward_flops(config: PretrainedConfig, samples: Sequence[tuple[int, int]]) -> Flops:
    """Of samples of (tokens, image tokens among them), without padding, logits at every token.

    Counted are all matrix products, those of attention too: causal in the decoder, within an image in the tower.
    """
    text, vision = config.get_text_config(), config.vision_config
    merged = vision.spatial_merge_size**2
    a_token, an_image_token = decoder_weights(text), tower_weights(vision)
    head = decoder = tower = 0.0
    for tokens, of_image in samples:
        patches = of_image * merged
        head += tokens * text.hidden_size * text.vocab_size
        scores = tokens * tokens * text.num_attention_heads * text.head_dim  # both products, half of each is masked
        decoder += tokens * a_token + text.num_hidden_layers * scores
        tower += of_image * an_image_token + vision.depth * 2 * patches * patches * vision.hidden_size
    return Flops(2 * head, 2 * decoder, 2 * tower)


def decoder_weights(text: PretrainedConfig) -> int:
    """Weights that meet one token in the decoder layers: of the experts only the chosen ones."""
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    attention = heads * text.head_dim * text.hidden_size
    experts = 3 * text.num_experts_per_tok * text.moe_intermediate_size * text.hidden_size
    return text.num_hidden_layers * (attention + text.num_experts * text.hidden_size + experts)


def tower_weights(vision: PretrainedConfig) -> int:
    """Weights that meet the patches of one image token: embedding, blocks and mergers, one of these for the decoder's
    input and one for each of its layers that DeepStack feeds."""
    merged = vision.spatial_merge_size**2
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    wide = merged * vision.hidden_size
    mergers = (1 + len(vision.deepstack_visual_indexes)) * wide * (wide + vision.out_hidden_size)
    return merged * (values * vision.hidden_size + vision.depth * block) + mergers
