"""`make demo`: train a tiny Qwen3-VL-MoE on real images with its experts on two processes, export it, and let plain
transformers read the held-out images from the exported folder in a fresh process.

    python -m tools.demos.digits.demo [--procs N] [key=value ...]     overrides of ds_configs/runs/demo.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError
from ds_moe.monitor import print_table

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "ds_configs/runs/demo.yaml"


def run(*command: str) -> None:
    """Run one step of the demo in a process of its own; its failure is the demo's."""
    print(f"\n$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(done.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--procs", default="2", help="processes to train with (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    os.chdir(ROOT)
    began = time.monotonic()
    try:
        output = Path(load_run(RUN, options.overrides).train.output_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(output, ignore_errors=True)  # a demo starts anew; a real run would resume
    export, scores = output / "export", output / "export_accuracy.json"
    run("launch/local.sh", str(RUN.relative_to(ROOT)), options.procs, *options.overrides)
    run(str(Path(sys.executable).with_name("ds-moe")), "export", str(output), str(export))
    run(sys.executable, "-m", "tools.demos.score", str(export), "--data", "digits", "--json", str(scores))
    result, exported = json.loads((output / "result.json").read_text()), json.loads(scores.read_text())
    rows = {
        "loss, training / held out": f"{result['loss']:.4f} / {result['eval_loss']:.4f}",
        **{
            f"accuracy, {kind}: trained / exported": f"{result['accuracy'][kind]:.4f} / {exported[kind]:.4f}"
            for kind in result["accuracy"]
        },
        "tokens/s": f"{result['tokens_per_s']:,.0f}",
        "MaxVio": f"{result['max_vio']:.2f}",
        "checkpoint": result["checkpoint"],
        "exported for plain transformers": str(export),
        "curves": f"tensorboard --logdir {output}",
        "time": f"{time.monotonic() - began:.0f} s",
    }
    print_table(rows, "ds_moe demo: a Qwen3-VL-MoE that reads handwritten digits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
