"""Plan every weight of the new model from a spec: sources are opened and checked, but no tensor is read yet."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, reduce

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from ds_moe.assembly import weights as made
from ds_moe.assembly.dense import DenseModel, check_sibling, open_dense
from ds_moe.assembly.domains import hidden_means, open_domain, router_rows
from ds_moe.assembly.spec import AssemblySpec, Average, Branches, Upcycle
from ds_moe.assembly.weights import PlannedWeight, Weights, generator_of
from ds_moe.errors import UserError
from ds_moe.models.families import ASSEMBLED, FAMILIES, expert_state, family_of


@dataclass(frozen=True)
class Assembly:
    """What is to be written: config, dtype and weights. `sources` have the names that the spec gives them."""

    config: PretrainedConfig
    dtype: torch.dtype
    weights: Weights
    sources: dict[str, DenseModel]

    @property
    def is_moe(self) -> bool:
        return family_of(self.config).moe is not None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every weight."""
        return {name: math.prod(weight.shape) * self.dtype.itemsize for name, weight in self.weights.items()}

    @property
    def parameters(self) -> int:
        return sum(math.prod(weight.shape) for weight in self.weights.values())

    @property
    def active_parameters(self) -> int:
        """Parameters that work on one token, which are all but those of the experts it is not sent to."""
        if not self.is_moe:
            return self.parameters
        experts = sum(math.prod(weight.shape) for name, weight in self.weights.items() if expert_state(name))
        text = self.config.get_text_config()
        return self.parameters - experts // text.num_experts * (text.num_experts - text.num_experts_per_tok)

    def __str__(self) -> str:
        if not self.is_moe:
            return f"dense {self.config.model_type}, {self.parameters:,} parameters"
        text = self.config.get_text_config()
        experts = f"{text.num_experts} experts of width {text.moe_intermediate_size}, top-{text.num_experts_per_tok}"
        parameters = f"{self.parameters:,} parameters, {self.active_parameters:,} of them active on a token"
        return f"{text.num_hidden_layers} layers x {experts}; {parameters}"


def plan(spec: AssemblySpec) -> Assembly:
    """The model that a spec asks for. Raises `UserError`, with the place in the spec, for an unfit source."""
    if spec.upcycle is not None:
        return _upcycle(spec, spec.upcycle)
    if spec.branches is not None:
        return _branches(spec, spec.branches)
    assert spec.average is not None
    return _average(spec, spec.average)


def _upcycle(spec: AssemblySpec, recipe: Upcycle) -> Assembly:
    source = _open(spec, {"upcycle.source": ("source", recipe.source)})["source"]
    text = source.config.get_text_config()
    if text.intermediate_size % recipe.split:
        problem = f"{recipe.split} does not divide the FFN's width {text.intermediate_size}"
        raise UserError(f"{spec.at('upcycle.split')}: upcycle.split {problem}")
    copies, width = recipe.experts // recipe.split, text.intermediate_size // recipe.split
    std = recipe.router_std or text.initializer_range
    shape_EFH = recipe.experts, width, text.hidden_size

    def block(prefix: str, layer: int) -> Weights:
        def copies_of(take: Callable[..., Tensor], name: str) -> Tensor:
            slices = take(source, prefix, recipe.split)
            return made.copied(slices, copies, recipe.noise, generator_of(spec.seed, prefix + name))

        def router() -> Tensor:
            generator = generator_of(spec.seed, f"{prefix}gate")
            return made.group_router(copies, recipe.split, text.hidden_size, std, generator)

        experts = partial(copies_of, made.gate_up, "gate_up"), partial(copies_of, made.down, "down")
        return made.block_weights(prefix, shape_EFH, *experts, router)

    config = moe_config(source.config, source.dtype, recipe.experts, recipe.top_k, width)
    return Assembly(config, source.dtype, made.moe_weights(source, source.read, block), {"source": source})


