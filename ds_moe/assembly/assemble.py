"""Dense Qwen3-VL checkpoints -> one Qwen3-VL-MoE for plain transformers and for ds_moe: `ds-moe assemble`.

upcycle    experts are copies of one checkpoint's FFNs (arXiv 2212.05055), or slices of them (arXiv 2410.07524)
branches   each expert is the FFN of one of several checkpoints that were trained apart (arXiv 2403.07816)
average    a dense model, the mean of several

A weight is made when its file is written: memory holds one output file at most, and what one weight is made of.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ds_moe import __version__
from ds_moe.assembly.dense import FILES
from ds_moe.assembly.plan import Assembly, plan
from ds_moe.assembly.spec import AssemblySpec, dump_spec, load_spec
from ds_moe.models.card import model_card
from ds_moe.models.families import TRANSPOSED_ON_HUB, expert_state
from ds_moe.weights.files import SHARD_BYTES, check_empty, dtype_name, make_folder, shards, write_weights
from ds_moe.weights.layouts import LAYOUTS, ExpertLayout, choose_layout, in_layout

NOT_COPIED = ("config.json", "*.index.json", "*.safetensors")  # but tokenizer, processor, template, generation config
Note = Callable[[str], None]


def assemble(
    spec_path: str | Path,
    out: Path,
    layout: ExpertLayout | None = None,
    *,
    dry_run: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    note: Note = print,
) -> Assembly:
    """Make the model of a spec.

    Args:
        out: the folder to write; must not exist or be empty.
        layout: of the experts, see `choose_layout`.
        dry_run: check everything and say what would be written, but write nothing.
        max_shard_bytes: size of one weight file at most (a single larger tensor has a file of its own).
        note: is told of the sources, of the result and of every file written.

    Raises:
        UserError: a mistake in the spec, sources that do not fit, or a folder that cannot be written.
    """
    spec = load_spec(spec_path)
    check_empty(out)
    assembly = plan(spec)
    layout = choose_layout(assembly.config, layout, TRANSPOSED_ON_HUB)
    files = shards(assembly.sizes, max_shard_bytes)
    for name, source in assembly.sources.items():
        note(f"{name}: {source.path}, {source.weights.parameters:,} parameters, {dtype_name(source.dtype)}")
    size = f"{sum(assembly.sizes.values()) / 1e9:.3g} GB of {dtype_name(assembly.dtype)} in {len(files)} file(s)"
    note(f"{out}: {assembly}; {size}" + (f", experts in the {layout} layout" if assembly.is_moe else ""))
    if not dry_run:
        _write(assembly, out, layout, files, note)
        (out / "README.md").write_text(model_card(out.name, assembly.config, _origin(assembly, spec, layout)))
    return assembly


def _write(assembly: Assembly, out: Path, layout: ExpertLayout, files: list[list[str]], note: Note) -> None:
    """Write weights first and the config last, so that a folder which was left half done does not load."""

    def stored(name: str) -> dict[str, Tensor]:
        tensor = assembly.weights[name].make().to(assembly.dtype)
        return {name: in_layout(tensor, layout) if expert_state(name) else tensor}

    make_folder(out)
    write_weights(out, files, stored, note)
    source = next(iter(assembly.sources.values())).folder
    for path in sorted(path for pattern in FILES for path in source.glob(pattern)):
        if not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copy(path, out / path.name)
    assembly.config.save_pretrained(out)


def _origin(assembly: Assembly, spec: AssemblySpec, layout: ExpertLayout) -> str:
    rows = "\n".join(
        f"| {name} | `{source.path}` | {source.weights.parameters:,} | {source.weights.bytes / 1e9:.3g} GB |"
        for name, source in assembly.sources.items()
    )
    experts = f"\nExperts are stored in the `{layout}` layout: {LAYOUTS[layout]}.\n" if assembly.is_moe else ""
    return f"""\
Assembled with ds_moe {__version__}: {assembly}; {dtype_name(assembly.dtype)}.
{experts}
| source | from | parameters | files |
|---|---|---|---|
{rows}

The spec, as it was resolved:

```yaml
{dump_spec(spec).strip()}
```
"""
