"""Sections without an engine: the machine, kernels, the exchange of rows, pieces of a layer, a layer."""

import gc
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_moe.checkpoint.host_copy import HostCopy
from ds_moe.engine.cpu import cores
from ds_moe.launcher.command import free_port
from ds_moe.models.head import label_logprobs
from ds_moe.models.tower import Patch3d
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.backends import BACKENDS, choose_backend, swiglu
from ds_moe.moe.backends.reference import Reference
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from ds_moe.moe.experts import Experts
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.parts import make_router
from ds_moe.moe.permute import sort_by_expert, sum_per_token, to_experts
from ds_moe.moe.tape import checkpoint_contexts
from tools.bench.layer.block import SUITES, Case, Shape, Suite, draw_weights, routed_input
from tools.bench.layer.contenders import DEFAULT, RIVAL, contenders
from tools.bench.layer.measure import difference, forward_backward, interleaved, results
from tools.gpu_check.facts import Check, differ

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "peft", "liger-kernel", "megablocks", "flash-attn")
ROWS = ([0, 3, 0, 9, 1], [0, 0, 7, 0, 0], [130, 0, 257, 1, 64], [0, 0, 0, 0, 0])  # of five experts
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a difference's norm; tiles and order of sums are free
LIGER_BOUND = 3e-2  # its fp32 products are TF32, and combine weights' gradients are summed in the rows' dtype


