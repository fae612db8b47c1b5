"""Sections with engines: two ranks against transformers, training steps of a cut-down model, a whole run."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.deepspeed import precision, resolve_deepspeed, zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.digits import digits_samples
from ds_moe.data.encode import Encoded, collate, encode
from ds_moe.distributed import Topology
from ds_moe.doctor.plans import read_model
from ds_moe.engine.build import build_engine
from ds_moe.engine.prepare import prepare_model
from ds_moe.engine.start import start_distributed
from ds_moe.launcher.command import free_port
from ds_moe.memory.predict import GIB, predict
from ds_moe.models.convert import moe_layers
from ds_moe.models.families import expert_state, family_of
from ds_moe.models.head import at_labels
from ds_moe.models.load import build_outline
from ds_moe.models.presets import build_preset, preset_config
from ds_moe.models.processor import Qwen3VLProcessor, special_token_ids, tiny_processor
from ds_moe.models.tower import lighten_tower, outline_tower
from ds_moe.tasks.task import Task, TrainingParts
from ds_moe.training.step import optimizer_step
from tools.gpu_check.facts import Check

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 4  # of the cut-down model, 3 billion parameters
TWO_RANKS = ((1, False, 1), (2, True, 2), (3, False, 2), (3, True, 1))  # ZeRO stage, checkpointing, chunks
GENERATED = 8  # tokens
SHORT = """moe.ep_size=1 train.warmup_steps=1 data.num_workers=2 data.eval=null train.eval_every=null
    train.eval_batch_size=null checkpoint.every=4 monitor.log_every=4""".split()


def two(check: Check) -> None:
    """Two ranks, EP 2, on one device: loss and every gradient against transformers.

    NCCL refuses two ranks a GPU; gloo takes its tensors, and copies them through the host.
    """
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tools.gpu_check.check", "--inside", "rank_of_two"]
    command += [] if check.full else ["--toy"]
    ranks = []
    for rank in ("0", "1"):
        place = environment | {"RANK": rank, "LOCAL_RANK": "0"}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=place, stdout=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate()[0] for rank in ranks]  # where they hang, the section's limit ends them
    finally:
        for rank in ranks:
            rank.kill()
    print(said[0], end="", flush=True)
    check.say("two ranks have ended", not any(rank.returncode for rank in ranks), status=[r.returncode for r in ranks])


def rank_of_two(check: Check) -> None:
    """One of the processes of `two`."""
    rank = int(os.environ["RANK"])
    if check.gpu:
        torch.cuda.set_device(0)
        dist.init_process_group("gloo")  # DeepSpeed takes the group that it finds
    deepspeed.utils.logger.setLevel("ERROR")
    batches = [_digits(3, 7 * number, check.device) for number in (0, 1)]
    labelled = sum(int((batch.labels[:, 1:] != NO_LOSS).sum()) for batch in batches)
    plain, expected = build_preset("tiny-vl-moe").train().to(check.device), 0.0
    for batch in batches:
        loss = plain(**batch.with_labels, num_items_in_batch=labelled).loss
        loss.backward()
        expected += loss.item()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for stage, checkpointing, chunks in TWO_RANKS:
        config = RunConfig(
            model={"preset": "tiny-vl-moe"},
            data={"train": "digits"},
            moe={"ep_size": 2, "dispatch": {"chunks": chunks}},
            train={"gradient_checkpointing": checkpointing, "steps": 1, "precision": "fp32", "global_batch_size": 2},
            deepspeed=f"zero{stage}",
        )
        topology = start_distributed(2)
        model = build_preset("tiny-vl-moe")
        prepare_model(model, config, topology)
        engine = build_engine(model, config, resolve_deepspeed(config, 2, not check.gpu, 64), 1)
        engine.train()
        loss = at_labels(engine, batches[rank].inputs, batches[rank].labels, num_items=labelled / 2).loss
        engine.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        worst = max(
            _off(safe_get_full_grad(parameter), gradients[name], name, topology)
            for name, parameter in engine.module.named_parameters()
        )
        engine.destroy()
        apart = abs(total.item() / 2 - expected)
        facts = {"stage": stage, "checkpointing": checkpointing, "chunks": chunks, "loss": apart, "gradients": worst}
        check.say("two ranks against transformers", max(apart, worst) < 1e-4, **facts)
    dist.barrier()
    dist.destroy_process_group()


def _digits(count: int, first: int, device: torch.device) -> Batch:
    """Scans of digits, in padded rows."""
    processor = tiny_processor()
    samples = digits_samples("train")[first : first + count]
    return collate([encode(sample, processor, 256, 2**20) for sample in samples], processor).to(device)


def _off(ours: Tensor, theirs: Tensor, name: str, topology: Topology) -> float:
    """Of a gradient, relative to its tensor's largest entry; of experts, this rank's."""
    scale = theirs.abs().max().clamp_min(1e-12)
    own = theirs.chunk(topology.ep_size)[topology.ep_rank] if expert_state(name) else theirs
    return ((ours.to(own.device) - own).abs().max() / scale).item()


def train_zero2(check: Check) -> None:
    train(check, 2)


def train_zero3(check: Check) -> None:
    train(check, 3)


def train(check: Check, stage: int) -> None:
    """Optimizer steps of a Qwen3-VL-30B-A3B of 4 layers, with images: their time and how much of it the GPU works,
    memory beside what is predicted, host waits, alignment of experts, time of a generated token."""
    parts, memory = _parts(check, stage)
    engine, task, progress = parts.engine, Task(parts), Progress(1000)
    facts = {"stage": stage, "optimizer": type(engine.optimizer.optimizer).__name__}
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    sums_in = engine.optimizer.gradient_accumulation_dtype
    check.say("engine", facts["optimizer"] == "AdamW", **facts, sums_in=sums_in, allocator=allocator)
    experts = [one for layer in moe_layers(engine.module) for one in layer.experts.parameters()]
    addresses = [getattr(one, "ds_tensor", one).data_ptr() % 16 for one in experts]
    remainders = sorted(set(addresses))
    check.say("experts begin at multiples of 16 bytes", remainders == [0], stage=stage, remainders=remainders)
    batch = None
    for tokens in (4096, 8192, 16_384) if check.full else (64, 128):
        batch = _batch(parts, tokens).to(check.device)

        def step(batch: Batch = batch) -> float:
            return optimizer_step(parts, task, [batch], progress).loss

        for _ in range(2):
            step()
        if check.gpu:
            torch.cuda.reset_peak_memory_stats()
        wall, host, loss = [], [], 0.0
        for _ in range(4):
            check.wait()
            began, used = time.perf_counter(), time.process_time()
            loss = step()
            check.wait()
            wall.append((time.perf_counter() - began) * 1e3)
            host.append((time.process_time() - used) * 1e3)
        ms = statistics.median(wall)
        facts = {"stage": stage, "tokens": tokens, "ms": round(ms, 1), "tokens_a_second": round(tokens / ms * 1e3)}
        facts |= {"process_ms": round(statistics.median(host), 1), "loss": round(loss, 4)}
        if check.gpu:
            stats = torch.cuda.memory_stats()
            facts["peak_GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
            facts |= {
                "reserved_GiB": round(torch.cuda.memory_reserved() / GIB, 2),
                "retries": stats["num_alloc_retries"],
            }
            free, whole = torch.cuda.mem_get_info()  # neither free nor torch's are context, libraries and NCCL
            facts["outside_torch_GiB"] = round((whole - free) / GIB - facts["reserved_GiB"], 2)
            kernels = check.kernels(step, 8)
            idle = round(1 - kernels["busy_ms"] / ms, 3)
            facts |= {"idle_share": idle, "busy_ms": kernels["busy_ms"], "launches": kernels["launches"]}
            facts["largest"] = kernels["largest"]
        facts["predicted_GiB"] = {name: round(size / GIB, 2) for name, size in memory(tokens).items()}
        check.say("step", loss == loss, **facts)
        with check.host_waits() as waits:
            step()
        check.say("host waits of a step", tokens=tokens, all=sum(waits.values()), lines=dict(waits.most_common(12)))
    _generated(check, parts, stage)
    engine.destroy()


def _parts(check: Check, stage: int):
    """Everything that an optimizer step works with, and a function from tokens to the predicted memory by purpose."""
    os.environ["MASTER_PORT"] = str(free_port())
    topology = start_distributed(1)
    deepspeed.utils.logger.setLevel("ERROR")
    model_config, processor = _model(check.full)
    settings = {"gradient_checkpointing": True, "steps": 1000, "global_batch_size": 1, "lr": 1e-6}

    def run_of(tokens: int) -> RunConfig:
        return RunConfig(
            model={"preset": "tiny-vl-moe"},  # a run must name a model; the engine is given another
            data={"train": "digits", "packing": True, "max_length": tokens},
            moe={"balance": [{"kind": "aux"}]},
            train=settings | {"precision": "bf16" if check.gpu else "fp32", "tokens_per_micro_batch": tokens},
            deepspeed=f"zero{stage}",
        )

    config = run_of(4096)
    torch.manual_seed(0)
    with check.device:
        model = family_of(model_config).model_class(model_config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            torch.bfloat16 if precision(config, not check.gpu) == "bf16" else torch.float32
        )
    lighten_tower(model)
    context = prepare_model(model, config, topology)
    resolved = resolve_deepspeed(config, 1, not check.gpu, model_config.text_config.hidden_size)
    outline = build_outline(model_config)
    engine = build_engine(model, config, resolved, 1000)
    engine.train()

    def memory(tokens: int) -> dict[str, int]:
        return predict(outline, run_of(tokens), zero_plan(resolved), 1, not check.gpu).device

    stream = None  # batches are made here
    return TrainingParts(config, topology, engine, context, processor, stream, None, lambda line: None), memory


def _model(full: bool) -> tuple[PretrainedConfig, Qwen3VLProcessor]:
    processor = tiny_processor("vl", patch_size=16 if full else 4)
    config = read_model("qwen3-vl-30b-a3b") if full else preset_config("tiny-vl-moe")
    if full:
        config.text_config.num_hidden_layers = LAYERS
        config.vision_config.depth, config.vision_config.deepstack_visual_indexes = 4, [1]
        ids = special_token_ids(processor)
        config.text_config.pad_token_id = ids.pop("pad_token_id")
        for name, value in ids.items():
            setattr(config, name, value)
    processor.tower = outline_tower(config)
    return config, processor


def _batch(parts: TrainingParts, tokens: int) -> Batch:
    """One packed row, half of whose tokens are of images, in samples of a quarter of the row."""
    config, processor = parts.engine.module.config, parts.processor
    vision, patch = config.vision_config, processor.image_processor
    generator, length = torch.Generator().manual_seed(tokens), tokens // 4
    side = 2 * int((length // 2) ** 0.5)  # patches; four of them are a token
    samples = []
    for _ in range(4):
        ids = torch.randint(10, 300, (length,), generator=generator)
        ids[ids == processor.image_token_id] = 11
        ids[2 : 2 + (side // 2) ** 2] = processor.image_token_id
        labels = torch.where(ids == processor.image_token_id, NO_LOSS, ids)
        width = 3 * vision.temporal_patch_size * patch.patch_size**2
        pixels = torch.randn(side * side, width, generator=generator)
        samples.append(Encoded(ids, labels, 1, pixels, torch.tensor([[1, side, side]])))
    return collate(samples, processor, packed=True)


def _generated(check: Check, parts: TrainingParts, stage: int) -> None:
    model: PreTrainedModel = parts.engine.module
    parts.engine.eval()
    ids = torch.randint(10, 300, (1, 32), device=check.device)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}
    with torch.no_grad():
        ms = check.ms(lambda: model.generate(**prompt, **settings), 2, 1)
    check.say("generated token", stage=stage, ms=round(ms / GENERATED, 2))


def run(check: Check) -> None:
    """`ds_moe.train` itself: two loading processes, a checkpoint, and a second start that goes on from it."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        words = [f"train.output_dir={folder}", f"train.precision={'bf16' if check.gpu else 'fp32'}", *SHORT]
        for steps in (4, 8):
            command = [sys.executable, "-m", "ds_moe.train", str(ROOT / "ds_configs/runs/demo.yaml"), *words]
            environment = os.environ | {"MASTER_PORT": str(free_port())}
            began = time.perf_counter()
            done = subprocess.run(
                [*command, f"train.steps={steps}"], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            seconds, resumed = round(time.perf_counter() - began, 1), "resumed from" in done.stdout
            ok = done.returncode == 0 and resumed == (steps == 8)
            said = (done.stdout + done.stderr)[-1500:] if not ok else ""
            check.say("run", ok, steps=steps, seconds=seconds, status=done.returncode, resumed=resumed, said=said)
