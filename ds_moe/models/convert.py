"""Swap a transformers model's MoE blocks for our layer.

The converted model keeps its parameter names and, with all experts on one rank, its values and shapes. It stays an
ordinary transformers model: forward, generate and the recording of router logits work as before.
"""

from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ds_moe.config.moe import LossFreeBalance, MoEConfig, TopKRouting
from ds_moe.config.rules.moe import noncausal
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.models.blocks import FoundBlock, convertible_blocks
from ds_moe.models.families import BIAS_SUFFIX, REPLACED
from ds_moe.models.hf_experts import unlike_swiglu
from ds_moe.models.hooks import refuse_generation, tell_layers
from ds_moe.models.router_forms import RouterForm, form_of, hold_bias
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.balance import BALANCERS
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import DISPATCHERS
from ds_moe.moe.experts import Experts
from ds_moe.moe.in_block import GivenRouter, InBlock, RouterInBlock
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.loss_free import LossFreeBalancing, SelectionBias
from ds_moe.moe.routers import ROUTERS, Router
from ds_moe.weights.unread import is_unread

EXPERT_BIAS = "expert_bias.safetensors"  # where an export keeps the biases that its architecture has no place for


class LayerClasses(NamedTuple):
    """What a block becomes, and what the experts of a block that stays become."""

    replacing: type[MoELayer]
    in_block: type[InBlock]


LAYERS = LayerClasses(MoELayer, InBlock)


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Our layers in `model`, in the order of their index."""
    return sorted((m for m in model.modules() if isinstance(m, MoELayer)), key=lambda layer: layer.index)


def convert(
    model: PreTrainedModel, config: MoEConfig, ep: ExpertParallel | None = None, layers: LayerClasses = LAYERS
) -> ForwardContext:
    """Give every MoE block of `model` our layer in place, keeping only the experts of rank `ep.rank`.

    A block that is nothing but a router and experts becomes a `MoELayer`. Every other block stays, and its experts
    become an `InBlock`. Its router becomes ours if ours repeats it (`router_forms.py`).

    Args:
        config: the run's `moe` section.
        ep: this rank's place in expert parallelism; None: all experts here.
        layers: our layers, or the subclasses that an engine recognises.

    Returns:
        The context shared by the new layers. The model's forward takes one more argument from now on: `routing`,
        (B, S, L, K) experts to use in place of those the routers select, any integer dtype, -1 where they decide.

    Raises:
        UserError: a model without experts that are known, or whose own router cannot do what `config` asks for; an
            `ep_size` that does not divide the experts; or a router that is not causal, unless the run allows it.
    """
    ep = ep or ExpertParallel()
    blocks = convertible_blocks(model, ep.size)
    if leak := noncausal(config.router):
        raise UserError(leak)
    context = ForwardContext(replay_moves_bias=config.replay.moves_bias)
    kind = config.dispatch.kind if config.dispatch.kind != "auto" else ("local" if ep.size == 1 else "all_to_all")
    dispatcher = DISPATCHERS[kind](ep, config.experts.backend, config.experts.apply_weight, config.dispatch.chunks)
    balances = [balance for balance in config.balance if balance.kind in BALANCERS]
    balancers = [BALANCERS[balance.kind](**balance.model_dump(exclude={"kind"})) for balance in balances]
    of_all = {"dispatcher": dispatcher, "context": context, "balancers": balancers}
    for index, block in enumerate(blocks):
        put = _replace if type(block.module).__name__ in REPLACED else _enter
        put(model, block, config, layers, {**of_all, "index": index})
    if config.router.top_k is not None:
        model.config.get_text_config().num_experts_per_tok = config.router.top_k
    tell_layers(model, context, len(blocks), moe_layers(model)[0].gate.top_k)
    if not config.router.causal:
        refuse_generation(model)
    return context


def convert_for(
    model: PreTrainedModel, config: RunConfig, ep: ExpertParallel | None = None, layers: LayerClasses = LAYERS
) -> ForwardContext | None:
    """`convert` a model whose trained parts are set, as its run asks for it; None: the run is of a dense model."""
    if config.moe is None:
        return None
    context = convert(model, config.moe, ep, layers)
    if config.lora is not None and not config.lora.train_router:
        for layer in moe_layers(model):
            layer.gate.requires_grad_(False)  # also freezes our router's extra parameters (noise_weight)
    return context


def load_expert_bias(model: nn.Module, path: str) -> None:
    """Fill the loss-free biases of a converted model from the export at `path`, if that has any and the run uses them.

    `EXPERT_BIAS` in this folder or hub id holds one fp32 (E,) tensor a layer, by the bias's name here.

    Raises `UserError` if it is of another model.
    """
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(BIAS_SUFFIX)}
    file = cached_file(path, EXPERT_BIAS, _raise_exceptions_for_missing_entries=False) if biases else None
    if file is None:
        return
    saved = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != {name: tuple(bias.shape) for name, bias in biases.items()}:
        raise UserError(f"{file} does not fit this model: it holds {sorted(shapes)[:3]}, wanted {sorted(biases)[:3]}")
    for name, bias in biases.items():
        bias.copy_(saved[name])


def _replace(
    model: PreTrainedModel, block: FoundBlock, config: MoEConfig, layers: LayerClasses, of_all: dict[str, Any]
) -> None:
    """Put a layer in the place of a whole block."""
    if reason := unlike_swiglu(block.experts):
        text = f"the experts of this {model.config.model_type} model are none we know"
        raise UserError(f"{text}: {reason}; known: plain SiLU-gated")
    form = form_of(block.router)
    assert form is not None  # a row of `REPLACED` has one
    gate = _router(config, block, form, (ROUTERS[config.router.kind],))
    _shard(block.experts, of_all["dispatcher"].ep)
    weights = block.experts.gate_up_proj, block.experts.down_proj
    lora = getattr(block.experts, "lora", None)  # see models/lora.py
    experts = Experts(*weights, config.experts.backend, lora, config.experts.recompute)
    layer = layers.replacing(gate=gate, experts=experts, **of_all)
    model.set_submodule(block.path, layer.train(model.training))


def _enter(
    model: PreTrainedModel, block: FoundBlock, config: MoEConfig, layers: LayerClasses, of_all: dict[str, Any]
) -> None:
    """Make a layer of a block's experts, and a router of ours of its router if ours repeats it."""
    experts, form = block.experts, form_of(block.router)
    fused = unlike_swiglu(experts, transposed=True) is None
    num_experts, gate = block.num_experts, None
    if form is not None:  # before other ranks' experts are dropped: it counts all of them
        gate = _router(config, block, form, (RouterInBlock, ROUTERS[config.router.kind]))
    _shard(experts, of_all["dispatcher"].ep)
    experts.__class__ = type(type(experts).__name__, (layers.in_block, type(experts)), {})
    kernels = {"backend": config.experts.backend, "recompute": config.experts.recompute}
    experts.set_up(num_experts=num_experts, fused=fused, **kernels, **of_all)
    if gate is None:
        _refuse_for_own_router(config, block.router)
        experts.routed_by(GivenRouter(type(block.router).__name__, getattr(block.router, "top_k", 0)))
        return
    gate.__dict__["layer"] = experts  # no submodule: it is the block's
    experts.routed_by(gate.train(model.training))
    setattr(block.module, block.router_name, gate)