def _branches(spec: AssemblySpec, recipe: Branches) -> Assembly:
    paths = {"branches.parent": ("parent", recipe.parent)}
    paths |= {f"branches.experts.{name}": (name, path) for name, path in recipe.experts.items()}
    sources = _open(spec, paths)
    parent, experts = sources["parent"], [sources[name] for name in recipe.experts]
    text = parent.config.get_text_config()
    dtype = reduce(torch.promote_types, [source.dtype for source in sources.values()])
    rows_LEH = _router_rows(spec, recipe, sources)
    shape_EFH = len(experts), text.intermediate_size, text.hidden_size

    def block(prefix: str, layer: int) -> Weights:
        def side_by_side(take: Callable[..., Tensor]) -> Tensor:
            return torch.cat([take(expert, prefix).to(dtype) for expert in experts])

        gate_up, down = partial(side_by_side, made.gate_up), partial(side_by_side, made.down)
        return made.block_weights(prefix, shape_EFH, gate_up, down, lambda: rows_LEH()[layer])

    config = moe_config(parent.config, dtype, len(experts), recipe.top_k, text.intermediate_size)
    rest = parent.read if recipe.rest == "parent" else partial(made.average, experts)
    return Assembly(config, dtype, made.moe_weights(parent, rest, block), sources)


def _average(spec: AssemblySpec, recipe: Average) -> Assembly:
    sources = _open(spec, {f"average.models.{name}": (name, path) for name, path in recipe.models.items()})
    models = list(sources.values())
    dtype = reduce(torch.promote_types, [model.dtype for model in models])
    config = type(models[0].config).from_dict(models[0].config.to_dict())
    config.dtype = dtype
    shapes = models[0].shapes
    weights = {name: PlannedWeight(shape, partial(made.average, models, name)) for name, shape in shapes.items()}
    return Assembly(config, dtype, weights, sources)


def _open(spec: AssemblySpec, paths: dict[str, tuple[str, str]]) -> dict[str, DenseModel]:
    """The sources by name, the first of which all must fit; `paths`: key in the spec -> name and path of a source."""
    sources = {}
    for key, (name, path) in paths.items():
        try:
            sources[name] = open_dense(path)
            check_sibling(sources[name], next(iter(sources.values())))
        except UserError as error:
            raise UserError(f"{spec.at(key)}: {key} {error}") from error
    return sources


def _router_rows(spec: AssemblySpec, recipe: Branches, sources: dict[str, DenseModel]) -> Callable[[], Tensor]:
    """A function that gives the routers' weights (layers, experts, H), and computes them only once."""
    text = sources["parent"].config.get_text_config()
    std = recipe.router.std or text.initializer_range
    shape = text.num_hidden_layers, len(recipe.experts), text.hidden_size
    if recipe.router.init == "random":
        return cache(lambda: torch.randn(shape, generator=generator_of(spec.seed, "routers")) * std)
    domains = {}
    for name in recipe.experts:
        try:
            domains[name] = open_domain(recipe.router.data[name])
        except UserError as error:
            raise UserError(f"{spec.at(f'branches.router.data.{name}')}: {error}") from error

    @cache
    def rows() -> Tensor:
        settings = recipe.router.samples, spec.seed
        if recipe.router.model == "parent":
            means_DLH = hidden_means(sources["parent"], list(domains.values()), *settings)
        else:
            means = [hidden_means(sources[name], [domain], *settings) for name, domain in domains.items()]
            means_DLH = torch.cat(means)
        return router_rows(means_DLH, std)

    return rows


def moe_config(dense: PretrainedConfig, dtype: torch.dtype, experts: int, top_k: int, width: int) -> PretrainedConfig:
    """The dense config with experts of this width in every layer."""
    model_type, tree = ASSEMBLED[dense.model_type], dense.to_dict()
    for section in (tree, tree["text_config"], tree["vision_config"]):
        for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
            section.pop(key, None)
    tree["text_config"] |= {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    config = AutoConfig.for_model(model_type, **tree)
    config.architectures = [FAMILIES[model_type].class_name]
    config.dtype = dtype
    return config
