"""Compiles megablocks' kernels for an H100 as the backend and megablocks' own layer launch them; needs no GPU."""

import warnings
from importlib.util import find_spec

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_moe.moe.backends.megablocks_ops import load_megablocks
from tests.launcher import report

TARGET = GPUTarget("cuda", 90, 32)
INDICES = {"indices": "*i64", "bin_ids": "*i32", "bins": "*i32", "padded_bins": "*i32"}
COPY = {"to_experts": {"A_TO_B": True, "TOP_K": 1}, "sum_per_token": {"A_TO_B": False, "TOP_K": 8}}


def compiled(kernel, types, constants):
    """The PTX's target and the size of the machine code."""
    kernel = kernel.fn  # what is autotuned
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    result = triton.compile(ASTSource(kernel, signature, constants), target=TARGET)
    target = next(line for line in result.asm["ptx"].splitlines() if line.startswith(".target"))
    return {"target": target.split()[1].rstrip(","), "bytes": len(result.asm["cubin"])}


def main():
    with warnings.catch_warnings(record=True) as caught:
        megablocks = load_megablocks("cuda")
    warned = [str(warning.message) for warning in caught if "Grouped GEMM" in str(warning.message)]
    found = [megablocks.grouped_gemm_util.grouped_gemm_is_available(), find_spec("grouped_gemm") is not None]
    report(warnings=warned, grouped_gemm=found)
    kernels = megablocks.backend.kernels
    results = {}
    for element in ("bf16", "fp32"):
        rows = dict.fromkeys(("a", "b", "x", "grad", "wgrad"), f"*{element}")
        sizes = {"NUM_COLUMNS": 2880, "BLOCK_X": 256}
        for name, direction in COPY.items():
            constants = {"weights": None, "SCALE": False, **sizes, **direction}
            results[f"{name} {element}"] = compiled(kernels._padded_copy, rows | INDICES, constants)
        results[f"gradient of weights {element}"] = compiled(
            kernels._padded_copy_wgrad, rows | INDICES, {"TOP_K": 8, **sizes}
        )
    report(compiled=results)


if __name__ == "__main__":
    main()
