"""What a run is about to do, on one screen: topology, parameters, memory, batch arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ds_moe.data.bad_records import BAD_RECORDS
from ds_moe.models.convert import moe_layers
from ds_moe.models.freeze import parameter_table
from ds_moe.models.lora import coverage
from ds_moe.moe.backends import choose
from ds_moe.training.run import SKIPPED_STEPS

if TYPE_CHECKING:
    from ds_moe.training.run import Run


def run_summary(run: Run) -> str:
    """Plain text, under 80 columns wide where paths allow."""
    config, topology, engine = run.config, run.topology, run.engine
    layers = moe_layers(engine.module)
    name = config.model.preset or config.model.path
    lines = [f"model     {name} ({engine.module.config.model_type}), {next(engine.module.parameters()).dtype}"]
    replicas = topology.world_size // topology.ep_size
    lines.append(
        f"topology  {topology.world_size} ranks on {topology.device.type}, ZeRO-{engine.zero_optimization_stage()}, "
        f"ep_size {topology.ep_size} ({replicas} expert {'replica' if replicas == 1 else 'replicas'})"
    )
    if layers:
        lines.append(
            f"experts   {len(layers)} MoE layers x {layers[0].num_experts} experts, top-{layers[0].gate.top_k}, "
            f"{layers[0].num_experts // topology.ep_size} a rank, backend {config.moe.experts.backend}, "
            f"balance {[balance.kind for balance in config.moe.balance] or 'none'}"
        )
        if config.moe.experts.backend == "auto":
            lines.append("kernels   {}: {}".format(*choose(topology.device.type, layers[0].experts.down_proj.dtype)))
    lines.append(
        f"batch     {config.train.global_batch_size} samples a step = {config.train.micro_batch_size} a rank x "
        f"{topology.world_size} ranks x {run.stream.accumulation} micro-batches"
    )
    lines.append(
        f"steps     {run.total_steps}, {run.total_steps / run.stream.steps_per_epoch:.1f} epochs; "
        f"lr {config.train.lr:g}, {config.train.schedule}, {config.train.warmup_steps} warm-up"
    )
    device, host = (sum(part.values()) / 2**30 for part in (run.memory.device, run.memory.host))
    lines.append(
        f"memory    about {device:.1f} GiB a rank at the peak{f', {host:.1f} GiB on the host' if host else ''}"
    )
    if config.task == "gate":
        bank, gate = engine.module.adapter_bank, config.gate
        lines.append(
            f"gate      stage {gate.stage} over {', '.join(bank.names)}: {len(bank.layers)} layers with adapters, "
            f"reads {gate.modalities} ({gate.text}, {gate.vision}), {gate.select} per {gate.per}"
        )
    lines.append("parameters on this rank's EP share (trainable / all):")
    for part, trained, total in parameter_table(engine.module):
        lines.append(f"  {part:<11}{trained:>16,} / {total:,}")
    if config.lora is not None:
        lines.append(f"LoRA of rank {config.lora.rank}, over all ranks:")
        lines += [f"  {line}" for line in coverage(engine.module, topology.ep_size)]
    return "\n".join(lines)


def result_rows(run: Run) -> dict[str, str]:
    """What the closing table says: name -> value."""
    result = run.result
    rows: dict[str, str] = {}
    _row(rows, "training loss", result.get("loss"), "{:.4f}".format)
    _row(rows, "held-out loss", result.get("eval_loss"), "{:.4f}".format)
    for kind, value in result.get("accuracy", {}).items():
        _row(rows, f"held-out accuracy, {kind}", value, "{:.3f}".format)
    _row(rows, "tokens/s", result.get("tokens_per_s"), "{:,.0f}".format)
    _row(
        rows,
        "sent to other ranks' experts",
        result.get("ep_sent_bytes") or None,
        lambda sent: f"{sent / 2**20:,.1f} MiB a rank and step",
    )
    _row(rows, "MaxVio", result.get("max_vio"), "{:.2f}".format)
    of_task = result.get(run.config.task, {})
    _row(rows, "reward", of_task.get("reward"), "{:.3f}".format)
    _row(rows, "mismatch k3, engine to trainer", of_task.get("mismatch_k3"), "{:.2e}".format)
    _row(rows, "steps not taken", run.skipped or None, lambda count: f"{count} (in {run.folder / SKIPPED_STEPS})")
    bad_records = run.folder / BAD_RECORDS
    if bad_records.exists():  # of all ranks
        rows["bad records skipped"] = f"{len(bad_records.read_text().splitlines())} (in {bad_records})"
    _row(rows, "checkpoint", result.get("checkpoint"), str)
    rows["monitoring"] = f"{run.monitor.overhead():.2%} of step time"
    if run.config.monitor.tensorboard:
        rows["curves"] = f"tensorboard --logdir {run.folder}"
    return rows


def _row(rows: dict[str, str], name: str, value: Any, show: Callable[[Any], str]) -> None:
    if value is not None:
        rows[name] = show(value)
