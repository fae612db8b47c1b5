"""Several LoRA adapters in one model, mixed by weights that may differ from sample to sample.

A layer stacks the adapters' matrices: with A (R, in) and B (out, R), R the sum of their ranks, a mixture is

    y = W x + B ((g[owner] * scale) * (A x))        owner_R: whose row it is, scale_R: that adapter's scaling

which takes two products for any number of adapters of any ranks. For the gradient of g it keeps only A x: R numbers a
token, where a stack of the adapters' outputs would keep K * out.

Shapes, besides the legend of ds_moe/moe/decision.py: K adapters, L all layers of the model, R as above.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.checkpoint.files import write_json
from ds_moe.tasks.gate.adapters import CONFIG, KEY, WEIGHTS, Adapter
from ds_moe.tasks.gate.placement import Update, placed, updates
from ds_moe.weights.files import check_empty, write_tensors

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

Values = Callable[[nn.Parameter], Tensor]


@dataclass
class Gates:
    """The weights of the adapters, which all banked layers of one model read.

    They are set before a forward and stay until the next one, because gradient checkpointing reads them again in
    backward.
    """

    weights: Tensor | None = None  # fp32 (B, K), (B, L, K) or (R, S, K), see `per`; may need grad; None: base alone
    per: Literal["example", "layer", "token"] = "example"
    packed: bool = False  # whether `weights` are (S, K) or (S, L, K) instead, those of each token's sample in one row

    def choose(self, weights: Tensor, sequence_S: Tensor | None) -> None:
        """Take a gate's weights. `sequence_S` is the sample of each token of a packed row; None: rows are padded."""
        self.packed = sequence_S is not None
        self.weights = weights if sequence_S is None or self.per == "token" else weights[sequence_S]

    def at(self, layer: int) -> Tensor | None:
        """(R, 1 or S, K) weights for one layer of the model; None: the base without adapters."""
        if self.weights is None or self.per == "token":
            return self.weights
        weights = self.weights if self.per == "example" else self.weights[:, layer]
        return weights.unsqueeze(0 if self.packed else 1)


