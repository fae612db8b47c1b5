"""What does routing replay leave of the mismatch between an inference engine and the trainer?

    python -m tools.bench.replay.bench --seeds 0 --router-scales 2  a first look (all: 3 minutes on 1 core)
    python -m tools.bench.replay.bench --show FILE --plot FILE      print and draw an earlier result

The engine is plain transformers in bf16 with another expert kernel and a KV cache; the trainer has the same fp32
weights under our layer, in fp32 and in bf16 (moe of ds_configs/runs/replay_bench.yaml). With d = log p of the trainer -
log p of the engine at a completion token, k3 = exp(d) - d - 1 estimates the KL divergence of two policies that should
be one. Weights are random, of variance 1 / inputs; routers' times the square of the router scale, which decides how
much of a token the last of its experts still carries, and so what a flipped router costs.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ds_moe.config.moe import MoEConfig
from ds_moe.config.run_file import load_run
from ds_moe.data.batch import NO_LOSS
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, collate, collate_prompts, encode
from ds_moe.data.processor import Processor
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import family_of
from ds_moe.models.head import at_labels
from ds_moe.models.presets import preset_config
from ds_moe.models.processor import SPECIAL_TOKENS, tiny_processor
from ds_moe.moe.decision import RoutingDecision
from ds_moe.replay import RoutingRecorder, RoutingShape, RoutingTrace, align, joined
from ds_moe.replay.ratios import kl_estimate
from tools.bench.launched import ROOT
from tools.bench.replay.plot import COMPLETION, LIVE, REPLAY, SHIFTED, claims, print_result, summarize, write_figure
from tools.results import command_line, write_json

RUN = ROOT / "ds_configs/runs/replay_bench.yaml"
MODELS = {"Qwen3-VL-MoE": ("tiny-vl-moe", "vl"), "Qwen3-MoE": ("tiny-moe", "text")}  # preset, processor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the trainer
TEXT = {  # the presets made wider, in Qwen3-30B-A3B's proportion of width to expert width
    "hidden_size": 128,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LOGIT_STD = 2.5  # of the vocabulary's logits: neither flat nor certain


@dataclass(frozen=True)
class Rollout:
    """One completion of the engine: all T ids (and the images), its experts, log-probs of the N completion tokens."""

    sequence: Encoded
    trace: RoutingTrace
    logprob_N: Tensor


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    result = json.loads(options.show.read_text()) if options.show else measure(options)
    result["summary"] = summarize(result["runs"])
    result["claims"] = claims(result["summary"])
    print_result(result)
    write_json(result, options.json)
    if options.plot:
        write_figure(result["summary"], options.plot)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json", "--plot", "--show")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of weights and sampling")
    parser.add_argument("--router-scales", type=float, nargs="+", default=[1.0, 2.0, 4.0], metavar="X")
    sizes = {"prompts": 16, "tokens": 64, "layers": 8, "experts": 64, "top-k": 8}  # of a seed, of a completion
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.top_k >= options.experts:
        parser.error(f"--top-k {options.top_k} of {options.experts} --experts leaves a router nothing to choose")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    torch.set_num_threads(1)  # the same order of summation on every machine
    moe = load_run(RUN).moe or MoEConfig()
    runs = []
    for name, (preset, kind) in MODELS.items():
        processor = tiny_processor(kind)
        for scale in options.router_scales:
            for seed in options.seeds:
                model = build(preset, seed, scale, options)
                begins = prompts(kind, processor, seed, options.prompts)
                rollouts = generate(model, processor, begins, options.tokens, seed)
                for dtype in DTYPES:
                    trainer = copy.deepcopy(model).to(DTYPES[dtype])
                    convert(trainer, moe)
                    figures = compare(trainer, processor, rollouts)
                    runs.append({"model": name, "dtype": dtype, "scale": scale, "seed": seed, **figures})
                done = f"{name}, router scale {scale:g}, seed {seed}"
                print(f"{done}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    about = {key: getattr(options, key) for key in ("prompts", "tokens", "layers", "experts", "top_k")}
    return about | {"text": TEXT, "moe": moe.model_dump(), "runs": runs, "seconds": time.monotonic() - began}


def build(preset: str, seed: int, scale: float, options: argparse.Namespace) -> PreTrainedModel:
    """A random fp32 model whose signals keep their size from layer to layer, as a trained one's do."""
    config = preset_config(preset)
    text = config.get_text_config()
    sizes = {"num_hidden_layers": options.layers, "num_experts": options.experts, "num_experts_per_tok": options.top_k}
    for key, value in {**TEXT, **sizes}.items():
        setattr(text, key, value)
    if hasattr(config, "vision_config"):
        config.vision_config.out_hidden_size = text.hidden_size
    torch.manual_seed(seed)
    model = family_of(config).model_class(config).eval()
    set_weights(model, scale)
    return model


def set_weights(model: PreTrainedModel, scale: float) -> None:
    gains = {"gate.weight": scale, "lm_head.weight": LOGIT_STD}
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            experts, embedding = weight.dim() == 3, name.endswith(("embed_tokens.weight", "pos_embed.weight"))
            inputs = 1 if embedding else weight.shape[-1] if experts else weight[0].numel()
            gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
            torch.nn.init.normal_(weight, 0, gain * inputs**-0.5)


def prompts(kind: str, processor: Processor, seed: int, count: int) -> list[Encoded]:
    """Real ones: questions about handwritten digits, or 48 to 80 tokens of Python's standard library."""
    rng = np.random.default_rng(seed)
    if kind == "vl":
        samples = digits_samples("held-out")
        return [encode(samples[i], processor, 256, 2**20) for i in rng.choice(len(samples), count, replace=False)]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = []
    for file in rng.choice(len(files), count, replace=False):
        text = files[file].read_text(encoding="utf-8", errors="replace")[:4000]
        ids = torch.tensor(processor.tokenizer.encode(text)[-rng.integers(48, 81) :])
        found.append(Encoded(ids, ids, prompt=len(ids)))
    return found


