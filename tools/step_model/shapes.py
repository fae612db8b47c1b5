"""Shapes of Qwen3-MoE text decoders: read from a config, counted in parameters and in FLOPs of the model's own.

The vision tower of a Qwen3-VL-MoE is left out: its cost depends on the images.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe.errors import UserError


@dataclass(frozen=True)
class Decoder:
    """A decoder with SwiGLU experts: D model width, F expert width, E experts of which a token chooses K."""

    name: str
    D: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    F: int
    E: int
    K: int
    vocabulary: int
    dense_layers: int = 0  # of `layers`, those with one SwiGLU of width `dense_F` instead of experts
    dense_F: int = 0
    tied: bool = False  # the output layer is the embedding

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers


KEYS = {  # field of `Decoder` -> key of a config
    **{"D": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"},
    **{"kv_heads": "num_key_value_heads", "F": "moe_intermediate_size", "K": "num_experts_per_tok"},
    "vocabulary": "vocab_size",
}
# Figures of the models' config.json on the hub (the text_config of Qwen3-VL-MoE equals Qwen3-MoE's of the same name),
# and of the model that `tools.bench.step.bench` trains on CPUs.
_QWEN3 = {"kv_heads": 4, "head_dim": 128, "E": 128, "K": 8, "vocabulary": 151_936}
PRESETS = {
    decoder.name: decoder
    for decoder in (
        Decoder("qwen3-vl-30b-a3b", D=2048, layers=48, heads=32, F=768, **_QWEN3),
        Decoder("qwen3-vl-235b-a22b", D=4096, layers=94, heads=64, F=1536, **_QWEN3),
        Decoder("tiny-64", D=256, layers=4, heads=8, kv_heads=4, head_dim=32, F=384, E=64, K=2, vocabulary=1000),
    )
}


def read_decoder(name: str) -> Decoder:
    """A preset, or the text model of a transformers config.json (the file or its folder)."""
    if name in PRESETS:
        return PRESETS[name]
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise UserError(f"--model {name}: neither one of {', '.join(PRESETS)} nor a config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"--model {file}: no JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"--model {file}: no object of a config's keys")
    return from_config(config, str(file))


def from_config(config: dict[str, Any], name: str) -> Decoder:
    """The decoder of a config's keys as transformers writes them; `name` is for messages."""
    text = config.get("text_config") or config
    experts = text.get("num_experts") or text.get("num_local_experts")
    if not experts:
        raise UserError(f"{name}: no num_experts; this estimates Mixture-of-Experts decoders")
    try:
        layers, step = text["num_hidden_layers"], text.get("decoder_sparse_step") or 1
        only_mlp = text.get("mlp_only_layers") or []
        dense = sum(layer in only_mlp or (layer + 1) % step != 0 for layer in range(layers))
        return Decoder(
            name,
            **{field: text[key] for field, key in KEYS.items()},
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            E=experts,
            dense_layers=dense,
            dense_F=text["intermediate_size"] if dense else 0,
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )
    except KeyError as error:
        raise UserError(f"{name}: no {error.args[0]} in its text model") from error


def attention_parameters(decoder: Decoder) -> int:
    """Of one layer: q, k, v and o projections, the norms of q and k heads, the two norms of the layer."""
    width = decoder.head_dim * (2 * decoder.heads + 2 * decoder.kv_heads)
    return decoder.D * width + 2 * decoder.head_dim + 2 * decoder.D


def expert_parameters(decoder: Decoder) -> int:
    """Of one expert: gate_up (2F, D) and down (D, F)."""
    return 3 * decoder.D * decoder.F


def layer_parameters(decoder: Decoder, experts: float) -> float:
    """Of one MoE layer that holds `experts` experts."""
    return attention_parameters(decoder) + decoder.D * decoder.E + experts * expert_parameters(decoder)


def other_parameters(decoder: Decoder) -> int:
    """All but the experts of the MoE layers."""
    dense_mlp = decoder.dense_layers * 3 * decoder.D * decoder.dense_F
    routers = decoder.moe_layers * decoder.D * decoder.E
    tables = (1 if decoder.tied else 2) * decoder.vocabulary * decoder.D
    return decoder.layers * attention_parameters(decoder) + dense_mlp + routers + tables + decoder.D


def parameters(decoder: Decoder) -> int:
    return other_parameters(decoder) + decoder.moe_layers * decoder.E * expert_parameters(decoder)


def active_parameters(decoder: Decoder) -> int:
    """Those that one token uses: K experts a layer, both tables."""
    return other_parameters(decoder) + decoder.moe_layers * decoder.K * expert_parameters(decoder)


def score_flops(decoder: Decoder, tokens: int, sequence: int) -> float:
    """Forward of one layer's q k^T and softmax v: 2 T C H FLOPs a key each; causal: (S + 1) / 2 keys a token."""
    return 4 * tokens * (sequence + 1) / 2 * decoder.heads * decoder.head_dim


def forward_flops(decoder: Decoder, tokens: int, sequence: int) -> float:
    """FLOPs of `tokens` tokens in sequences of `sequence`: 2 a token and weight of a matrix, and attention scores."""
    norms = decoder.layers * 2 * (decoder.head_dim + decoder.D) + decoder.D
    embedding = 0 if decoder.tied else decoder.vocabulary * decoder.D
    weights = active_parameters(decoder) - norms - embedding
    return 2 * tokens * weights + decoder.layers * score_flops(decoder, tokens, sequence)
