"""Attention over packed rows: every sample sees itself alone, and nothing of the size of a row squared is made.

A dense mask over a packed row of N tokens costs N^2 in time and memory, whatever the lengths of its samples. Here
torch's causal `scaled_dot_product_attention` runs sample by sample, so that the cost grows with the squares of their
lengths only. Padded rows are what transformers' `sdpa` makes of them; where they are padded on the right, it needs no
mask for that.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ds_moe.config.run import RunConfig
from ds_moe.distributed import SequenceGroup
from ds_moe.errors import UserError
from ds_moe.models.families import FAMILIES, family_of
from ds_moe.models.shared_rows import to_heads, to_tokens

BY_SAMPLE = "sdpa_by_sample"  # the name under which transformers knows the functions below


def check_packable(config: RunConfig, model_config: PretrainedConfig) -> None:
    """Raise `UserError` for a run that packs rows of a model which is not known to keep their samples apart."""
    if config.data.packing and not family_of(model_config).packs:
        known = ", ".join(name for name, family in FAMILIES.items() if family.packs)
        raise UserError(
            f"{config.at('data.packing')}: data.packing: samples in one row of a {model_config.model_type} model may "
            "mix, because its layers or its positions are not known to keep them apart; packing is exact for "
            f"{known} (set data.packing to false)"
        )


def attend_by_sample(model: PreTrainedModel) -> None:
    """Let the decoder of a model that uses `sdpa` attend sample by sample; any other attention stays.

    The vision tower keeps `sdpa`, whose model cuts its row into images itself.
    """
    family = family_of(model)
    if not family.packs:
        return
    config = model.get_submodule(family.decoder).config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = BY_SAMPLE


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    sample_lengths: tuple[int, ...] | None = None,
    row_group: SequenceGroup | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa_attention_forward` of every sample of a packed row, or of padded rows as they are.

    Args:
        query: (R, H, S, D).
        key, value: (R, G, S, D), G of the H heads.
        attention_mask: of `_mask`.
        cu_seq_lens_q: (B + 1,) where the samples of one packed row begin; None: rows are padded.
        sample_lengths: the same as lengths, on the host. None: they are read from `cu_seq_lens_q`, which waits for an
            accelerator.
        row_group: the ranks that share the row, of which the tokens here are one part and both arguments above tell
            all; None: it is this rank's alone.

    Returns:
        ((R, S, H, D), None)

    Raises:
        ValueError: positions begin anew within a row, and nothing says where its samples are; lengths of another
            number of tokens; a packed row whose layer has a mask of its own, such as a sliding window.
    """
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(
                "position_ids begin anew within a row, but cu_seq_lens_q is not given: attention would mix its samples"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.numel():
        raise ValueError("the samples of a packed row attend causally to all of themselves; this layer has a mask")
    lengths = list(sample_lengths or (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist())
    rows, tokens = query.shape[0], query.shape[2] * (row_group.size if row_group is not None else 1)
    if rows != 1 or sum(lengths) != tokens or key.shape[2] != query.shape[2]:
        raise ValueError(f"a packed batch has one row; lengths {lengths} do not lay out {rows} rows of {tokens} tokens")
    if row_group is not None:
        query, key, value = to_heads(query, key, value, row_group)
    heads = _Heads(query.shape[1] // key.shape[1], getattr(module, "is_causal", True))
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = [sdpa_attention_forward(heads, *sample, None, **kwargs)[0] for sample in zip(*parts, strict=True)]
    output = torch.cat(outputs, dim=1)
    return output if row_group is None else to_tokens(output, row_group), None


class _Heads(NamedTuple):
    """What `sdpa_attention_forward` reads of its module; that tells of all heads, and not of those on this rank."""

    num_key_value_groups: int  # heads of queries that read the same keys
    is_causal: bool


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `_attention` is given: none where causal attention needs none, else that of `sdpa`.

    transformers forbids the skip where it sees that the positions of a row begin anew. It does not say what else the
    decoder is called with, so such a row gets an empty mask, which `_attention` refuses unless it knows the samples.

    Where padding comes last, the tokens before it do not see it anyway, and nothing reads what it becomes itself.

    Args:
        local_size: tokens that a token sees, of layers with a sliding window; those keep the mask of `sdpa`.
        use_vmap: whether the caller has added a pattern of its own, which stays too.
    """
    causal = q_length == kv_length and local_size is None and not use_vmap
    if causal and attention_mask is None and batch_size == 1 and not allow_is_causal_skip:
        return torch.empty(0, dtype=torch.bool, device=kwargs["device"])
    if causal and attention_mask is not None and allow_is_causal_skip and attention_mask.shape[1] == q_length:
        if bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )


AttentionInterface.register(BY_SAMPLE, _attention)
AttentionMaskInterface.register(BY_SAMPLE, _mask)
