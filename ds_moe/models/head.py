"""The output layer where labels are: log-probs of the labelled tokens in place of logits of all.

Logits are the largest tensor of a step: for 4,096 tokens of a vocabulary of 151,936, fp32 cross entropy peaks at 7 GiB.
Here hidden states of positions without a label never reach the output layer, and those with one reach it a tile at a
time, in forward and again in backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ds_moe.data.batch import NO_LOSS

# Bytes of a tile's logits. Its backward holds four tensors of that size in PyTorch, two in DeepSpeed's Triton kernel;
# an accelerator needs some hundred rows to keep busy beside reading the weight and adding to its gradient.
TILE_BYTES = {"cpu": 2**26}
ACCELERATOR_TILE_BYTES = 2**28

Term = tuple[Tensor, Tensor]  # x (N, d) and W (V, d): logits are the sum of x W^T over the terms of an output layer


def at_labels(
    model: nn.Module,
    inputs: dict[str, Tensor],
    labels_RS: Tensor,
    *,
    next_R: Tensor | None = None,
    temperature: float = 1.0,
    num_items: float = 1,
    fp32_logits: bool = False,
) -> ModelOutput:
    """Run a model's forward; logits are computed of the N positions that a label follows, and never kept.

    Args:
        model: a causal language model of transformers, or the DeepSpeed engine around one. It must be called by all
            ranks together where weights are sharded; a rank without any label takes part like the others.
        labels_RS: int64, NO_LOSS where no loss is taken. Nothing predicts the first token of a row.
        next_R: int64, the label of the token behind each row, for rows that are parts of longer ones.
        temperature: logits are divided by it, in fp32.
        num_items: what the sum of losses is divided by.
        fp32_logits: keep the fp32 that products are summed in, where weights are of another dtype: for log-probs that
            are compared with those of another program, which rounds logits by itself.

    Returns:
        The model's output. Its `loss` is the cross entropy, summed over the labels and divided by `num_items`; its
        `logits` are the labels' log-probabilities, fp32 (N,), row by row. Both have a gradient.
    """
    target_RS = targets_of(labels_RS, next_R)
    keep_RS = target_RS != NO_LOSS
    target_N = target_RS[keep_RS]
    inner = cast(PreTrainedModel, getattr(model, "module", model))
    head = inner.get_output_embeddings()

    def of_labels(hidden_ND: Tensor) -> Tensor:
        return label_logprobs(_terms(head, hidden_ND, keep_RS), target_N, temperature, fp32_logits)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: float, **unused: object) -> Tensor:
        return (-logits.sum(dtype=torch.float64) / num_items_in_batch).to(logits.dtype)

    # The head is still called as a module, because hooks on it gather and release its weight under ZeRO-3.
    with _in_place_of(inner, head, of_labels, loss):
        return model(**inputs, labels=labels_RS, use_cache=False, logits_to_keep=keep_RS, num_items_in_batch=num_items)


def targets_of(labels_RS: Tensor, next_R: Tensor | None = None) -> Tensor:
    """The label that each position predicts, (R, S): the next token's; at the end of a row `next_R`, else NO_LOSS."""
    if next_R is not None:
        return torch.cat([labels_RS[:, 1:], next_R.unsqueeze(1)], dim=1)
    return F.pad(labels_RS[:, 1:], (0, 1), value=NO_LOSS)


@contextmanager
def _in_place_of(
    model: PreTrainedModel,
    head: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loss: Callable[..., Tensor],
) -> Iterator[None]:
    """The output layer computes `forward`, and the model its loss by `loss`."""
    own = model.loss_function
    head.forward, model.loss_function = forward, loss
    try:
        yield
    finally:
        del head.forward
        model.loss_function = own


def label_logprobs(
    terms: Sequence[Term], target_N: Tensor, temperature: float = 1.0, fp32_logits: bool = False
) -> Tensor:
    """Log-probabilities (N,) fp32 of the tokens `target_N` under the logits that the terms make; with grad to both.

    The gradient of a weight is added up in the weight's dtype over tiles.
    """
    return _LabelLogprobs.apply(target_N, temperature, fp32_logits, *[tensor for term in terms for tensor in term])


