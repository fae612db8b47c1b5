"""Plugins of vLLM 0.32, which every process of a server loads."""

import os


def reload_of_experts():
    """Make a reload of weights right for experts on CPUs.

    `UnquantizedFusedMoEMethod._setup_kernel` packs the experts for the CPU's kernel on the first load only: later
    weights land unpacked where packed ones are read, and the server goes on with wrong ones.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    setup = UnquantizedFusedMoEMethod._setup_kernel
    if not current_platform.is_cpu() or getattr(setup, "packs_again", False):
        return

    def packing_again(self, layer, w13, w2):
        self.moe_kernel = None  # as on the first load
        return setup(self, layer=layer, w13=w13, w2=w2)

    packing_again.packs_again = True
    UnquantizedFusedMoEMethod._setup_kernel = packing_again


def native_positions():
    """Triton's interpreter keeps bf16 as raw 16 bits, so that kernels which compute in bf16 give NaN.

    On the way of Qwen3-VL that is one kernel, which has a twin in plain torch.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        from vllm.model_executor.models import qwen3_vl

        qwen3_vl.triton_pos_embed_interpolate = qwen3_vl.pos_embed_interpolate_native


def native_sampling():
    """Sampling and log-probs in plain torch, in the place of three kernels that are two thirds of a tiny model's time
    where Triton interprets them. The distribution is the same; seeds draw other noise."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from vllm_without_gpu import sampling

        sampling.install()
