"""`make demo`: train a tiny Qwen3-VL-MoE on real images with its experts on two processes, export it, and let plain
transformers read the held-out images from the exported folder in a fresh process.
"""

import json
import sys
import time
from pathlib import Path

from ds_moe.monitor.progress import print_table
from tools.demos.running import EXECUTABLE, run, start_anew
from tools.results import command_line


def main() -> int:
    command_line(__doc__).parse_args()
    began, output = time.monotonic(), Path("runs/demo")
    start_anew(output)
    export, scores = output / "export", output / "export_accuracy.json"
    run("launch/local.sh", "ds_configs/runs/demo.yaml", "2", settings={})
    run(EXECUTABLE, "export", output, export, settings={})
    run(sys.executable, "-m", "tools.demos.score", export, "--data", "digits", "--json", scores, settings={})
    result, exported = json.loads((output / "result.json").read_text()), json.loads(scores.read_text())
    accuracy = {kind: f"{share:.4f} / {exported[kind]:.4f}" for kind, share in result["accuracy"].items()}
    rows = {
        "loss, training / held out": f"{result['loss']:.4f} / {result['eval_loss']:.4f}",
        **{f"accuracy, {kind}: trained / exported": shares for kind, shares in accuracy.items()},
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