def _terms(head: nn.Module, hidden_ND: Tensor, keep_RS: Tensor) -> list[Term]:
    """The output layer as a sum of products. A layer of another kind tells its terms by a method of this name."""
    if hasattr(head, "terms"):
        return head.terms(hidden_ND, keep_RS)
    if isinstance(head, LoraLayer):
        terms = _terms(head.base_layer, hidden_ND, keep_RS)
        for name in head.active_adapters:
            down, up = head.lora_A[name], head.lora_B[name].weight
            update_NR = down(head.lora_dropout[name](hidden_ND.to(down.weight.dtype))) * head.scaling[name]
            terms.append((update_NR.to(up.dtype), up))
        return terms
    if not isinstance(head, nn.Linear):
        raise TypeError(f"an output layer of type {type(head).__name__} is not known")
    terms = [(hidden_ND, head.weight)]
    if head.bias is not None:
        terms.append((hidden_ND.new_ones(len(hidden_ND), 1), head.bias.unsqueeze(1)))
    return terms


class _LabelLogprobs(torch.autograd.Function):
    """Keeps the terms for the backward pass and no logits; adds up the gradients of a weight in place."""

    @staticmethod
    def forward(ctx, target_N: Tensor, temperature: float, fp32_logits: bool, *terms: Tensor) -> Tensor:
        ctx.save_for_backward(target_N, *terms)
        ctx.temperature, ctx.dtype = temperature, torch.float32 if fp32_logits else terms[0].dtype
        logprob_N = torch.empty(len(target_N), dtype=torch.float32, device=target_N.device)
        for tile in _tiles(target_N, terms, ctx.dtype):
            logprob_N[tile] = -_cross_entropy(_logits(terms, tile, ctx.dtype), target_N[tile], temperature)
        return logprob_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        target_N, *terms = ctx.saved_tensors
        grads = [
            torch.zeros_like(one) if needed else None
            for one, needed in zip(terms, ctx.needs_input_grad[3:], strict=True)
        ]
        for tile in _tiles(target_N, terms, ctx.dtype):
            logits_TV = _logits(terms, tile, ctx.dtype).requires_grad_()
            with torch.enable_grad():
                loss_T = _cross_entropy(logits_TV, target_N[tile], ctx.temperature)
            (grad_TV,) = torch.autograd.grad(loss_T, logits_TV, -grad_N[tile])
            del logits_TV, loss_T
            grad_TV = grad_TV.to(terms[0].dtype)
            pairs = zip(terms[::2], terms[1::2], grads[::2], grads[1::2], strict=True)
            for x, weight, of_x, of_weight in pairs:
                if of_x is not None:
                    torch.mm(grad_TV, weight, out=of_x[tile])
                if of_weight is not None:
                    of_weight.addmm_(grad_TV.T, x[tile])
        return None, None, None, *grads


def _tiles(target_N: Tensor, terms: Sequence[Tensor], dtype: torch.dtype) -> list[slice]:
    size = TILE_BYTES.get(target_N.device.type, ACCELERATOR_TILE_BYTES)
    rows = max(1, size // (len(terms[1]) * dtype.itemsize))
    return [slice(start, start + rows) for start in range(0, len(target_N), rows)]


def _logits(terms: Sequence[Tensor], tile: slice, dtype: torch.dtype) -> Tensor:
    x_Td, weight_dV = terms[0][tile], terms[1].T
    if dtype == x_Td.dtype:
        logits_TV = x_Td @ weight_dV
    elif x_Td.is_cuda:
        logits_TV = torch.mm(x_Td, weight_dV, out_dtype=dtype)
    else:
        logits_TV = x_Td.to(dtype) @ weight_dV.to(dtype)
    for x, weight in zip(terms[2::2], terms[3::2], strict=True):
        logits_TV.addmm_(x[tile].to(logits_TV.dtype), weight.T.to(logits_TV.dtype))
    return logits_TV


def _cross_entropy(logits_TV: Tensor, target_T: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits_TV = logits_TV.float() / temperature
    return chunked_cross_entropy(logits_TV, target_T, reduction="none")