class BankedLinear(nn.Linear):
    """Takes over the parameters of an nn.Linear and adds the stacked updates of all adapters that target it.

    The updates have the precision of the weight. An adapter's lora_dropout is not applied.
    """

    lora_A: nn.Parameter  # (R, in)
    lora_B: nn.Parameter  # (out, R)
    owner_R: Tensor  # int64 adapter of each row of lora_A; an adapter that does not update this layer owns none
    scale_R: Tensor  # fp32

    def __init__(self, linear: nn.Linear, parts: dict[int, Update], layer_index: int, gates: Gates) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.layer_index, self.gates = layer_index, gates
        device, dtype = linear.weight.device, linear.weight.dtype
        lora_A = torch.cat([part.A for part in parts.values()]).to(device, dtype)
        lora_B = torch.cat([part.B for part in parts.values()], dim=1).to(device, dtype)
        self.lora_A = nn.Parameter(lora_A, requires_grad=False)
        self.lora_B = nn.Parameter(lora_B, requires_grad=False)
        if device.type == "meta":  # the adapters of a model without storage can still be written
            device = torch.device("cpu")
        ranks = torch.tensor([len(part.A) for part in parts.values()])
        scales = torch.tensor([part.scale for part in parts.values()])
        self.register_buffer("owner_R", torch.tensor([*parts]).repeat_interleave(ranks).to(device), persistent=False)
        self.register_buffer("scale_R", scales.repeat_interleave(ranks).to(device), persistent=False)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, in) or (B * S, in) to the same with `out`, in the dtype of x."""
        g_BSK = self.gates.at(self.layer_index)
        if g_BSK is None:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        # By the gates' rows, because an MoE block calls its shared expert with all tokens in one dimension.
        h_BSR = F.linear(rows, self.lora_A).view(len(g_BSK), -1, len(self.owner_R))
        g_BSR = g_BSK.float().index_select(-1, self.owner_R) * self.scale_R
        h_BSR = h_BSR * g_BSR.to(h_BSR.dtype)
        # Adding in place makes no second (B, S, out), and is safe because a product does not keep its result for
        # backward. The rows have two dimensions: in three, the product would be a view, and autograd copies the
        # gradient of a view that is changed in place.
        y = super().forward(rows)
        y.addmm_(h_BSR.flatten(0, 1), self.lora_B.to(y.dtype).T)
        return y.view(*x.shape[:-1], self.out_features)

    def terms(self, x_ND: Tensor, keep_RS: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the forward adds up of N chosen positions of a batch: their logits, where this is the output layer."""
        g_BSK = self.gates.at(self.layer_index)
        if g_BSK is None:
            return [(x_ND, self.weight)]
        g_NK = g_BSK.float().expand(*keep_RS.shape, -1)[keep_RS]
        g_NR = g_NK.index_select(-1, self.owner_R) * self.scale_R
        h_NR = F.linear(x_ND, self.lora_A)
        return [(x_ND, self.weight), (h_NR * g_NR.to(h_NR.dtype), self.lora_B)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BankedLinear:
        scale_R = self.scale_R
        super()._apply(fn, recurse)
        self.scale_R = scale_R.to(self.scale_R.device)  # undo the rounding of a model's .bfloat16()
        return self


@dataclass
class Bank:
    """The adapters of a model, whose parameters are those of the model's BankedLinear modules.

    Methods that write adapters take `values`, which turns a parameter into its full value: an engine may have sharded
    the parameter, or may hold it in fp32.
    """

    adapters: list[Adapter]  # as they were read
    layers: dict[str, BankedLinear]  # by module path
    gates: Gates

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield layer.lora_A
            yield layer.lora_B

    def train_adapters(self, flag: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(flag)

    def export(self, out: Path, values: Values = Tensor.detach) -> None:
        """Write each adapter as a PEFT folder out/<name>. An untrained tensor keeps the bits of its original file.

        Raises:
            UserError: such a folder exists and is not empty.
        """
        folders = [out / name for name in self.names]
        for folder in folders:
            check_empty(folder)
        tensors: list[dict[str, Tensor]] = [{} for _ in folders]
        for module, (A_RI, B_OR) in self._stacks(values):
            layer = self.layers[module]
            for index, adapter in enumerate(self.adapters):
                mine_R = layer.owner_R.cpu() == index
                if mine_R.any():
                    mine = zip("AB", (A_RI[mine_R], B_OR[:, mine_R]), adapter.pair(module), strict=True)
                    for side, value, original in mine:
                        # Compare in the model's dtype: a tensor that was only rounded to bf16 was not trained.
                        same = torch.equal(value.to(layer.lora_A.dtype), original.to(layer.lora_A.dtype))
                        tensors[index][adapter.key(module, side)] = original if same else value.contiguous()
        for folder, adapter, written in zip(folders, self.adapters, tensors, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            if adapter.config.modules_to_save:  # copies of the base, which `written` leaves out
                config = json.loads((adapter.path / CONFIG).read_text(encoding="utf-8"))
                write_json(folder / CONFIG, config | {"modules_to_save": None})
            else:
                shutil.copyfile(adapter.path / CONFIG, folder / CONFIG)
            write_tensors(folder / WEIGHTS, written)

    def merged(self, weights_K: Tensor, out: Path, values: Values = Tensor.detach) -> None:
        """Write one PEFT folder that adds what the adapters add at constant weights (K,): fp32, of rank R, scaling 1.

        Raises:
            UserError: the folder exists and is not empty.
        """
        check_empty(out)
        out.mkdir(parents=True, exist_ok=True)
        tensors, ranks = {}, {}
        for module, (A_RI, B_OR) in self._stacks(values):
            layer = self.layers[module]
            fold_R = weights_K.detach().float().cpu()[layer.owner_R.cpu()] * layer.scale_R.cpu()
            tensors[KEY.format(module=module, side="A")] = A_RI.float()
            tensors[KEY.format(module=module, side="B")] = B_OR.float() * fold_R
            ranks[module] = len(fold_R)
        r, first = max(ranks.values()), self.adapters[0].config
        other = {module: rank for module, rank in ranks.items() if rank != r}
        config = peft.LoraConfig(r=r, lora_alpha=r, rank_pattern=other, alpha_pattern=other, target_modules=list(ranks))
        config.task_type, config.inference_mode = first.task_type, True
        config.base_model_name_or_path, config.revision = first.base_model_name_or_path, first.revision
        config.save_pretrained(str(out))
        write_tensors(out / WEIGHTS, tensors)

    def _stacks(self, values: Values) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Each layer's A (R, in) and B (out, R), on the CPU, in the shapes that sharded parameters have lost."""
        for module, layer in self.layers.items():
            R = len(layer.owner_R)
            A_RI = values(layer.lora_A).cpu().reshape(R, layer.in_features)
            B_OR = values(layer.lora_B).cpu().reshape(layer.out_features, R)
            yield module, (A_RI, B_OR)


def install(model: nn.Module, adapters: list[Adapter]) -> Bank:
    """Replace, in place, every nn.Linear that an adapter targets. The adapters are frozen and have no weights yet.

    Raises:
        UserError: an adapter that does not fit the model, or updates its vision tower. The model then is unchanged.
    """
    plans = [updates(adapter, model) for adapter in adapters]
    adapters = [replace(placed(adapter, model), others={}) for adapter in adapters]
    bank = Bank(adapters, {}, Gates())
    for name, linear in list(model.named_modules()):
        parts = {index: plan[name] for index, plan in enumerate(plans) if name in plan}
        if parts:
            number = _LAYER.search(name)
            bank.layers[name] = BankedLinear(linear, parts, int(number[1]) if number else 0, bank.gates)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, bank.layers[name])
    return bank
