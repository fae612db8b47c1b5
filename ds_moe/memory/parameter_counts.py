"""How many of a model's parameters one rank has: in its copy of the model, in its ZeRO partition, in a layer."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ds_moe.models.families import expert_state, family_of

EXPERT_GROUP = 178_956_971  # elements that DeepSpeed puts into one optimizer group of experts (moe/utils.py)


@dataclass
class LayerCounts:
    """Numbers of elements of one decoder or vision layer on a rank; experts of other ranks do not count."""

    gathered: float = 0.0  # by ZeRO-3, which need not gather experts of which there is one copy only
    passed: float = 0.0  # that ZeRO-3's trace counts, which is all of them
    trained: float = 0.0  # whose gradients exist until they are reduced


@dataclass
class ParameterCounts:
    """Numbers of elements on one rank, and how many of them are trained."""

    held: float = 0.0  # in its copy of the model, which lacks only the experts of other ranks
    held_trained: float = 0.0
    owned: float = 0.0  # in its ZeRO partition: experts are spread over EP x EDP ranks, all else over DP: all ranks
    owned_trained: float = 0.0
    dense_trained: float = 0.0  # of `owned_trained`, what is not experts; it forms an optimizer group of its own
    expert_group: float = 0.0  # of `owned_trained`, the largest of the groups that experts are split into
    whole: float = 0.0  # of `held_trained`, in the largest parameter; below ZeRO-3 one rank may own all of it
    gathered: float = 0.0  # of `held`, what ZeRO-3 gathers
    table: float = 0.0  # in the largest weight outside of layers, the embedding or the output layer
    table_trained: float = 0.0
    layers: dict[str, LayerCounts] = field(default_factory=dict)  # by path

    @property
    def group(self) -> float:
        """In the largest optimizer group of the partition: one of experts, or that of the other matrices.

        Vectors form a group too, but are few.
        """
        return max(self.dense_trained, self.expert_group)

    @property
    def largest(self) -> LayerCounts:
        """The elementwise maximum over the layers."""
        layers = list(self.layers.values()) or [LayerCounts()]
        most = (max(getattr(layer, name) for layer in layers) for name in ("gathered", "passed", "trained"))
        return LayerCounts(*most)


def count_parameters(model: PreTrainedModel, ep_size: int, world_size: int) -> ParameterCounts:
    """Of one rank, of an unconverted model whose frozen parameters are marked; `ep_size` divides `world_size`."""
    found, lists, filled = ParameterCounts(), family_of(model).layers, 0.0
    for name, parameter in model.named_parameters():
        expert, learns = expert_state(name), parameter.requires_grad
        here, owned = parameter.numel() / (ep_size if expert else 1), parameter.numel() / world_size
        gathered = 0.0 if expert and ep_size == world_size else here
        found.held += here
        found.owned += owned
        found.gathered += gathered
        found.held_trained += here * learns
        found.owned_trained += owned * learns
        found.dense_trained += owned * (learns and not expert)
        found.whole = max(found.whole, here * learns)
        if expert and learns:  # as DeepSpeed does it, a group is closed when the next tensor would not fit
            filled = here + (filled if filled + here <= EXPERT_GROUP else 0.0)
            found.expert_group = max(found.expert_group, filled * ep_size / world_size)
        path = _layer_path(name, lists)
        if path is not None:
            layer = found.layers.setdefault(path, LayerCounts())
            layer.gathered += gathered
            layer.passed += here
            layer.trained += here * learns
        else:
            found.table = max(found.table, here)
            found.table_trained = max(found.table_trained, here * learns)
    return found


def _layer_path(name: str, lists: tuple[str, ...]) -> str | None:
    """The path of the layer that a parameter is in, a member of one of these lists; None for one outside of layers."""
    for layers in lists:
        before, inside, after = name.partition(f".{layers}.")
        if inside:
            return f"{before}.{after.partition('.')[0]}"
    return None
