"""What do K LoRA adapters under a gate cost on top of the model without them, in time and in memory for backward?

Base and adapters are frozen, input and gate get gradients. Overhead is the time of a forward and backward minus the
base's in the same round; saved are the bytes that the forward keeps for the backward, parameters left out.
layer: one linear, the gate's weights given. The rival is loop-and-stack, what published gates do: each adapter's
output, stacked (K, B, S, out), and their weighted sum by einsum.
model: a whole Qwen3 with adapters on q, k, v and o. Ours takes the gate from the prompt's mean embedding, X-LoRA of
PEFT, the rival, that of each token from a first pass of the base. Both gates start at zero: equal weights and logits.
memory: glibc's allocator as it is ("default"), half of a stack's cost on a CPU, or told to reuse its memory ("reused").
"""

import copy
import ctypes
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
import transformers
from rich.table import Table
from torch import Tensor, nn

from ds_moe.tasks.gate.adapters import read_adapter
from ds_moe.tasks.gate.bank import BankedLinear, Gates, install
from ds_moe.tasks.gate.placement import Update
from tools.results import command_line, new_table, show, write_json

BASE, FIRST_PASS, OURS, STACK, XLORA = "base", "base, forward only", "ds_moe bank", "loop-and-stack", "PEFT X-LoRA"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RIVALS = {"layer": STACK, "model": XLORA}
BOUNDS = {("layer", "overhead"): 1 / 4, ("layer", "saved"): 1 / 3, ("model", "overhead"): 1 / 3}
TOLERANCE = 1e-4  # largest difference of ours to the rival, relative to the largest value of its tensor


class Suite(NamedTuple):
    batch: int
    rank: int
    layer_S: int  # tokens of a sample
    layer_D: int
    layer_K: list[int]
    model_S: int
    model_D: int
    model_K: list[int]
    layers: int
    rounds: int


SUITES = {
    "smoke": Suite(2, 2, 8, 32, [2, 3], 8, 32, [2], 2, 2),
    "cpu": Suite(4, 16, 512, 1024, [4, 8, 16], 128, 512, [4, 8, 16], 4, 7),
}


class Contender(NamedTuple):
    run: Callable[[], tuple[Tensor, ...]]  # the output, the gradient of the input, those of the gate
    parameters: list[Tensor]  # not counted as saved


def layer_contenders(K: int, suite: Suite) -> dict[str, Contender]:
    torch.manual_seed(K)
    D, r, gates = suite.layer_D, suite.rank, Gates()
    linear = nn.Linear(D, D, bias=False).requires_grad_(False)
    parts = {k: Update(torch.randn(r, D) * D**-0.5, torch.randn(D, r) * r**-0.5, 0.5) for k in range(K)}
    banked = BankedLinear(linear, parts, 0, gates)
    x = torch.randn(suite.batch, suite.layer_S, D, requires_grad=True)
    g_BK = torch.rand(suite.batch, K, requires_grad=True)
    dy = torch.randn(x.shape)

    def base() -> tuple[Tensor, ...]:
        y = linear(x)
        return (y, *torch.autograd.grad(y, [x], dy))

    def ours() -> tuple[Tensor, ...]:
        gates.weights = g_BK
        y = banked(x)
        return (y, *torch.autograd.grad(y, [x, g_BK], dy))

    def stack() -> tuple[Tensor, ...]:
        deltas = torch.stack([F.linear(F.linear(x, part.A) * part.scale, part.B) for part in parts.values()])
        y = linear(x) + torch.einsum("bk,kbsd->bsd", g_BK, deltas)
        return (y, *torch.autograd.grad(y, [x, g_BK], dy))

    parameters = [*banked.parameters(), *(matrix for part in parts.values() for matrix in (part.A, part.B))]
    return {name: Contender(run, parameters) for name, run in ((BASE, base), (OURS, ours), (STACK, stack))}


def model_contenders(K: int, suite: Suite) -> dict[str, Contender]:
    D = suite.model_D
    config = transformers.Qwen3Config(
        **{"vocab_size": 1000, "hidden_size": D, "intermediate_size": 3 * D, "num_hidden_layers": suite.layers},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": D // 8, "use_cache": False},
    )
    torch.manual_seed(K)
    model = transformers.Qwen3ForCausalLM(config).requires_grad_(False).eval()
    banked, gate = copy.deepcopy(model), nn.Linear(D, K)
    with tempfile.TemporaryDirectory() as folder:
        folders = {str(k): f"{folder}/{k}" for k in range(K)}  # X-LoRA knows its adapters by number
        for path in folders.values():
            lora = peft.LoraConfig(r=suite.rank, lora_alpha=32, init_lora_weights=False, target_modules=TARGETS)
            peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(path)
        bank = install(banked, [read_adapter(name, Path(path)) for name, path in folders.items()])
        mixture = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=D, adapters=folders, xlora_depth=1)
        xlora = peft.get_peft_model(copy.deepcopy(model), mixture).eval()
    classifier = [parameter for parameter in xlora.parameters() if parameter.requires_grad]
    for parameter in [*gate.parameters(), *classifier]:
        nn.init.zeros_(parameter)
    x = model.get_input_embeddings()(torch.randint(1000, (suite.batch, suite.model_S))).requires_grad_()
    dy = torch.randn(suite.batch, suite.model_S, 1000) / x.shape[1]

    def run(forward: nn.Module, trained: list[nn.Parameter]) -> tuple[Tensor, ...]:
        y = forward(inputs_embeds=x).logits
        return (y, *torch.autograd.grad(y, [x, *trained], dy))

    def ours() -> tuple[Tensor, ...]:
        bank.gates.weights = gate(x.mean(1)).softmax(-1)
        return run(banked, list(gate.parameters()))

    def first_pass() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(inputs_embeds=x).logits,)

    parameters = list(nn.ModuleList([model, banked, gate, xlora]).parameters())
    runs = {BASE: lambda: run(model, []), OURS: ours, XLORA: lambda: run(xlora, classifier), FIRST_PASS: first_pass}
    return {name: Contender(run, parameters) for name, run in runs.items()}


