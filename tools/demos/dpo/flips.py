"""What an MoE's routing does to implicit rewards: held-out pairs under a trained policy, live and with replay.

A policy's reward of an answer is beta (log p - log p_ref). Where updates have moved the routers' inputs, the policy
takes other experts than the reference, and a part of the reward is theirs. Here every pair is scored twice: as the
policy routes, and under the experts that the reference used. On one process, without DeepSpeed.

    python -m tools.demos.dpo.flips RUN.yaml CHECKPOINT [key=value ...]
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ds_moe.checkpoint.files import Reader
from ds_moe.config.run_file import load_run
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.eval_set import EvalSet
from ds_moe.distributed import Topology
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.convert import convert_for
from ds_moe.models.freeze import set_trainable
from ds_moe.models.head import targets_of
from ds_moe.models.load import load_model, processor_of
from ds_moe.monitor.progress import print_table
from ds_moe.replay.metrics import routing_difference
from ds_moe.replay.record import RoutingRecorder
from ds_moe.tasks.dpo.pairs import PAIRS
from ds_moe.tasks.dpo.reference import BaseReference, pair_logprobs
from ds_moe.tasks.task import TrainingParts
from tools.results import command_line, refusing, write_json


class Bare:
    """A model in the place of an engine."""

    def __init__(self, model: Any) -> None:
        self.module, self.eval, self.train = model, model.eval, model.train

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def measure(run_file: Path, checkpoint: Path, overrides: list[str]) -> dict[str, float]:
    """Figures over all pairs of data.eval."""
    with tempfile.TemporaryDirectory() as scratch:
        config = load_run(str(run_file), [*overrides, "moe.ep_size=1", f"train.output_dir={scratch}"])
        model = load_model(config.model, torch.float32, config.train.seed)
        set_trainable(model, config)
        attend_by_sample(model)
        context, reader = convert_for(model, config), Reader(checkpoint)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(reader.read(f"weight/{name}"))
        engine, cpu = Bare(model), Topology(0, 1, 0, 1, torch.device("cpu"))
        reference = BaseReference(TrainingParts(config, cpu, engine, context))  # pyright: ignore[reportArgumentType]
        processor = processor_of(config.model, config.data.video)
        eval_set = EvalSet(config, processor, rank=0, world_size=1, record_kind=PAIRS)
        live, replayed, flips = [], [], []
        for one in eval_set.batches():
            batch = reference.added_to(one.batch.to(cpu.device), "held-out")
            inputs = {**batch.inputs, "routing": batch.reference_routing}
            model.eval()
            with torch.no_grad():
                with RoutingRecorder(model) as recorder:
                    of_live, _ = pair_logprobs(engine, batch)  # pyright: ignore[reportArgumentType]
                of_replay, _ = pair_logprobs(engine, replace(batch, inputs=inputs))  # pyright: ignore[reportArgumentType]
            [ids_TLK] = recorder.take()
            answers_T = (targets_of(batch.labels) != NO_LOSS).flatten()
            flips.append(routing_difference(ids_TLK, batch.reference_routing.flatten(0, 1), answers_T))
            for rewards, logprob_P2 in ((live, of_live), (replayed, of_replay)):
                rewards.append(config.dpo.beta * (logprob_P2 - batch.reference_P2)[batch.real_P])
    return figures(torch.cat(live), torch.cat(replayed), flips)


def figures(live_P2: torch.Tensor, replayed_P2: torch.Tensor, flips: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    of_routing_P2 = live_P2 - replayed_P2
    margins, replayed_margins = (-rewards.diff().flatten() for rewards in (live_P2, replayed_P2))
    routers, changed = (sum(float(one[name]) for one in flips) for name in ("routers", "routers_changed"))
    return {
        "pairs": len(live_P2),
        "routers changed, share": changed / max(routers, 1),
        "reward, rms": live_P2.square().mean().sqrt().item(),
        "its part by other experts, rms": of_routing_P2.square().mean().sqrt().item(),
        "its part by other experts, mean": of_routing_P2.mean().item(),
        "margin, mean": margins.mean().item(),
        "margin under replay, mean": replayed_margins.mean().item(),
        "margins of another sign under replay, share": (margins.sign() != replayed_margins.sign())
        .float()
        .mean()
        .item(),
        "preferred answers that win": (margins > 0).float().mean().item(),
        "preferred answers that win under replay": (replayed_margins > 0).float().mean().item(),
    }


@refusing
def main() -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    found = measure(options.run, options.checkpoint, options.overrides)
    print_table({name: f"{value:.4g}" for name, value in found.items()}, f"routing and rewards of {options.checkpoint}")
    write_json(found, options.json, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