@torch.no_grad()
def generate(
    model: PreTrainedModel, processor: Processor, begins: list[Encoded], tokens: int, seed: int
) -> list[Rollout]:
    """The engine: a bf16 copy of the model with transformers' expert loop samples `tokens` tokens of each prompt."""
    engine = copy.deepcopy(model).to(torch.bfloat16)
    engine.set_experts_implementation("eager")
    prompt = collate_prompts(begins, processor).inputs
    control = processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)  # an image token without image is no input
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "suppress_tokens": control}
    returns = {"output_logits": True, "return_dict_in_generate": True}
    how = GenerationConfig(**sampling, **returns, pad_token_id=processor.tokenizer.pad_token_id)
    torch.manual_seed(seed)
    with RoutingRecorder(engine) as recorder:
        made = engine.generate(**prompt, generation_config=how)
    ids_BSLK = joined(recorder.take(), len(begins)).numpy()
    logits_BNV = torch.stack(made.logits, 1).float()
    completion_BN = made.sequences[:, -tokens:]
    logprob_BN = logits_BNV.log_softmax(-1).gather(-1, completion_BN.unsqueeze(-1)).squeeze(-1)
    width = prompt["input_ids"].shape[1]
    rollouts = []
    for row, begin in enumerate(begins):
        ids = torch.cat([begin.input_ids[: begin.prompt], completion_BN[row]])
        trace = RoutingTrace(ids_BSLK[row, width - begin.prompt :], source="engine")  # padding stands on the left
        rollouts.append(Rollout(replace(begin, input_ids=ids, labels=ids), trace, logprob_BN[row]))
    return rollouts


def replays(rollouts: list[Rollout], shape: RoutingShape, length: int) -> dict[str, Any]:
    """What each mode gives the forward as its `routing`: (B, S=length, L, K), None for live."""
    traces: dict[str, Any] = {
        COMPLETION: lambda trace, prompt: RoutingTrace(trace.ids[prompt:], start=prompt),
        REPLAY: lambda trace, prompt: trace,
        SHIFTED: lambda trace, prompt: RoutingTrace(np.roll(trace.ids, 1, axis=0)),
    }
    made: dict[str, Any] = {LIVE: None}
    for mode, change in traces.items():
        changed = [(change(one.trace, one.sequence.prompt), len(one.sequence.input_ids)) for one in rollouts]
        aligned = [align(trace, shape, tokens) for trace, tokens in changed]
        made[mode] = torch.stack([F.pad(one, (0, 0, 0, 0, 0, length - len(one)), value=-1) for one in aligned])
    return made


@torch.no_grad()
def compare(trainer: PreTrainedModel, processor: Processor, rollouts: list[Rollout]) -> dict[str, Any]:
    """Each mode's mismatch of a converted model, and how many of its live routers differ from the engine's."""
    shape = RoutingShape.of(trainer.config)
    inputs = collate([one.sequence for one in rollouts], processor).inputs
    ids_BS = inputs["input_ids"]
    engine_BS, mask_BS = torch.zeros(ids_BS.shape), torch.zeros(ids_BS.shape, dtype=torch.bool)
    for row, one in enumerate(rollouts):
        span = slice(one.sequence.prompt, len(one.sequence.input_ids))
        engine_BS[row, span], mask_BS[row, span] = one.logprob_N, True

    least: list[float] = []  # of K weights: the mean over tokens, by forward and layer
    for layer in moe_layers(trainer):
        layer.gate.register_forward_hook(lambda *seen: least.append(least_weight(seen[-1], shape.top_k)))
    modes, logprobs, routings = {}, {}, replays(rollouts, shape, ids_BS.shape[1])
    with RoutingRecorder(trainer) as recorder:
        for mode, routing in routings.items():
            labels_BS, given = ids_BS.where(mask_BS, NO_LOSS), {**inputs, "routing": routing}
            found_N = at_labels(trainer, given, labels_BS, fp32_logits=True).logits  # as `task: rl` scores
            logprobs[mode] = torch.zeros(ids_BS.shape).masked_scatter(mask_BS, found_N)
            d = (logprobs[mode] - engine_BS)[mask_BS]
            k3 = kl_estimate(engine_BS, logprobs[mode], mask_BS)[mask_BS].mean().item()
            modes[mode] = {"k3": k3, "large": share(d.abs() > math.log(2)), "max": d.abs().max().item()}
    live_BSLK, engine_BSLK = joined(recorder.take()[:1], len(rollouts)), routings[REPLAY]
    differs_BSL = (live_BSLK.sort(-1).values != engine_BSLK.sort(-1).values).any(-1)
    differs_TL = differs_BSL[engine_BSLK[:, :, 0, 0] >= 0]  # neither padding nor the last token
    return {
        "modes": modes,
        "routers": share(differs_TL),
        "routers_by_layer": [share(differs_T) for differs_T in differs_TL.unbind(1)],
        "tokens": share(differs_TL.any(1)),
        "least_weight": statistics.mean(least[: len(shape.moe_layers)]),
        "nats": -logprobs[LIVE][mask_BS].mean().item(),
    }


def least_weight(decision: RoutingDecision, top_k: int) -> float:
    return decision.weight_N.view(-1, top_k).min(1).values.mean().item()


def share(mask: Tensor) -> float:
    return mask.double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
