"""Ranks of test_live: runs that hand over their weights at the end. Arguments: JSON [[overrides, dtype], ...], file."""

import json
import sys
from pathlib import Path

from ds_moe.config.run_file import load_run
from ds_moe.export.live import LiveExport
from ds_moe.export.model import DTYPES
from ds_moe.train import train_steps
from ds_moe.training.set_up import set_up
from tests.launcher import leave, report


def main():
    sizes = []
    for overrides, dtype in json.loads(sys.argv[1]):
        config = load_run(sys.argv[2], overrides)
        run = set_up(config)
        run.monitor.start(1, "", {})
        train_steps(run)
        parts = run.parts
        live = LiveExport(parts.engine.module, parts.topology, config, parts.processor, DTYPES[dtype])
        live.write(Path(config.train.output_dir, "weights"))
        sizes.append(live.nbytes)
        for one in (run.task, run.monitor, parts.stream, run.stop):
            one.close()
        run.watch.close(True)
        run.engine.destroy()
    report(sizes=sizes)
    leave()


if __name__ == "__main__":
    main()