def saved_bytes(contender: Contender) -> int:
    saved: list[Tensor] = []  # alive until counted: an address means one storage only
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        contender.run()
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, saved)}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in contender.parameters}
    return sum(size for address, size in storages.items() if address not in parameters)


def measure(case: str, K: int, contenders: dict[str, Contender], rounds: int) -> dict[str, Any]:
    """Figures of each contender, and the ratios of ours to the rival."""
    shared = 3 if case == "layer" else 2  # X-LoRA's gate has other parameters than ours, and so other gradients
    pairs = list(zip(contenders[OURS].run(), contenders[RIVALS[case]].run(), strict=False))[:shared]
    differs = max(((ours - rival).abs().max() / rival.abs().max()).item() for ours, rival in pairs)
    if not differs <= TOLERANCE:
        sys.exit(f"error: {case}, K = {K}: {OURS} and {RIVALS[case]} differ by {differs:.0e}; nothing is timed")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first one warms up
        for name, contender in contenders.items():
            began_s = time.perf_counter()
            contender.run()
            times[name] += [time.perf_counter() - began_s] if turn else []
    results = {}
    for name, taken in times.items():
        over = [own - base for own, base in zip(taken, times[BASE], strict=True)]
        figures = {"median_s": statistics.median(taken), "overhead_s": statistics.median(over)}
        spread = {"overhead_min_s": min(over), "overhead_max_s": max(over)}
        results[name] = figures | spread | {"saved_bytes": saved_bytes(contenders[name])}
    own, rival = results[OURS], results[RIVALS[case]]
    ratios = {what: own[key] / rival[key] for what, key in (("overhead", "overhead_s"), ("saved", "saved_bytes"))}
    if case == "model":  # what is left without the rival's
        ratios["but for the first pass"] = own["overhead_s"] / (rival["overhead_s"] - results[FIRST_PASS]["median_s"])
    return {"case": case, "K": K, "difference": differs, "results": results, "ratios": ratios}


def reuse_memory() -> bool:
    """Tell glibc never to hand memory back; false where there is no glibc."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # of malloc.h
    return hasattr(libc, "mallopt") and bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def claims(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for case, ((kind, what), bound) in itertools.product(cases, BOUNDS.items()):
        if case["case"] == kind:
            ratio, about = case["ratios"][what], f"{kind}, K = {case['K']}, memory {case['memory']}"
            claim = f"{about}: {what} at most 1/{1 / bound:.0f} of {RIVALS[kind]}"
            found.append({"claim": claim, "ratio": ratio, "holds": ratio <= bound})
    return found


def table(cases: list[dict[str, Any]]) -> Table:
    columns = ("median ms", "overhead ms", "min - max", "ours to it", "saved MiB", "ours to it")
    table = new_table(["case", "K", "memory", "contender"], columns)
    for case in cases:
        about = (case["case"], str(case["K"]), case["memory"])
        for name, result in case["results"].items():
            median, over, low, high = (f"{value * 1e3:.1f}" for key, value in result.items() if key.endswith("_s"))
            overhead = ("", "") if name in (BASE, FIRST_PASS) else (over, f"{low} - {high}")
            shown = ("overhead", "saved") if name in RIVALS.values() else ()
            ratios = [f"{case['ratios'][what]:.3f}" for what in shown] or ["", ""]
            saved = f"{result['saved_bytes'] / 2**20:.2f}"
            table.add_row(*about, name, median, *overhead, ratios[0], saved, ratios[1])
        table.add_section()
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="sizes, fp32 on the CPU (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    torch.set_num_threads(options.threads)
    cases: list[dict[str, Any]] = []
    for memory in ("default", "reused"):
        if memory == "reused" and not reuse_memory():
            break
        for case, K in [("layer", K) for K in suite.layer_K] + [("model", K) for K in suite.model_K]:
            contenders = layer_contenders(K, suite) if case == "layer" else model_contenders(K, suite)
            cases.append({"memory": memory} | measure(case, K, contenders, suite.rounds))
        print(f"measured with memory {memory}", file=sys.stderr, flush=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    device: dict[str, Any] = {"device": f"cpu, {torch.backends.cpu.get_cpu_capability()}", "threads": options.threads}
    device["load_average"] = round(os.getloadavg()[0], 1)  # well above `threads`: other processes were running
    facts = {"suite": options.suite, **suite._asdict(), "dtype": "float32", **device, "versions": versions}
    judged = claims(cases)
    show(facts, table(cases))
    for claim in judged:
        print(f"{'ok     ' if claim['holds'] else 'NOT MET'} {claim['ratio']:.3f}  {claim['claim']}")
    for case in (case for case in cases if case["case"] == "model"):
        rest = f"{case['ratios']['but for the first pass']:.3f}  model, K = {case['K']}, memory {case['memory']}"
        print(f"        {rest}: overhead, but for X-LoRA's first pass")
    write_json(facts | {"cases": cases, "claims": judged}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
