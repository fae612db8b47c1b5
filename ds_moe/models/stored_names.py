"""What files call the weights of a model, by transformers' own conversions: which tensors make up a weight, what the
hub's files of a family hold in its place, and which tensors of files the model has no use for but must not lose.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    GroupWeightRename,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ds_moe.weights.files import SafetensorsFiles
from ds_moe.weights.layouts import Joined, Source

CARRIED = "carried/"  # begins the keys of a checkpoint's tensors that no part of the model is, see `unused_tensors`


def sources_of(model: PreTrainedModel, weights: Iterable[str], stored: Iterable[str]) -> dict[str, Source]:
    """For each of a model's `weights` (parameters and buffers) what files hold it in, if its rows can be read one by
    one; `stored` are the names of the files' tensors.

    A weight is left out where files lack a part of it, or where transformers computes it from several tensors in
    another way than laying them one above the other.
    """
    transforms, known = get_model_conversion_mapping(model), dict.fromkeys(weights, True)
    converter_of = {p: one for one in transforms if isinstance(one, WeightConverter) for p in one.source_patterns}
    found: dict[str, Source] = {}
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=dot_natural_key):  # the order in which transformers stacks the experts
        weight, pattern = _renamed(name, transforms, model.base_model_prefix, known)
        if weight in known and pattern is None:
            found[weight] = name
        elif weight in known:
            parts[weight][str(pattern)].append(name)
    for weight, by_pattern in parts.items():
        converter = converter_of[next(iter(by_pattern))]
        if _leaves_rows(converter.operations) and len(by_pattern) == 1 and len(next(iter(by_pattern.values()))) == 1:
            found[weight] = next(iter(by_pattern.values()))[0]
        elif _joins(converter.operations) and all(len(by_pattern[one]) == 1 for one in converter.source_patterns):
            found[weight] = Joined(tuple(by_pattern[one][0] for one in converter.source_patterns))
        elif _stacks(converter.operations) and by_pattern.keys() == set(converter.source_patterns):
            found[weight] = [by_pattern[pattern] for pattern in converter.source_patterns]
    return found


def unused_tensors(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """The tensors of files that the model passes over because its class says so, such as the weights of multi-token
    prediction: without them an inference engine could not speculate."""
    known, transforms = dict.fromkeys(model.state_dict(), True), get_model_conversion_mapping(model)
    prefix = model.base_model_prefix
    unknown = [name for name in stored if _renamed(name, transforms, prefix, known)[0] not in known]
    patterns = model._keys_to_ignore_on_load_unexpected
    return sorted(name for name in unknown if any(re.search(one, name) for one in patterns or ()))


class Carried:
    """The `unused_tensors` of a model's files, which every checkpoint of the whole model holds as they do.

    Args:
        model: may be an outline.
        files: of `model.path`; None: a preset, which has nothing to carry.
    """

    def __init__(self, model: PreTrainedModel, files: SafetensorsFiles | None) -> None:
        self._files, self.names = files, unused_tensors(model, files.shapes) if files is not None else []

    @property
    def nbytes(self) -> int:
        """Of all ranks together."""
        if self._files is None:
            return 0
        files, size = self._files, 0
        for name in self.names:
            size += files.dtype(name).itemsize * math.prod(files.shapes[name])
        files.close()  # until the first checkpoint
        return size

    def share(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """What one rank saves. Raises as `MappedFiles` where the files are gone by now."""
        if self._files is None:
            return {}
        read = {name: self._files.read(name) for name in self.names[rank::world_size]}
        self._files.close()
        return read


class HubNames:
    """Turns weights of a model into the tensors that checkpoints of its family on the hub hold.

    Args:
        model: may be without storage.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        # A prefix is changed for files of another class of the family; those of the model's own class have none of it.
        self._model, self._conversions = model, [one for one in conversions if not isinstance(one, PrefixChange)]
        model._weight_conversions = self._conversions  # `revert_weight_conversion` would find them anew for each weight

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """The names, those together of which files hold one tensor, or whose names change together or not at all."""
        reverse = [one.reverse_transform() for one in self._conversions[::-1]]
        converters = [one for one in reverse if isinstance(one, WeightConverter)]
        renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
        groups: dict[str, list[str]] = {}
        for name in names:
            in_files, pattern = apply_converters(name, converters)
            together = _changes_with(name, renamings)
            groups.setdefault(together or (name if pattern is None else in_files), []).append(name)
        return list(groups.values())

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of files that hold a group of weights."""
        return revert_weight_conversion(self._model, weights) if self._conversions else weights


def _changes_with(name: str, renamings: list[WeightRenaming]) -> str | None:
    """The first pattern of the pairs of names among which this one changes only once the first has been seen."""
    for one in renamings:
        if not isinstance(one, GroupWeightRename):
            name, _ = one.rename_source_key(name)
        elif one._scoped_match(name) is not None:
            return one.source_patterns[0]
    return None


def _renamed(
    name: str, transforms: list[WeightTransform], prefix: str, known: dict[str, bool]
) -> tuple[str, str | None]:
    """The weight that transformers takes a tensor of a file for, and the pattern of a conversion, if one is due."""
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    weight, pattern = rename_source_key(name, renamings, converters, prefix, known)
    if weight not in known and name in known:
        return rename_source_key(name, [], [], prefix, known)
    return weight, pattern


def _stacks(operations: list[ConversionOps]) -> bool:
    """Whether tensors of one expert become a row of a stacked weight, those of its projections one above the other."""
    kinds = [type(one) for one in operations]
    dims = [one.dim for one in operations if isinstance(one, MergeModulelist | Concatenate)]
    return kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and dims == list(range(len(kinds)))


def _joins(operations: list[ConversionOps]) -> bool:
    """Whether tensors are laid one above the other, as they are."""
    return [(type(one), getattr(one, "dim", None)) for one in operations] == [(Concatenate, 0)]


def _leaves_rows(operations: list[ConversionOps]) -> bool:
    """Whether a tensor is only transposed, within its rows, where its shape says so."""
    return all(isinstance(one, Transpose) and one.check_dims and {one.dim0, one.dim1} == {1, 2} for one in operations)
