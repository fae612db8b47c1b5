"""What a converted model's layers are told of each forward, and what its forward refuses."""

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.errors import UserError
from ds_moe.models.families import FAMILIES, IMAGE_TOKENS
from ds_moe.models.generation import Arguments, Keywords, cache_of
from ds_moe.moe.context import ForwardContext


def tell_layers(model: PreTrainedModel, context: ForwardContext, layers: int, top_k: int) -> None:
    """Let every forward tell the layers, by their context, its padding, its images and what it replays."""
    model.register_forward_pre_hook(_take_routing(context, layers, top_k), with_kwargs=True)
    begin = _begin_forward(context, _image_token(model.config))
    _told(model).register_forward_pre_hook(begin, with_kwargs=True)


def refuse_generation(model: PreTrainedModel) -> None:
    """Let every forward with a cache raise `UserError`: its routers would need tokens that are not there yet."""
    _told(model).register_forward_pre_hook(_refuse_cache, with_kwargs=True)
    model.prepare_inputs_for_generation = _refuse_generation


def _told(model: PreTrainedModel) -> nn.Module:
    """The module whose arguments tell of padding and images. The decoder of a family whose block stays may be given
    masks that do not tell padding apart, and is not told of images; the model around it is."""
    family = FAMILIES.get(model.config.model_type)
    kept = family is None or (family.moe is not None and not family.moe.class_name)
    return model.base_model if kept else model.get_submodule(family.decoder)


def _refuse_generation(*args: object, **kwargs: object) -> NoReturn:
    raise UserError(
        "moe.router.kind expert_choice cannot generate: its experts choose among all tokens of the sequence, and those "
        "to come are not there yet; evaluate losses only (train.eval_generate=false)"
    )


def _refuse_cache(module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
    if cache_of(kwargs) is not None:
        _refuse_generation()


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


def _image_token(config: PretrainedConfig) -> int | None:
    return next((getattr(config, key) for key in IMAGE_TOKENS if getattr(config, key, None) is not None), None)


def _begin_forward(
    context: ForwardContext, image_token: int | None
) -> Callable[[nn.Module, Arguments, Keywords], None]:
    """A hook that tells our layers, as the decoder's forward begins, which tokens are padding and which are images."""

    def hook(module: nn.Module, args: Arguments, kwargs: Keywords) -> None:
        ids_BS = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds")
        given = given if given is not None else ids_BS
        mask_BS = kwargs.get("attention_mask")
        if isinstance(mask_BS, Tensor) and mask_BS.dim() == 2:
            mask_BS = mask_BS[:, -given.shape[1] :]  # with a cache the mask also covers earlier tokens
        else:
            mask_BS = None  # there is no padding, or the mask is a ready-made one that does not tell padding apart
        image_BS = kwargs.get("visual_pos_masks")
        if image_BS is None and image_token is not None and ids_BS is not None:
            image_BS = ids_BS == image_token
        context.begin(mask_BS, image_BS, given.shape[0])

    return hook