def _refuse_for_own_router(config: MoEConfig, router: nn.Module) -> None:
    """Raise `UserError` for what a run asks of a router that must stay the family's own."""
    default, asked = TopKRouting().model_dump(), config.router.model_dump()
    keys = [f"moe.router.{key} {value}" for key, value in asked.items() if value != default.get(key)]
    keys += [f"moe.balance {balance.kind}" for balance in config.balance if balance.kind != "none"]
    keys += ["moe.replay.enabled true"] if config.replay.enabled else []
    if keys:
        name = type(router).__name__
        raise UserError(f"{keys[0]} cannot be used: this model keeps its own router, {name}, as it is; leave it out")


def _router(config: MoEConfig, block: FoundBlock, form: RouterForm, bases: tuple[type, ...]) -> Router:
    """Our router as a subclass of the family's too, so that transformers' `output_router_logits` finds it."""
    gate, kind = block.router, bases[-1]
    gate.weight.requires_grad_(config.router.learns and gate.weight.requires_grad)
    settings = config.router.settings(form.native(gate))
    ours: Any = type(kind.__name__, (*bases, type(gate)), {})
    router = ours(gate.weight, **settings)
    # The hooks by which transformers records router logits, if a forward before the conversion has installed them: it
    # installs them once in a model.
    router._forward_hooks.update(gate._forward_hooks)
    held: dict[str, Any] = {}
    if form.bias is not None:
        holder, name = hold_bias(block.module, form.bias)
        held = {"holder": router if holder is gate else holder, "name": name}
        for kept, buffer in gate._buffers.items():
            router.register_buffer(kept, buffer)
        for kept, module in gate._modules.items():
            router.add_module(kept, module)
        router.balancing = SelectionBias(block.num_experts, **held)
    for balance in config.balance:
        if isinstance(balance, LossFreeBalance):
            given = balance.model_dump(exclude={"kind"})
            router.balancing = LossFreeBalancing(block.num_experts, **given, **held)
    return router


def _shard(experts: nn.Module, ep: ExpertParallel) -> None:
    """Drop the rows of other ranks' experts from every parameter."""
    if ep.size == 1:
        return
    lora = getattr(experts, "lora", None)
    for name, weight in list(experts._parameters.items()):
        owned = ep.owned(len(weight))
        kept = weight.detach()[owned]
        kept = kept if is_unread(weight) else kept.clone()
        experts._parameters[name] = nn.Parameter(kept, requires_grad=weight.requires_grad)
    if lora is not None:
        lora.keep(owned)
