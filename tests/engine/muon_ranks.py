"""Ranks of test_muon: steps of Muon and AdamW under ZeRO against plain float64, matrix by matrix."""

import json
import sys
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ds_moe.config.deepspeed import resolve_deepspeed
from ds_moe.config.run import RunConfig
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import collate, encode
from ds_moe.engine import flat_matrices, masters
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.models.convert import moe_layers
from ds_moe.models.families import expert_state
from ds_moe.models.freeze import set_trainable
from ds_moe.models.load import load_model
from ds_moe.models.processor import tiny_processor
from tests.launcher import leave, report

STEPS, IDLE = 3, 5  # IDLE is an expert that gets no token after the first step
LR, MUON_LR, DECAY, MOMENTUM, CLIP, BETAS = 1e-2, 2e-2, 0.1, 0.9, 0.5, (0.8, 0.95)
ADAMW = ("embed", "lm_head", "norm", "bias", "gate.weight", "patch_embed")  # by name, what must not be Muon's


def newton_schulz(matrix):
    """Of one matrix, as Jordan wrote it; transposed if it is tall."""
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def apart(name, tensor):
    """The matrices of a parameter, as they are orthogonalised: experts by themselves, gate apart from up."""
    matrices = list(tensor) if tensor.dim() == 3 else [tensor]
    fused = {"attn.qkv": 3, "gate_up_proj": 2, "gate_up_B": 2} if "lora_A" not in name else {}
    parts = next((parts for part, parts in fused.items() if part in name), 1)
    return [part for matrix in matrices for part in matrix.chunk(parts)]


class Float64:
    """The weights of one rank's parameters, and plain steps of them."""

    def __init__(self, parameters, split=apart):
        self.split = split
        self.weights = {name: masters.read(one, masters.WEIGHT).double() for name, one in parameters.items()}
        self.first = {name: torch.zeros_like(one) for name, one in self.weights.items()}
        self.second = {name: torch.zeros_like(one) for name, one in self.weights.items()}
        self.moved = {}

    def step(self, grads, norm, number):
        shrink = min(1.0, CLIP / (norm + 1e-6))
        for name, weight in self.weights.items():
            grad = grads[name].double() * shrink
            muon = weight.dim() > 1 and not any(part in name for part in ADAMW)
            (self._muon if muon else self._adamw)(name, weight, grad, number)

    def _adamw(self, name, weight, grad, number):
        first, second = self.first[name], self.second[name]
        first.mul_(BETAS[0]).add_(grad, alpha=1 - BETAS[0])
        second.mul_(BETAS[1]).add_(grad * grad, alpha=1 - BETAS[1])
        if weight.dim() > 1:
            weight.mul_(1 - LR * DECAY)
        size = (second / (1 - BETAS[1] ** number)).sqrt() + 1e-8
        weight.sub_(LR * (first / (1 - BETAS[0] ** number)) / size)

    def _muon(self, name, weight, grad, number):
        momentum = self.first[name]
        momentum.mul_(MOMENTUM).add_(grad, alpha=1 - MOMENTUM)
        ahead = (1 - MOMENTUM) * grad + MOMENTUM * momentum
        for matrix, of_grad, of_ahead in zip(*(self.split(name, one) for one in (weight, grad, ahead)), strict=True):
            if of_grad.any():
                update = newton_schulz(of_ahead) * 0.2 * max(of_ahead.shape) ** 0.5
                matrix.mul_(1 - MUON_LR * DECAY).sub_(MUON_LR * update)


def run_config(stage, ep_size, world, zero=None, precision="fp32", **more):
    return RunConfig(
        model={"preset": "tiny-vl-moe"},
        data={"train": "digits"},
        moe={"ep_size": ep_size, "balance": [{"kind": "loss_free", "update_rate": 1e-3}]},
        train={
            **{"optimizer": "muon", "lr": LR, "muon_lr": MUON_LR, "muon_momentum": MOMENTUM, "weight_decay": DECAY},
            **{"betas": BETAS, "max_grad_norm": CLIP, "schedule": "constant", "steps": STEPS, "precision": precision},
            "global_batch_size": world,
        },
        deepspeed={
            "zero_optimization": {"stage": stage, **(zero or {})},
            **({"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" else {}),
        },
        **more,
    )


def batch(rank, step):
    processor = tiny_processor()
    sample = digits_samples("train")[7 * rank + step]
    return collate([encode(sample, processor, 256, 2**20)], processor).with_labels


def compare(config, topology, split=apart):
    """Of every step, the largest error of a weight by its optimizer, in units of what the step moves; idle experts."""
    model = load_model(config.model, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    set_trainable(model, config)
    prepare_model(model, config, topology, set_trainable=lambda *_: None)
    ds_config = resolve_deepspeed(config, topology.world_size, on_cpu=True)
    engine = build_engine(model, config, ds_config, total_steps=STEPS)
    engine.train()
    parameters = {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
    plain, worst = Float64(parameters, split), torch.zeros(4, dtype=torch.float64)
    for step in range(STEPS):
        for layer in moe_layers(engine.module) if step else ():
            layer.gate.balancing.bias_E[IDLE] = -1e3
        engine.backward(engine(**batch(topology.rank, step)).loss)
        grads = {name: safe_get_full_grad(one).clone() for name, one in parameters.items()}
        before = {name: masters.read(one, masters.WEIGHT).clone() for name, one in parameters.items()}
        engine.step()
        plain.step(grads, float(engine.get_global_grad_norm()), step + 1)
        for name, one in parameters.items():
            now, muon = masters.read(one, masters.WEIGHT), masters.moments(one) == ("exp_avg",)
            error = (now - plain.weights[name]).abs().max() / (MUON_LR if muon else LR)
            worst[int(muon)] = torch.maximum(worst[int(muon)], error)
            idle = IDLE - topology.ep_rank * now.shape[0] if now.dim() else -1
            if expert_state(name) and step and 0 <= idle < now.shape[0]:
                worst[2] = torch.maximum(worst[2], (now - before[name])[idle].abs().max())
    masters.link_moments(engine)
    for name, one in parameters.items():
        worst[3] = torch.maximum(worst[3], (masters.read(one, "exp_avg") - plain.first[name]).abs().max())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    engine.destroy()
    return dict(zip(("adamw", "muon", "idle", "momentum"), worst.tolist(), strict=True))


def gate_and_up_together(name, tensor):
    """The matrices of a parameter, but for those of experts, of which gate and up are taken for one."""
    return list(tensor) if tensor.dim() == 3 else apart(name, tensor)


def main():
    for name, (stage, ep_size, more) in json.loads(sys.argv[1]).items():
        topology = start_distributed(ep_size)
        bucket = more.pop("bucket", flat_matrices.BUCKET)
        config = run_config(stage, ep_size, topology.world_size, **more)
        with patch.object(flat_matrices, "BUCKET", bucket):
            report(**{name: compare(config, topology)})
        if name == sys.argv[2]:  # the negative control: gate and up as one matrix
            report(stacked=compare(config, topology, gate_and_up_together))
    leave()


if __name__ == "__main__":
    main()
