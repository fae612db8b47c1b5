"""Swap a transformers model's MoE blocks for our layer.

The converted model keeps its parameter names and, with all experts on one rank, its values and shapes. It stays an
ordinary transformers model: forward, generate and the recording of router logits work as before.
"""

from collections.abc import Callable
from typing import NoReturn

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ds_moe.config.moe import ExpertsConfig, LossFreeBalance, MoEConfig
from ds_moe.config.rules.moe import noncausal
from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError
from ds_moe.models.families import BIAS_SUFFIX, FAMILIES, Family, moe_blocks
from ds_moe.models.generation import Arguments, Keywords, cache_of
from ds_moe.models.hf_experts import unlike_swiglu
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.balance import BALANCERS
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import DISPATCHERS
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.loss_free import LossFreeBalancing
from ds_moe.moe.routers import ROUTERS, Router
from ds_moe.weights.unread import is_unread

EXPERT_BIAS = "expert_bias.safetensors"  # where an export keeps the biases that its architecture has no place for


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Our layers in `model`, in the order of their index."""
    return sorted((m for m in model.modules() if isinstance(m, MoELayer)), key=lambda layer: layer.index)


def convert(
    model: PreTrainedModel, config: MoEConfig, ep: ExpertParallel | None = None, layer_class: type[MoELayer] = MoELayer
) -> ForwardContext:
    """Replace every MoE block of `model` in place, keeping only the experts of rank `ep.rank`.

    Args:
        config: the run's `moe` section.
        ep: this rank's place in expert parallelism; None: all experts here.
        layer_class: `MoELayer`, or the subclass that an engine recognises.

    Returns:
        The context shared by the new layers. The model's forward takes one more argument from now on: `routing`,
        (B, S, L, K) experts to use in place of those the routers select, any integer dtype, -1 where they decide.

    Raises:
        UserError: unknown family, no MoE block, an `ep_size` that does not divide the experts, or a router that is not
            causal, unless the run allows it.
    """
    ep = ep or ExpertParallel()
    family, blocks = _convertible(model, ep)
    if leak := noncausal(config.router):
        raise UserError(leak)
    text_config = model.config.get_text_config()
    context = ForwardContext(replay_moves_bias=config.replay.moves_bias)
    kind = config.dispatch.kind if config.dispatch.kind != "auto" else ("local" if ep.size == 1 else "all_to_all")
    dispatcher = DISPATCHERS[kind](ep, config.experts.backend, config.experts.apply_weight, config.dispatch.chunks)
    balances = [balance for balance in config.balance if balance.kind in BALANCERS]
    balancers = [BALANCERS[balance.kind](**balance.model_dump(exclude={"kind"})) for balance in balances]
    of_all = {"dispatcher": dispatcher, "context": context, "balancers": balancers}
    settings = config.router.settings(text_config.num_experts_per_tok, family.moe.normalizes(text_config))
    for index, (name, block) in enumerate(blocks):
        gate = _router(config, block.gate, settings)
        experts = _owned_experts(block.experts, ep, config.experts)
        layer = layer_class(gate=gate, experts=experts, index=index, **of_all)
        model.set_submodule(name, layer.train(model.training))
    text_config.num_experts_per_tok = settings["top_k"]
    model.register_forward_pre_hook(_take_routing(context, len(blocks), settings["top_k"]), with_kwargs=True)
    decoder = model.get_submodule(family.decoder)
    decoder.register_forward_pre_hook(_begin_forward(context), with_kwargs=True)
    if not config.router.causal:
        decoder.register_forward_pre_hook(_refuse_cache, with_kwargs=True)
        model.prepare_inputs_for_generation = _refuse_generation
    return context


def convert_for(
    model: PreTrainedModel, config: RunConfig, ep: ExpertParallel | None = None, layer_class: type[MoELayer] = MoELayer
) -> ForwardContext | None:
    """`convert` a model whose trained parts are set, as its run asks for it; None: the run is of a dense model."""
    if config.moe is None:
        return None
    context = convert(model, config.moe, ep, layer_class)
    if config.lora is not None and not config.lora.train_router:
        for layer in moe_layers(model):
            layer.gate.requires_grad_(False)  # also freezes our router's extra parameters (noise_weight)
    return context


def _convertible(model: PreTrainedModel, ep: ExpertParallel) -> tuple[Family, list[tuple[str, nn.Module]]]:
    """The family of a model and its MoE blocks with their paths. Raises `UserError` for none that we can replace."""
    model_type, text_config = model.config.model_type, model.config.get_text_config()
    family = FAMILIES.get(model_type)
    if family is None or family.moe is None:
        known = sorted(name for name, row in FAMILIES.items() if row.moe)
        raise UserError(f"model_type {model_type!r} has no MoE blocks we know; known: {known}")
    blocks = moe_blocks(model)
    if not blocks:
        raise UserError(f"the {model_type} model has no {family.moe.class_name}: nothing to convert")
    if text_config.num_experts % ep.size:
        raise UserError(f"moe.ep_size={ep.size} does not divide the model's {text_config.num_experts} experts")
    if reason := unlike_swiglu(blocks[0][1].experts):
        raise UserError(f"the experts of this {model_type} model are none we know: {reason}; known: plain SiLU-gated")
    return family, blocks


def _refuse_generation(*args: object, **kwargs: object) -> NoReturn:
    raise UserError(
        "moe.router.kind expert_choice cannot generate: its experts choose among all tokens of the sequence, and those "
        "to come are not there yet; evaluate losses only (train.eval_generate=false)"
    )


def _refuse_cache(module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
    if cache_of(kwargs) is not None:
        _refuse_generation()


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


def _router(config: MoEConfig, gate: nn.Module, settings: dict[str, object]) -> Router:
    """Our router as a subclass of the family's, so that transformers' `output_router_logits` finds it."""
    kind = ROUTERS[config.router.kind]
    gate.weight.requires_grad_(config.router.learns and gate.weight.requires_grad)
    router = type(kind.__name__, (kind, type(gate)), {})(gate.weight, **settings)
    # The hooks by which transformers records router logits, if a forward before the conversion has installed them: it
    # installs them once in a model.
    router._forward_hooks.update(gate._forward_hooks)
    for balance in config.balance:
        if isinstance(balance, LossFreeBalance):
            router.balancing = LossFreeBalancing(gate.weight.shape[0], **balance.model_dump(exclude={"kind"}))
    return router


def _owned_experts(experts: nn.Module, ep: ExpertParallel, config: ExpertsConfig) -> Experts:
    owned = ep.owned(experts.gate_up_proj.shape[0])

    def shard(weight: nn.Parameter) -> nn.Parameter:
        if ep.size == 1:
            return weight
        kept = weight.detach()[owned]
        return nn.Parameter(kept if is_unread(weight) else kept.clone(), requires_grad=weight.requires_grad)

    lora = getattr(experts, "lora", None)  # see models/lora.py
    if lora is not None and ep.size > 1:
        lora.keep(owned)
    weights = shard(experts.gate_up_proj), shard(experts.down_proj)
    return Experts(*weights, config.backend, lora, config.recompute)


def _take_routing(
    context: ForwardContext, layers: int, top_k: int
) -> Callable[[nn.Module, Arguments, Keywords], tuple[Arguments, Keywords]]:
    """A hook that gives the model's argument `routing` to our layers; transformers would pass over it in silence."""

    def hook(module: nn.Module, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
        routing_BSLK = kwargs.pop("routing", None)
        if routing_BSLK is not None and routing_BSLK.shape[2:] != (layers, top_k):
            raise ValueError(f"routing {tuple(routing_BSLK.shape)} must end in ({layers} MoE layers, top_k {top_k})")
        context.routing_BSLK = routing_BSLK
        return args, kwargs

    return hook


def _begin_forward(context: ForwardContext) -> Callable[[nn.Module, Arguments, Keywords], None]:
    """A hook that tells our layers, as the decoder's forward begins, which tokens are padding and which are images."""

    def hook(module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        given = kwargs.get("inputs_embeds")
        given = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
        mask_BS = kwargs.get("attention_mask")
        if isinstance(mask_BS, Tensor) and mask_BS.dim() == 2:
            mask_BS = mask_BS[:, -given.shape[1] :]  # with a cache the mask also covers earlier tokens
        else:
            mask_BS = None  # there is no padding, or the mask is a ready-made one that does not tell padding apart
        context.begin(mask_BS, kwargs.get("visual_pos_masks"))

    return hook
