"""A Qwen3-VL whose adapters are mixed by a gate: base, bank and router in one module.

    request, screen -> features -> router -> weights of the adapters -> the model's own forward

`install_gate` turns a loaded model into one, which is still an ordinary transformers model and can `generate`. It
needs no DeepSpeed, but if there are several ranks, it keeps them in step.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ds_moe.config.tasks import GateConfig
from ds_moe.distributed import parallel
from ds_moe.errors import UserError
from ds_moe.models.convert import moe_layers
from ds_moe.models.families import FAMILIES, image_edges
from ds_moe.models.generation import cache_of
from ds_moe.models.vision import encode_blank, has_vision
from ds_moe.tasks.gate import bank
from ds_moe.tasks.gate.adapters import find_adapters, read_adapter
from ds_moe.tasks.gate.features import (
    POOLS,
    Features,
    image_counts,
    in_rows,
    mean_vision,
    prompt_mask,
    sequence_of,
    vision_statistics,
)
from ds_moe.tasks.gate.network import GateDecision, GateNetwork, GateSettings

ROUTER = "adapter_gate"  # the router's name in the model
# What a pass of the base alone is given; `generate` has position_ids in place of the grid they are made from.
OF_THE_BASE = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "mm_encoder_outputs")
OF_THE_BASE += ("image_grid_thw", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sample_lengths")
Inputs = dict[str, Any]  # keyword arguments of a transformers forward: tensors, a cache, flags


class GatedModel(PreTrainedModel):
    """A model after `install_gate`, as type checkers see it: its own class gains these attributes."""

    adapter_bank: bank.Bank
    adapter_gate: GateNetwork
    gate_reference: GateNetwork | None  # a frozen copy of the gate, see `hold_reference`
    reads: GateConfig
    decision: GateDecision  # of the last forward, as the next three; per token (B, longest, K) if the row was packed
    counted_BS: Tensor | None  # bool, the tokens of `decision` that count; only for gates per token
    features: Features
    reference_logits: Tensor | None  # as those of `decision`


def install_gate(model: PreTrainedModel, config: GateConfig) -> GatedModel:
    """Freeze `model` in place, give it the adapters of `config` and a gate over them, and return it.

    Only the gate is trained. The model then has `adapter_bank` (a `Bank`), `adapter_gate` (a `GateNetwork`) and, after
    every forward, `decision` and `features`. Its forward takes one more argument: `gate_only=True` returns the
    `GateDecision` without running the language model.

    Raises:
        UserError: an adapter that cannot be gated, a model without a vision tower, or a text layer that it lacks.
    """
    if not has_vision(model):
        raise UserError(f"task gate needs a vision-language model, this is a {model.config.model_type}")
    family = FAMILIES.get(model.config.model_type)
    if family is not None and not family.gates:
        known = ", ".join(name for name, one in FAMILIES.items() if one.vision and one.gates)
        raise UserError(f"task gate reads images of {known}, not of a {model.config.model_type} model")
    layers = model.config.get_text_config().num_hidden_layers
    if config.text_layer is not None and config.text_layer > layers:
        raise UserError(f"gate.text_layer {config.text_layer} exceeds the model's {layers} layers")
    if config.text == "first":
        text = "gate.text first is content-free under causal attention: every request gets the same text features"
        warnings.warn(text, stacklevel=2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = find_adapters(config.adapters, config.adapters_in)
    model.adapter_bank = bank.install(model, [read_adapter(name, path) for name, path in found.items()])
    model.adapter_bank.gates.per = config.per
    model.adapter_bank.train_adapters(config.stage == "joint")
    # As `freeze` does: ZeRO-3 gathers whole layers, and would partition the first one's weights again before the gates'
    # and adapters' gradients are computed with them if no input of the layer needed a gradient.
    model.enable_input_require_grads()
    hidden_size = model.config.get_text_config().hidden_size
    settings = GateSettings(
        adapters=len(found),
        hidden_size=hidden_size,
        vision_size=(2 if config.vision == "mean_std" else 1) * hidden_size,
        top_k=config.top_k if config.select == "top_k" else None,
        layers=layers if config.per == "layer" else 1,
        **config.model_dump(include={"width", "select", "temperature", "per", "modalities"}),
    )
    model.adapter_gate = GateNetwork(settings).to(model.device)
    model.gate_reference = None
    model.reads = config
    model.decision, model.counted_BS, model.features, model.reference_logits = None, None, None, None
    model.__class__ = _gated(type(model))
    return cast(GatedModel, model)


def hold_reference(model: GatedModel) -> None:
    """Keep a frozen copy of the gate as it is now. Every forward then leaves its logits in `reference_logits`."""
    model.gate_reference = copy.deepcopy(model.adapter_gate).requires_grad_(False)
    for module in model.gate_reference.modules():  # not saved: it is rebuilt from gate.start
        module._non_persistent_buffers_set.update(module._buffers)


def _gated(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    @wraps(base.forward)  # `generate` reads the signature
    def forward(self: GatedModel, *args: object, gate_only: bool = False, **kwargs: Any) -> GateDecision | ModelOutput:
        cache = cache_of(kwargs)
        decision, per_token = self.decision, self.adapter_gate.settings.per == "token"
        if cache is None or cache.get_seq_length() == 0:
            self.features, kwargs = read(self, kwargs)
            decision = self.adapter_gate(self.features)
        elif per_token:  # while decoding, other gates keep the decision of the prompt
            self.features.token_RSD = _embed(self, kwargs["input_ids"])
            decision = self.adapter_gate(self.features)
        lengths = kwargs.get("sample_lengths") if per_token else None
        of_samples = partial(in_rows, lengths=lengths) if lengths is not None else lambda values: values
        self.decision, mask_RS = GateDecision(*map(of_samples, decision)), self.features.mask_RS
        self.counted_BS = None if mask_RS is None else of_samples(mask_RS)
        if self.gate_reference is not None:
            with torch.no_grad():
                self.reference_logits = of_samples(self.gate_reference(self.features).logits)
        if gate_only:
            _forget_announced(self)
            return self.decision
        self.adapter_bank.gates.choose(decision.weights, self.features.sequence_S)
        return base.forward(self, *args, **kwargs)

    @wraps(base.activation_checkpointing_enable)
    def activation_checkpointing_enable(
        self: PreTrainedModel, options: dict[str, object] | None = None, *args: object, **kwargs: Any
    ) -> None:
        options = kwargs.pop("activation_checkpointing_kwargs", options)
        if options is not None and options.get("use_reentrant") is not False:
            raise ValueError(
                "a gated model needs non-reentrant gradient checkpointing, {'use_reentrant': False}: the weights of "
                "its gate are no input of a layer, and the reentrant kind would go back through them once a layer"
            )
        base.activation_checkpointing_enable(self, options, *args, **kwargs)

    methods = {"forward": forward, "activation_checkpointing_enable": activation_checkpointing_enable}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), methods | names)


def read(model: GatedModel, inputs: Inputs) -> tuple[Features, Inputs]:
    """The features of a batch, and the forward's arguments with its images encoded: one vision pass serves both.

    No stage trains the vision tower. A rank without an image runs it on a blank one, so that under ZeRO-3 all ranks
    gather the same weights. In `generate`, transformers has encoded the images before the first forward.
    """
    input_ids, padding_RS, lengths = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("sample_lengths")
    if padding_RS is not None and padding_RS.dim() != 2:
        raise ValueError("the gate needs the padding mask (B, S), not a ready-made attention mask")
    if lengths is None and inputs.get("cu_seq_lens_q") is not None:
        raise ValueError("the gate needs sample_lengths of a packed row, or it would take its samples for one")
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    with torch.no_grad():
        if inputs.get("pixel_values") is not None:
            of_images = {name: value for name, value in inputs.items() if name.startswith("image_")}
            encoded = model.get_image_features(inputs["pixel_values"], **of_images, return_dict=True)
            used = {"pixel_values", *of_images} - {"image_grid_thw"}  # positions may be made from the grid
            inputs = {name: value for name, value in inputs.items() if name not in used}
            inputs["mm_encoder_outputs"] = {"image": encoded}
        elif cache_of(inputs) is None and parallel():
            encode_blank(model, input_ids.device)
        ids, edges = model.config, image_edges(model.config)
        not_text = (ids.image_token_id, ids.video_token_id, *edges)
        read_RS = prompt_mask(input_ids, padding_RS, inputs.get("labels"), not_text, lengths)
        kind, layer = model.reads.text, model.reads.text_layer
        embeds_RSD = _embed(model, input_ids)
        hidden_RSD = embeds_RSD if kind == "embeddings" else _contextual(model, inputs, layer)
        counts_B = image_counts(input_ids, ids.image_token_id, edges[0], lengths)
        pooled = encoded.pooler_output if encoded is not None else []
        statistics = vision_statistics if model.reads.vision == "mean_std" else mean_vision
        features = Features(
            POOLS[kind](hidden_RSD, read_RS, lengths), *statistics(pooled, counts_B, embeds_RSD.shape[-1])
        )
        if model.adapter_gate.settings.per == "token":
            features.token_RSD, features.mask_RS = embeds_RSD, read_RS
        if lengths is not None:
            features.sequence_S = sequence_of(lengths, input_ids.device)
        return features, inputs


def _embed(model: PreTrainedModel, input_ids_RS: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(input_ids_RS).detach()


def _contextual(model: GatedModel, inputs: Inputs, layer: int | None) -> Tensor:
    """(R, S, D) output of a decoder layer (None: of the last one, after its norm), of the base without adapters."""
    model.adapter_bank.gates.weights = None
    given = {name: inputs[name] for name in OF_THE_BASE if inputs.get(name) is not None}
    with _beside_training(model):
        outputs = model.model(**given, use_cache=False, output_hidden_states=layer is not None)
    return outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]


@contextmanager
def _beside_training(model: GatedModel) -> Iterator[None]:
    """Within it a forward is not the one that the trainer has announced to the expert layers: they count no load of it,
    and what they were told, such as which samples only fill up, still holds for the next forward."""
    layers, training = moe_layers(model), model.training
    announced = [(layer.context, dict(vars(layer.context))) for layer in layers[:1]]  # all layers share one context
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = training
        for context, told in announced:
            vars(context).update(told)


def _forget_announced(model: GatedModel) -> None:
    """Drop what the trainer has announced to the expert layers, where the forward that it was about ends without them:
    the next one may be an evaluation's, with other samples."""
    for layer in moe_layers(model)[:1]:
        layer.context.begin(None, None)
