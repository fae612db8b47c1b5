"""The options of `ds-moe export`, and what it does."""

import argparse
from pathlib import Path

from ds_moe.config.arguments import Commands, add_layout
from ds_moe.errors import UserError


def add_export(commands: Commands) -> None:
    parser = commands.add_parser("export", help="write a checkpoint as a plain transformers folder")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("out", type=Path, metavar="OUT")
    add_layout(parser)
    parser.add_argument("--adapter", action="store_true", help="of a run with LoRA: only the PEFT adapter, unmerged")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from ds_moe.export.model import export_adapter, export_checkpoint

    if options.adapter:
        if options.layout:
            raise UserError("--layout is about whole models; leave it out with --adapter")
        folder, parameters = export_adapter(options.checkpoint, options.out)
        print(f"{folder}: a PEFT adapter of {parameters:,} parameters")
        return 0
    written = export_checkpoint(options.checkpoint, options.out, options.layout)
    print(
        f"{written.folder}: {written.parameters:,} parameters, {written.bytes / 1e9:.3g} GB in "
        f"{len(written.files)} file(s), experts in the {written.layout} layout"
    )
    return 0