def env(check: Check) -> None:
    """Versions, the device, cores, what would be compiled, and which backends can run."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    check.say("versions", python=sys.version.split()[0], **found)
    check.say("host", cores=cores(), threads=torch.get_num_threads(), nvcc=shutil.which("nvcc"), cc=shutil.which("g++"))
    if check.gpu:
        properties = torch.cuda.get_device_properties(check.device)
        capability = f"{properties.major}.{properties.minor}"
        libraries = {"nccl": torch.cuda.nccl.version(), "cudnn": torch.backends.cudnn.version()}
        check.say("device", name=properties.name, capability=capability, bytes=properties.total_memory, **libraries)
    check.say("flash attention", installed=find_spec("flash_attn") is not None)
    for name, backend in BACKENDS.items():
        check.say("backend", name=name, obstacle=backend.obstacle(check.device.type))
    kind, why = choose_backend(check.device.type, torch.bfloat16)
    check.say("auto", backend=kind, why=why)


def kernels(check: Check) -> None:
    """Every backend that runs here against loops in float64: experts without rows, no rows, memory full of NaN."""
    usable = {name: backend for name, backend in BACKENDS.items() if backend.obstacle(check.device.type) is None}
    if not check.gpu:  # Triton's interpreter has its own tests
        usable = {name: usable[name] for name in ("grouped_mm", "reference")}
    for dtype, bound in BOUNDS.items():
        for counts in ROWS:
            leaves, direction = _rows(counts, dtype, check.device)
            wide = _products(Reference(), [leaf.double() for leaf in leaves], counts, direction.double())
            for name, backend in usable.items():
                poison = torch.full((2**27 if check.full else 2**12,), float("nan"), device=check.device)
                del poison  # blocks that the allocator hands out again hold NaN
                found = _products(backend(), leaves, counts, direction)
                worst = max(differ(ours, theirs) for ours, theirs in zip(found, wide, strict=True))
                ok = worst < (LIGER_BOUND if name == "liger" else bound)
                check.say("experts", ok, backend=name, dtype=dtype, rows=counts, worst=worst)
    T, K, E, D = (4096, 8, 128, 256) if check.full else (64, 8, 16, 32)
    expert_N = torch.rand(T, E, device=check.device).topk(K).indices.flatten()
    token_N = torch.arange(T, device=check.device).repeat_interleave(K)
    x_TD = torch.randn(T, D, device=check.device, dtype=torch.bfloat16)
    for name, backend in usable.items():
        permutation = sort_by_expert(backend(), token_N, expert_N, T, E, K)
        rows = to_experts(backend(), x_TD, permutation)
        sums, order = (
            differ(sum_per_token(backend(), rows, permutation), K * x_TD),
            torch.argsort(expert_N, stable=True),
        )
        moved = torch.equal(rows, x_TD[token_N[order]])
        check.say("rows to experts and back", moved and sums < 4e-3, backend=name, moved_exactly=moved, sums=sums)


def _rows(counts: list[int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """(rows, gate_up, down, combine weights), and a direction for the gradient."""
    R, e, D, width = sum(counts), len(counts), 128, 96
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)

    weights = torch.rand(R, generator=generator).to(device)
    return [normal(R, D), normal(e, 2 * width, D), normal(e, D, width), weights], normal(R, D)


def _products(backend: object, leaves: list[Tensor], counts: list[int], direction: Tensor) -> list[Tensor]:
    rows, gate_up, down, weights = given = [leaf.clone().requires_grad_() for leaf in leaves]
    counts_e = torch.tensor(counts, device=rows.device)
    y = backend.swiglu(rows, gate_up, down, counts_e, weights, "act")
    return [y, *torch.autograd.grad(y, given, direction)]


def exchange(check: Check) -> None:
    """The all-to-all of rows with oneself, over NCCL on a GPU, against the layer without one, while the allocator is
    kept busy: a missing dependency between streams shows as a difference."""
    T, D, width, E, K = (8192, 2048, 768, 64, 8) if check.full else (64, 32, 48, 8, 2)
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl" if check.gpu else "gloo", init_method=address, rank=0, world_size=1)
    torch.manual_seed(0)
    shapes = (E, D), (E, 2 * width, D), (E, D, width)
    leaves = [nn.Parameter((torch.randn(shape) * 0.02).to(check.device, torch.bfloat16)) for shape in shapes]

    def layer_with(dispatcher: LocalDispatcher | AllToAllDispatcher) -> MoELayer:
        router, experts = make_router("topk", leaves[0], K), Experts(*leaves[1:])
        return MoELayer(router, experts, dispatcher, ForwardContext(), index=0).to(check.device)

    local, exchanging = layer_with(LocalDispatcher()), None
    for chunks in (1, 2, 4):
        exchanging = layer_with(AllToAllDispatcher(ExpertParallel(1, 0, dist.group.WORLD), chunks=chunks))
        worst, turns = 0.0, 40 if check.full else 4
        for turn in range(turns):
            x = torch.randn(1, T - 7 * turn, D).to(check.device, torch.bfloat16).requires_grad_()
            found = [_layer_results(layer, x, leaves, again=turn % 2 == 1) for layer in (local, exchanging)]
            worst = max(worst, *(differ(ours, theirs) for theirs, ours in zip(*found, strict=True)))
        check.say("exchange with oneself", worst < 1e-2, chunks=chunks, turns=turns, worst=worst)
    x = torch.randn(1, T, D).to(check.device, torch.bfloat16).requires_grad_()
    for name, layer, most in (("local", local, 0), ("all_to_all", exchanging, 1)):
        with check.host_waits() as waits:
            layer(x).sum().backward()
        check.say("host waits of a layer", sum(waits.values()) <= most, dispatcher=name, lines=waits)
    dist.destroy_process_group()


def _layer_results(layer: MoELayer, x: Tensor, leaves: list[nn.Parameter], again: bool) -> list[Tensor]:
    """Output and gradients beside a residual, among freed blocks of many sizes; `again`: recomputed in backward."""
    blocks = [torch.empty(int(torch.randint(1, 2**20, ())), device=x.device) for _ in range(8)]
    del blocks[::2]

    def block(x: Tensor) -> Tensor:
        return x + layer(x)

    y = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts) if again else block(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *leaves])]


def pieces(check: Check) -> None:
    """Passes beside the products: activation, sums per token, loss, patches, masks, copies to the host."""
    R, width, D, V, T = (262_144, 768, 2048, 151_936, 8192) if check.full else (512, 48, 64, 500, 64)
    _activation(check, R, width)
    _sums(check, R, D)
    _loss(check, T, D, V)
    _patches(check, *((8192, 1152) if check.full else (32, 16)))
    _masks(check, 4096 if check.full else 64)
    value, copy = torch.randn(2**28 if check.full else 2**12, device=check.device), HostCopy(check.device)
    through, plain = check.ms(lambda: copy(value), 3, 1), check.ms(lambda: value.cpu(), 3, 1)
    check.say("copy to the host", torch.equal(copy(value), value.cpu()), bytes=value.nbytes, ms=through, plain_ms=plain)


def _bf16(check: Check, *shape: int) -> Tensor:
    return torch.randn(shape, device=check.device, dtype=torch.bfloat16)


def _activation(check: Check, R: int, width: int) -> None:
    """The pass between the products; `least_bytes` are those that a kernel of its own would read and write."""
    both, grad, weight = _bf16(check, R, 2 * width), _bf16(check, R, width), torch.rand(R, device=check.device)
    forward = check.ms(lambda: swiglu._activate(both, weight, keep=False))
    backward = check.ms(lambda: swiglu._activate_backward(both, None, weight, grad))
    least = {"forward": 3 * grad.nbytes, "backward": 6 * grad.nbytes}
    check.say("activation", rows=R, width=width, forward_ms=forward, backward_ms=backward, least_bytes=least)


def _sums(check: Check, R: int, D: int) -> None:
    rows, place = _bf16(check, R, D), torch.randperm(R, device=check.device)
    starts = torch.arange(0, R, 8, device=check.device)
    summed = check.ms(lambda: F.embedding_bag(place, rows, starts, mode="sum"))
    check.say("sums per token", ms=summed, bytes=int(rows.nbytes * 1.125), gather_ms=check.ms(lambda: rows[place]))


def _patches(check: Check, count: int, width: int) -> None:
    patch = Patch3d(3, width, (2, 16, 16), (2, 16, 16), device=check.device, dtype=torch.bfloat16)
    pixels = _bf16(check, count, 3, 2, 16, 16)
    convolved, product = nn.Conv3d.forward(patch, pixels), patch(pixels)
    times = {"conv3d_ms": check.ms(lambda: nn.Conv3d.forward(patch, pixels), 3, 1)}
    times["product_ms"] = check.ms(lambda: patch(pixels), 3, 1)
    check.say("patches", differ(product, convolved) < 1e-2, **times, apart=differ(product, convolved))


def _loss(check: Check, T: int, D: int, V: int) -> None:
    """transformers' loss over all logits, and ours in tiles: the same value and gradients, in less memory."""
    hidden = torch.randn(T, D).to(check.device, torch.bfloat16).requires_grad_()
    head = (torch.randn(V, D) * 0.02).to(check.device, torch.bfloat16).requires_grad_()
    target = torch.randint(V, (T,)).to(check.device)
    labels, found = F.pad(target, (1, 0))[None], {}
    losses = {
        "transformers": lambda: ForCausalLMLoss(F.linear(F.pad(hidden, (0, 0, 0, 1))[None], head), labels, V),
        "ds_moe": lambda: -label_logprobs([(hidden, head)], target, 1.0).mean(),
    }
    for name, loss in losses.items():

        def run(name: str = name, loss=loss) -> None:
            value = loss()
            found[name] = [value.detach(), *torch.autograd.grad(value, [hidden, head])]

        taken, peak = check.ms(run, 3, 1), check.peak_gib(run)
        check.say("loss", of=name, tokens=T, vocabulary=V, ms=taken, peak_GiB=peak, value=found[name][0].item())
    apart = [differ(ours, theirs) for theirs, ours in zip(found["transformers"], found["ds_moe"], strict=True)]
    check.say("losses agree", max(apart) < 1e-2, apart=apart)
    found.clear()
    gc.collect()


