"""The benchmark's ranks: one model, loaded and sharded in one way, weighed as it grows, and its loss."""

import threading
import time

import deepspeed
import torch

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.distributed import over_ranks
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model, read_weights
from ds_moe.engine.start import on_cpu, start_distributed
from ds_moe.models.load import load_model
from tools.bench.launched import leave, read_plan, run_config, write_result
from tools.bench.resident import new_peak, resident

SEQUENCE = 32  # tokens of a rank
INTERVAL_S = 0.005


def main() -> None:
    plan = read_plan()
    topology = start_distributed(plan["ranks"])
    deepspeed.utils.logger.setLevel("ERROR")
    config = run_config(topology, 3, model={"path": plan["folder"]}, steps=1, stage=plan["trained"], precision="fp32")
    new_peak()
    imported = resident("VmRSS")  # what the interpreter and its libraries take
    anonymous = AnonymousPeak()
    began = time.perf_counter()

    model = load_model(config.model, torch.float32, unread=plan["path"] == "streamed")
    hidden_size, vocabulary = (getattr(model.config.get_text_config(), key) for key in ("hidden_size", "vocab_size"))
    prepare_model(model, config, topology)
    ds_config = resolve_deepspeed(config, topology.world_size, on_cpu(), hidden_size)
    read = read_weights(model, config, topology, ds_config)
    loaded = {"loaded_bytes": resident("VmHWM"), "loaded_anonymous_bytes": anonymous.peak, "read_bytes": read}
    loaded["loaded_s"] = time.perf_counter() - began
    engine = build_engine(model, config, ds_config, total_steps=1)
    built = {"built_bytes": resident("VmHWM"), "built_anonymous_bytes": anonymous.peak}
    built["built_s"] = time.perf_counter() - began

    anonymous.stop()
    ids_BS = torch.randint(vocabulary, (1, SEQUENCE), generator=torch.Generator().manual_seed(topology.rank))
    with torch.no_grad():
        loss = engine(input_ids=ids_BS, labels=ids_BS).loss.item()
    mine = {"imported_bytes": imported, **loaded, **built, "loss": loss}
    environment = {module.__name__: module.__version__ for module in (torch, deepspeed)}
    write_result({"environment": environment, "ranks": over_ranks(mine)})
    leave()


class AnonymousPeak:
    """The most RssAnon that a thread has seen, which looks every `INTERVAL_S` while it gets its turn."""

    def __init__(self) -> None:
        self.peak = resident("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.peak = max(self.peak, resident("RssAnon"))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
