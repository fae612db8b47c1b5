"""The file `ds-moe assemble` reads: which model is made of which checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from ds_moe.config.complaints import Schema, read_mapping
from ds_moe.config.sections import Located, Section
from ds_moe.errors import UserError


class Upcycle(Section):
    """Experts from the FFNs of one dense checkpoint, so that the model starts out as that checkpoint."""

    source: str  # folder or hub id of a dense qwen3_vl
    experts: int = Field(gt=0)  # of each layer: copies of the FFN x split
    top_k: int = Field(gt=0)  # experts a token, a multiple of split
    split: int = Field(default=1, gt=0)  # finer experts: slices that each FFN is cut into
    noise: float = Field(default=0.0, ge=0)  # on experts, in units of the RMS of each weight matrix
    router_std: float | None = Field(default=None, gt=0)  # of the random routers; default: initializer_range


class RouterInit(Section):
    init: Literal["random", "hidden_mean"] = "random"
    std: float | None = Field(default=None, gt=0)  # RMS of a router's weights; default: initializer_range
    data: dict[str, str] = {}  # hidden_mean: data file (or "digits") of each expert's domain
    samples: int = Field(default=64, gt=0)  # hidden_mean: of each domain, a random choice
    model: Literal["parent", "expert"] = "parent"  # hidden_mean: who reads them


class Branches(Section):
    """Experts from checkpoints that were trained apart, from one parent (branch-train-mix)."""

    parent: str
    experts: dict[str, str]  # name: folder or hub id; their order is that of the experts
    top_k: int = Field(gt=0)
    rest: Literal["average", "parent"] = "average"  # what is no FFN: the mean over the experts, or the parent's
    router: RouterInit = RouterInit()


class Average(Section):
    """A dense model: the mean of several."""

    models: dict[str, str]  # name: folder or hub id


class AssemblySpec(Located):
    """Exactly one of `upcycle`, `branches`, `average`."""

    upcycle: Upcycle | None = None
    branches: Branches | None = None
    average: Average | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)  # of noise, random routers and the choice of samples


SCHEMA = Schema(AssemblySpec, "spec")
WAYS = ("upcycle", "branches", "average")


def load_spec(path: str | Path) -> AssemblySpec:
    """Read a spec. Raises `UserError` for the first mistake, with file and line."""
    data, origins = read_mapping(Path(path), SCHEMA)
    try:
        spec = AssemblySpec.model_validate(data)
    except ValidationError as error:
        raise UserError(SCHEMA.complaints(error, origins, str(path))[0]) from error
    spec.remember_origins(str(path), origins)
    for key, text in _problems(spec):
        raise UserError(f"{spec.at(key)}: {text}")
    return spec


def dump_spec(spec: AssemblySpec) -> str:
    """The spec as the text of a file, with the defaults of the one section that it has."""
    return yaml.safe_dump(spec.model_dump(exclude_none=True), sort_keys=False)


def _problems(spec: AssemblySpec) -> Iterator[tuple[str, str]]:
    """(key, complaint): what types cannot say."""
    given = [way for way in WAYS if getattr(spec, way) is not None]
    if len(given) != 1:
        yield (given or [""])[-1], f"{' and '.join(given) or 'no section'}: write exactly one of {', '.join(WAYS)}"
    if spec.upcycle is not None:
        yield from _upcycle_problems(spec.upcycle)
    if spec.branches is not None:
        yield from _branches_problems(spec.branches)
    if spec.average is not None:
        yield from _few("average.models", spec.average.models)
        if "seed" in spec.model_fields_set:
            yield "seed", "seed would not be used: an average is not random; remove it"


def _upcycle_problems(upcycle: Upcycle) -> Iterator[tuple[str, str]]:
    for name in ("experts", "top_k"):
        value = getattr(upcycle, name)
        if value % upcycle.split:
            yield f"upcycle.{name}", f"upcycle.{name} {value} must be a multiple of upcycle.split {upcycle.split}"
    if upcycle.top_k > upcycle.experts:
        yield "upcycle.top_k", f"upcycle.top_k {upcycle.top_k} is more than upcycle.experts {upcycle.experts}"


def _branches_problems(branches: Branches) -> Iterator[tuple[str, str]]:
    yield from _few("branches.experts", branches.experts)
    if "parent" in branches.experts:
        yield "branches.experts.parent", "branches.experts.parent: an expert may not be called parent; rename it"
    if branches.top_k > len(branches.experts):
        yield "branches.top_k", f"branches.top_k {branches.top_k} is more than the {len(branches.experts)} experts"
    router = branches.router
    if router.init == "random":
        for name in sorted(router.model_fields_set & {"data", "samples", "model"}):
            reason = "branches.router.init is random; remove it"
            yield f"branches.router.{name}", f"branches.router.{name} would not be used: {reason}"
    elif router.data.keys() != branches.experts.keys():
        wrong = ", ".join(sorted(router.data.keys() ^ branches.experts.keys()))
        yield "branches.router.data", f"branches.router.data must name the same as branches.experts; differing: {wrong}"


def _few(key: str, models: dict[str, str]) -> Iterator[tuple[str, str]]:
    if len(models) < 2:
        yield key, f"{key} has {len(models)} checkpoint(s); at least 2 are needed"
