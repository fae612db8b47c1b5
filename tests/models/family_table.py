"""The table of families in docs/models.md, made by asking a tiny model of each what can be done with it.

python -m tests.models.family_table    # writes it anew
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import LoRAConfig
from ds_moe.errors import UserError
from ds_moe.models.blocks import moe_blocks
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import FAMILIES, IMAGE_BLOCKS, REFUSED, TEXT_BLOCKS
from ds_moe.models.lora import add_lora
from ds_moe.models.stored_names import sources_of
from ds_moe.moe.in_block import GivenRouter
from ds_moe.weights.files import SafetensorsFiles
from ds_moe.weights.layouts import stored_rows
from tests.models.tiny_families import build

PAGE = Path("docs/models.md")
BEGIN, END = "<!-- families: python -m tests.models.family_table -->", "<!-- end of families -->"
HEAD = (
    "| `model_type` | whole runs | images | router | replay | loss-free | LoRA of experts | streamed | "
    "files hold experts |"
)


def rows() -> list[str]:
    return [_row(family) for family in sorted(TEXT_BLOCKS | IMAGE_BLOCKS)]


def refused() -> list[str]:
    return [f"| `{family}` | {reason} |" for family, reason in sorted(REFUSED.items())]


def table() -> str:
    line = "|".join("-" * 3 for _ in HEAD.split("|")[1:-1])
    return "\n".join([HEAD, f"|{line}|", *rows(), "", "| refused | why |", "|---|---|", *refused()])


def _row(family: str) -> str:
    model, _ = build(family)
    name = type(moe_blocks(model)[0].router).__name__
    row, trained = FAMILIES.get(family), family in FAMILIES
    streamed, stored = _files(model)
    if row and row.moe and row.moe.stacked_on_hub:
        stored = "stacked"
    convert(model, MoEConfig())
    own = isinstance(moe_layers(model)[0].gate, GivenRouter)
    replays = not own and (not trained or FAMILIES[family].measured)
    moves = _works(family, lambda one: convert(one, MoEConfig(balance=[{"kind": "loss_free"}])))
    cells = [
        f"`{family}`",
        "yes" if trained else "`convert`",
        "yes" if family in IMAGE_BLOCKS else "",
        f"its own, `{name}`" if own else "ours",
        "yes" if replays else "no",
        "yes" if moves else "no",
        "yes" if _works(family, _lora) else "no",
        "yes" if streamed else "no",
        "transposed" if row and row.moe and row.moe.transposed_on_hub else stored,
    ]
    return f"| {' | '.join(cells)} |"


def _works(family: str, done: Callable[[PreTrainedModel], object]) -> bool:
    try:
        done(build(family)[0])
    except UserError:
        return False
    return True


def _lora(model: PreTrainedModel) -> None:
    add_lora(model, LoRAConfig(rank=2, targets=[], experts=True), seed=0)
    convert(model, MoEConfig())


def _files(model: PreTrainedModel) -> tuple[bool, str]:
    """Whether a rank could read its share of what `save_pretrained` writes, and how that holds the experts."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = SafetensorsFiles.find(folder)
        assert files is not None
        state = model.state_dict()
        sources = sources_of(model, state, files.shapes)
        parameters = dict(model.named_parameters())
        streamed = all(stored_rows(files, sources.get(name), parameters[name].shape) for name in parameters)
        single = any(".0." in name.partition("experts")[2] for name in files.shapes)
    return streamed, "one tensor an expert" if single else "stacked"


def written(page: str) -> str:
    """The table that a page holds."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
