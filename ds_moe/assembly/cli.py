"""The options of `ds-moe assemble`."""

import argparse
from pathlib import Path

from ds_moe.config.arguments import Commands, add_layout


def add_assemble(commands: Commands) -> None:
    parser = commands.add_parser("assemble", help="make a Qwen3-VL-MoE of dense Qwen3-VL checkpoints")
    parser.add_argument("spec", metavar="SPEC.yaml", help="what to make of which checkpoints")
    parser.add_argument("out", type=Path, metavar="OUT")
    add_layout(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
    parser.set_defaults(command=_assemble)


def _assemble(options: argparse.Namespace) -> int:
    from ds_moe.assembly.assemble import assemble

    assemble(options.spec, options.out, options.layout, dry_run=options.dry_run)
    return 0
