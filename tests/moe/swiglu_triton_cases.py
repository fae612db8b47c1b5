"""Runs the Triton kernels of SwiGLU in Triton's interpreter, on the CPU, beside torch's operators and float64; with the
argument `ahead` compiles them for H100 and B200, which needs no GPU."""

import sys

import torch

from ds_moe.moe.backends import swiglu, swiglu_triton
from tests.launcher import report

SHAPES = {"one block": (5, 24), "several blocks": (3, 150), "no rows": (0, 8), "one row": (1, 7)}
TARGETS = {"sm_90": 90, "sm_100": 100}


def inputs(rows, width, dtype, weighted):
    generator = torch.Generator().manual_seed(rows)
    both = (3 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    return both, torch.rand(rows, generator=generator) if weighted else None, grad


def exact(both, weight, grad):
    """By autograd, in float64."""
    both, grad = both.double().requires_grad_(), grad.double()
    weight = None if weight is None else weight.double().requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    weighted = torch.nn.functional.silu(gate) * up * (1 if weight is None else weight[:, None])
    grads = torch.autograd.grad(weighted, [both, *([] if weight is None else [weight])], grad)
    return [weighted.detach(), weighted.detach(), *grads]


def differences(ours, theirs):
    """The largest one, relative to its tensor's largest entry; 0 of tensors without any."""
    pairs = [(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True) if other.numel()]
    return max((((one - other).abs().max() / other.abs().max()).item() for one, other in pairs), default=0.0)


def compared(rows, width, dtype, weighted):
    both, weight, grad = inputs(rows, width, dtype, weighted)
    assert swiglu_triton.takes(both, weight)
    found = [swiglu_triton.activate(both, weight), *swiglu_triton.activate_backward(both, weight, grad)]
    plain = [swiglu._activate(both, weight, keep=False)[0], *swiglu._activate_backward(both, None, weight, grad)]
    found, plain = ([one for one in tensors if one is not None] for tensors in (found, plain))
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in plain]
    return {"exact": differences(found, exact(both, weight, grad)), "torch": differences(found, plain)}


def interpreted():
    swiglu_triton.WIDEST = 64  # several blocks of columns
    results = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.float16):
            for weighted in (True, False):
                results[f"{name}, {str(dtype)[6:]}, {weighted}"] = compared(*shape, dtype, weighted)
    both, weight, grad = inputs(5, 24, torch.float32, True)
    gradients = swiglu_triton.activate_backward(both, weight, grad)[2]
    swapped = torch.cat(both.chunk(2, dim=-1)[::-1], dim=-1).contiguous()  # up where gate belongs
    wrong = differences([swiglu_triton.activate(swapped, weight)], exact(both, weight, grad)[:1])
    report(results=results, wrong=wrong, summed_in=str(gradients.dtype))


def ahead():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for name, capability in TARGETS.items():
        for element in ("bf16", "fp16", "fp32"):
            for kernel in (swiglu_triton._forward, swiglu_triton._backward):
                types = dict.fromkeys(kernel.arg_names, f"*{element}")
                types |= {"weight": "*fp32", "grad_weight": "*fp32", "width": "i32"}
                constants = {"WEIGHTED": True, "BLOCK": 1024}
                signature = {one: "constexpr" if one in constants else types[one] for one in kernel.arg_names}
                source = ASTSource(kernel, signature, constants)
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                target = next(line for line in made.asm["ptx"].splitlines() if line.startswith(".target"))
                key = f"{name} {element} {kernel.fn.__name__}"
                found[key] = {"target": target.split()[1].rstrip(","), "bytes": len(made.asm["cubin"])}
    report(compiled=found)


if __name__ == "__main__":
    ahead() if sys.argv[1:] == ["ahead"] else interpreted()
