"""How many of a model's parameters one rank has: of its copy, of its ZeRO partition, of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ds_moe.models.families import expert_state


@dataclass
class Layer:
    """Elements of one decoder (or vision) layer on a rank, without other ranks' experts.

    Attributes:
        gathered: that ZeRO-3 gathers; experts without a replica lie where they are used.
        passed: that its trace counts: all.
        trained: whose gradients are there until they are reduced.
    """

    gathered: float = 0.0
    passed: float = 0.0
    trained: float = 0.0


@dataclass
class Shares:
    """Elements of one rank.

    Attributes:
        held, held_trained: of its copy of the model: all but other ranks' experts.
        owned, owned_trained: of its ZeRO partition. Experts are spread over EP x EDP ranks, the rest over DP ranks:
            both are all ranks.
        dense_trained: of `owned_trained`, what are no experts: an optimizer group of its own.
        gathered: of `held`, what ZeRO-3 gathers.
        table, table_trained: of the largest weight outside of layers: the embedding or the output layer.
        layers: by name.
    """

    held: float = 0.0
    held_trained: float = 0.0
    owned: float = 0.0
    owned_trained: float = 0.0
    dense_trained: float = 0.0
    gathered: float = 0.0
    table: float = 0.0
    table_trained: float = 0.0
    layers: dict[str, Layer] = field(default_factory=dict)

    @property
    def group(self) -> float:
        """Of the partition, the largest optimizer group: experts, or the matrices beside them (vectors are few)."""
        return max(self.dense_trained, self.owned_trained - self.dense_trained)

    @property
    def largest(self) -> Layer:
        """At its largest, each number by itself."""
        layers = list(self.layers.values()) or [Layer()]
        return Layer(
            max(layer.gathered for layer in layers),
            max(layer.passed for layer in layers),
            max(layer.trained for layer in layers),
        )


def shares(model: nn.Module, ep_size: int, world_size: int) -> Shares:
    """Of an unconverted model whose frozen parameters are marked; `ep_size` divides `world_size`."""
    found = Shares()
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
        before, inside, after = name.partition(".layers.")
        if not inside:
            before, inside, after = name.partition(".blocks.")  # of a vision tower
        if inside:
            layer = found.layers.setdefault(f"{before}.{after.partition('.')[0]}", Layer())
            layer.gathered += gathered
            layer.passed += here
            layer.trained += here * learns
        else:
            found.table = max(found.table, here)
            found.table_trained = max(found.table_trained, here * learns)
    return found
