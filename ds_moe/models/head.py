"""The output layer where labels are: log-probs of the labelled tokens in place of logits of all.

Logits are the largest tensor of a step: for 4,096 tokens of a vocabulary of 151,936, fp32 cross entropy peaks at 7 GiB.
Here hidden states of positions without a label never reach the output layer, and those with one reach it a tile at a
time, in forward and again in backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ds_moe.data.batch import NO_LOSS
from ds_moe.errors import UserError

# Bytes of a tile's logits. Its backward holds four tensors of that size in PyTorch, two in DeepSpeed's Triton kernel;
# an accelerator needs some hundred rows to keep busy beside reading the weight and adding to its gradient.
TILE_BYTES = {"cpu": 2**26}
ACCELERATOR_TILE_BYTES = 2**28

SMALL = 2.0**-20  # see `LogitsForm.sent`; a power of two, so that nothing is rounded

Term = tuple[Tensor, Tensor]  # x (N, d) and W (V, d): logits are the sum of x W^T over the terms of an output layer


@dataclass(frozen=True)
class LogitsForm:
    """What a model makes of its output layer's products before they are its logits, by keys of its config.

    Attributes:
        scale: of Granite and Cohere: logits are multiplied by it.
        cap: of Gemma and others: logits x become `cap * tanh(x / cap)`; None: they are not limited.
        vocabulary: how many of the output layer's rows are tokens; None: all.
    """

    scale: float = 1.0
    cap: float | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> "LogitsForm":
        text: Any = config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1.0
        scale /= getattr(text, "logits_scaling", None) or 1.0
        return cls(scale, getattr(text, "final_logit_softcapping", None), getattr(text, "unpadded_vocab_size", None))

    def logits(self, products_TV: Tensor) -> Tensor:
        """The logits (T, V), in fp32 unless they are the products themselves."""
        if self == PLAIN:
            return products_TV
        logits_TV = products_TV[:, : self.vocabulary].float() * self.scale
        return logits_TV if self.cap is None else torch.tanh(logits_TV / self.cap) * self.cap

    def sent(self, logprob_N: Tensor) -> Tensor:
        """What the output layer gives in place of products: what the model makes of it can be undone.

        Log-probs are made so small that a limit leaves them as they are, in a last dimension that nothing is cut off.
        """
        small_N = logprob_N if self.cap is None else logprob_N * SMALL
        return small_N if self.vocabulary is None else small_N.unsqueeze(-1)

    def received(self, logits: Tensor) -> Tensor:
        """The log-probs (N,) in what the model has made of `sent`, with a gradient through it."""
        found_N = logits if self.vocabulary is None else logits.squeeze(-1)
        factor = self.scale * (1.0 if self.cap is None else SMALL)
        return found_N if factor == 1.0 else found_N / factor


PLAIN = LogitsForm()


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

    Raises:
        UserError: the model computes its logits otherwise than `LogitsForm` reads off its config.
    """
    target_RS = targets_of(labels_RS, next_R)
    keep_RS = target_RS != NO_LOSS
    target_N = target_RS[keep_RS]
    inner = cast(PreTrainedModel, getattr(model, "module", model))
    head, form = inner.get_output_embeddings(), LogitsForm.of(inner.config)
    sent: list[Tensor] = []
    kept: list[Tensor] = []

    def of_labels(hidden_ND: Tensor) -> Tensor:
        if hidden_ND.dim() == 3:  # the model passes over `logits_to_keep`, as Qwen3-Omni does
            hidden_ND = hidden_ND[keep_RS]
        sent.append(label_logprobs(_terms(head, hidden_ND, keep_RS), target_N, temperature, fp32_logits, form))
        return form.sent(sent[-1])

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: float, **unused: object) -> Tensor:
        kept.append(form.received(logits))
        if inner not in _CHECKED:
            _check(inner, kept[-1].detach(), sent[-1].detach())
        return (-kept[-1].sum(dtype=torch.float64) / num_items_in_batch).to(kept[-1].dtype)

    own = {"labels": labels_RS, "logits_to_keep": keep_RS, "num_items_in_batch": num_items, "use_cache": False}
    if getattr(inner.config.get_text_config(), "output_router_logits", False):
        own["output_router_logits"] = False  # else the model adds a loss to ours; the run says what is balanced
    # The head is still called as a module, because hooks on it gather and release its weight under ZeRO-3.
    with _in_place_of(inner, head, of_labels, loss):
        output = model(**inputs, **own)
    output["logits"] = kept[-1]
    return output


_CHECKED: "WeakSet[nn.Module]" = WeakSet()


def _check(model: nn.Module, received_N: Tensor, sent_N: Tensor) -> None:
    """Once for each model, because it waits for the device. Raises as `at_labels`."""
    if not len(sent_N):
        return
    if received_N.shape != sent_N.shape or not torch.allclose(received_N, sent_N, rtol=1e-5, atol=1e-5, equal_nan=True):
        what = f"{type(model).__name__} computes logits otherwise than its config tells"
        raise UserError(f"{what}, so that its loss is not known; choose another model")
    _CHECKED.add(model)


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
    terms: Sequence[Term],
    target_N: Tensor,
    temperature: float = 1.0,
    fp32_logits: bool = False,
    form: LogitsForm = PLAIN,
) -> Tensor:
    """Log-probabilities (N,) fp32 of the tokens `target_N` under the logits that the terms make; with grad to both.

    The gradient of a weight is added up in the weight's dtype over tiles.
    """
    tensors = [tensor for term in terms for tensor in term]
    return _LabelLogprobs.apply(target_N, temperature, fp32_logits, form, *tensors)


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
    def forward(
        ctx, target_N: Tensor, temperature: float, fp32_logits: bool, form: LogitsForm, *terms: Tensor
    ) -> Tensor:
        ctx.save_for_backward(target_N, *terms)
        ctx.temperature, ctx.dtype = temperature, torch.float32 if fp32_logits else terms[0].dtype
        ctx.form = form
        logprob_N = torch.empty(len(target_N), dtype=torch.float32, device=target_N.device)
        for tile in _tiles(target_N, terms, ctx.dtype):
            logits_TV = form.logits(_logits(terms, tile, ctx.dtype))
            logprob_N[tile] = -_cross_entropy(logits_TV, target_N[tile], temperature)
        return logprob_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        target_N, *terms = ctx.saved_tensors
        grads = [
            torch.zeros_like(one) if needed else None
            for one, needed in zip(terms, ctx.needs_input_grad[4:], strict=True)
        ]
        for tile in _tiles(target_N, terms, ctx.dtype):
            logits_TV = _logits(terms, tile, ctx.dtype).requires_grad_()
            with torch.enable_grad():
                loss_T = _cross_entropy(ctx.form.logits(logits_TV), target_N[tile], ctx.temperature)
            (grad_TV,) = torch.autograd.grad(loss_T, logits_TV, -grad_N[tile])
            del logits_TV, loss_T
            grad_TV = grad_TV.to(terms[0].dtype)
            pairs = zip(terms[::2], terms[1::2], grads[::2], grads[1::2], strict=True)
            for x, weight, of_x, of_weight in pairs:
                if of_x is not None:
                    torch.mm(grad_TV, weight, out=of_x[tile])
                if of_weight is not None:
                    of_weight.addmm_(grad_TV.T, x[tile])
        return None, None, None, None, *grads


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