def _masks(check: Check, S: int) -> None:
    """Attention over right-padded rows: causal alone, which training takes, and with the mask that it leaves out."""
    heads, kv, width = (32, 4, 128) if check.full else (4, 2, 16)
    q, k, v = (
        torch.randn(2, count, S, width).to(check.device, torch.bfloat16).requires_grad_() for count in (heads, kv, kv)
    )
    mask = torch.ones(2, 1, S, S, dtype=torch.bool, device=check.device).tril()
    mask[1, :, :, -S // 8 :] = False
    attend = F.scaled_dot_product_attention

    def causal() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, is_causal=True, enable_gqa=True).float().sum(), [q, k, v])

    def masked() -> tuple[Tensor, ...]:
        wide = (one.repeat_interleave(heads // kv, 1) for one in (k, v))
        return torch.autograd.grad(attend(q, *wide, attn_mask=mask).float().sum(), [q, k, v])

    times = {"causal_ms": check.ms(causal, 5, 2), "masked_ms": check.ms(masked, 5, 2)}
    check.say("masks", tokens=S, **times, causal_GiB=check.peak_gib(causal), masked_GiB=check.peak_gib(masked))


def layer(check: Check) -> None:
    """A layer of Qwen3-VL-30B-A3B: results of ours and of transformers', their times in turns, their kernels."""
    suite = SUITES["h100"] if check.full else Suite("cpu", torch.bfloat16, 3e-2, {}, {})
    suite = suite._replace(device=check.device.type)
    shape = suite.shapes["qwen3-vl-30b"] if check.full else Shape(64, 64, 48, 8, 2)
    weights = draw_weights(shape, suite)
    case, x = Case(shape, weights, 0), routed_input(shape, weights.router_ED, "uniform")
    blocks = {name: contenders()[name](case) for name in (DEFAULT, RIVAL)}
    ours, theirs = (results(block, x) for block in blocks.values())
    apart = difference(ours, theirs)
    check.say("layers agree", apart <= suite.tolerance, apart=apart)
    del ours, theirs
    times = interleaved({name: (block, x) for name, block in blocks.items()}, suite.device, 10 if check.full else 2)
    medians = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    for name, block in blocks.items():

        def run(block=block) -> object:
            return forward_backward(block, x)

        facts = {"ms": round(medians[name] * 1e3, 3), "peak_GiB": check.peak_gib(run), **check.kernels(run, 14)}
        check.say("layer", of=name, TFLOPs_a_second=round(shape.flops / medians[name] / 1e12, 2), **facts)
    faster = medians[RIVAL] / medians[DEFAULT]
    check.say("speed against transformers", faster >= 1 if check.gpu else None, times=round(faster, 3))
