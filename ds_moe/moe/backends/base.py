"""What a backend offers: kernels that move rows and multiply them by expert.

A backend's kernels have no gradients. Those are written once, in terms of the kernels: for moving rows in
`permute.py`, for the products here and in `swiglu.py`. A new backend therefore needs no backward; one that has its
own gradients overrides `multiply` and `swiglu`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ds_moe.moe.backends.swiglu import Recompute, SwiGLU
from ds_moe.moe.decision import count_experts


class Permutation(NamedTuple):
    """How a list of N assignments becomes rows grouped by expert, and how the rows find their tokens again."""

    order_N: Tensor  # int64: position in the sorted list -> position in the decision's list
    token_N: Tensor  # int64: position in the sorted list -> token
    counts_E: Tensor  # int64: rows of each expert, in the order in which the list is sorted
    place_N: Tensor  # int64: positions in the sorted list, those of a token beside each other, tokens in order
    start_T: Tensor  # int64: where each token begins in `place_N`
    top_k: int | None  # the decision's list holds this many of every token, beside each other, tokens in order; or None


class Backend:
    """Stateless kernels. This class moves rows with torch's operators; a kind adds at least `product` and `outer`."""

    @classmethod
    def obstacle(cls, device: str) -> str | None:
        """Why this backend cannot be used on a kind of device, and the fix; None: it can."""
        return None

    @classmethod
    def made_of(cls) -> str:
        """The libraries that compute, with their versions, for the run's summary."""
        return f"torch {torch.__version__}"

    def sort(self, expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Stable order by expert, and the rows of each expert: int64 (N,) and (E,)."""
        # torch sorts integers by radix, one pass for each byte of a key: so make the keys as short as they can be.
        keys_N = expert_N.to(torch.uint8 if num_experts <= 256 else torch.int16)
        return torch.argsort(keys_N, stable=True), count_experts(expert_N, num_experts)

    def to_experts(self, x_TD: Tensor, permutation: Permutation) -> Tensor:
        """(T, D) -> (N, D): the row of each assignment, in sorted order."""
        return x_TD.index_select(0, permutation.token_N)

    def sum_per_token(self, rows_ND: Tensor, permutation: Permutation) -> Tensor:
        """(N, D) sorted rows -> (T, D) sums per token.

        The sums are taken in fp32 and in a fixed order, so that they have the same bits every time.
        """
        return F.embedding_bag(permutation.place_N, rows_ND, permutation.start_T, mode="sum")

    def product(self, rows_RI: Tensor, weight_eIO: Tensor, counts_e: Tensor) -> Tensor:
        """(R, O): the `counts_e[i]` rows of expert i times `weight_eIO[i]`, which may be a transposed view."""
        raise NotImplementedError

    def outer(self, left_RO: Tensor, right_RI: Tensor, counts_e: Tensor) -> Tensor:
        """(e, O, I): `left.T @ right` over the rows of each expert; zeros for an expert without rows."""
        raise NotImplementedError

    def multiply(self, rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
        """(R, O): `rows @ weight[i].T` for each expert's rows, with gradients."""
        return _Multiply.apply(self, rows_RI, weight_eOI, counts_e)

    def swiglu(
        self,
        rows_RD: Tensor,
        gate_up_eOD: Tensor,
        down_eDF: Tensor,
        counts_e: Tensor,
        weight_R: Tensor | None,
        recompute: Recompute,
    ) -> Tensor:
        """(R, D): SiLU-gated experts, `(SiLU(x Wg.T) * (x Wu.T) * weight) Wd.T`, with gradients.

        Args:
            rows_RD: `counts_e[i]` rows of expert i after those of expert i - 1; zeros are allowed.
            gate_up_eOD: Wg above Wu, O = 2F.
            down_eDF: Wd.
            weight_R: combine weights in fp32 (or as wide as the rows); None: 1.
            recompute: what backward computes again instead of keeping it from forward. It always keeps the rows;
                beside them `none` keeps the first products (R, 2F) and the activation (R, F), `act` the first products,
                and `all` nothing, so that one product of three is repeated.
        """
        return SwiGLU.apply(self.product, self.outer, recompute, rows_RD, gate_up_eOD, down_eDF, counts_e, weight_R)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, backend: Backend, rows_RI: Tensor, weight_eOI: Tensor, counts_e: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(rows_RI, weight_eOI, counts_e)
        return backend.product(rows_RI, weight_eOI.transpose(-2, -1), counts_e)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        rows_RI, weight_eOI, counts_e = ctx.saved_tensors
        grad_RO = grads[0].contiguous()  # autograd expands the gradient of a sum with stride 0
        grad_rows_RI = ctx.backend.product(grad_RO, weight_eOI, counts_e) if ctx.needs_input_grad[1] else None
        grad_eOI = ctx.backend.outer(grad_RO, rows_RI, counts_e) if ctx.needs_input_grad[2] else None
        return None, grad_rows_RI, grad_eOI, None
