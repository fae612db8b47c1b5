"""What a run is about to do, on one screen: topology, parameters, memory, batch arithmetic."""

from ds_moe.checkpoint.room import checkpoint_bytes, outlook
from ds_moe.config.sources import source_names
from ds_moe.data.bad_records import BAD_RECORDS
from ds_moe.data.packing import PackedRows
from ds_moe.data.streaming import StreamedTrain
from ds_moe.models.freeze import parameter_table
from ds_moe.models.lora import coverage
from ds_moe.models.matrices import by_muon
from ds_moe.moe.backends import choose_backend
from ds_moe.training.run import SKIPPED_STEPS, Run


def run_summary(run: Run) -> str:
    """Plain text, under 80 columns wide where paths allow."""
    config, parts = run.config, run.parts
    topology, engine, layers = parts.topology, parts.engine, parts.layers
    name = config.model.preset or config.model.path
    lines = [f"model     {name} ({engine.module.config.model_type}), {next(engine.module.parameters()).dtype}"]
    replicas = topology.world_size // topology.ep_size
    lines.append(
        f"topology  {topology.world_size} ranks on {topology.device.type}, ZeRO-{engine.zero_optimization_stage()}, "
        f"ep_size {topology.ep_size} ({replicas} expert {'replica' if replicas == 1 else 'replicas'})"
    )
    if topology.sequence_parallel > 1:
        shared = f"{topology.sequence_parallel} ranks share each row, {topology.data_ranks} rows at a time"
        lines.append(f"sequence  {shared}; held-out rows are whole on every rank")
    if layers:
        lines.append(
            f"experts   {len(layers)} MoE layers x {layers[0].num_experts} experts, top-{layers[0].gate.top_k}, "
            f"{layers[0].num_experts // topology.ep_size} a rank, backend {config.moe.experts.backend}, "
            f"balance {[balance.kind for balance in config.moe.balance] or 'none'}"
        )
        if config.moe.experts.backend == "auto":
            backend, reason = choose_backend(topology.device.type, layers[0].experts.down_proj.dtype)
            lines.append(f"kernels   {backend}: {reason}")
    notes = [*parts.stream.notes, *(parts.eval_set.notes if parts.eval_set is not None else [])]
    lines += [f"data      {note}" for note in notes]
    lines += _batch(run)
    if parts.stream.rows is not None and (mixture := parts.stream.rows.order.mixture) is not None:
        lines.append(f"sources   records an epoch: {mixture.described(source_names(config.data.train))}")
    total_steps = run.progress.total_steps
    if isinstance(parts.stream, StreamedTrain):
        lines.append(f"data      streamed: {parts.stream.outlook()}")
    an_epoch = parts.stream.steps_per_epoch
    lines.append(
        f"steps     {total_steps}{f', {total_steps / an_epoch:.1f} epochs' if an_epoch else ''}; "
        f"lr {config.train.lr:g}, {config.train.schedule}, {config.train.warmup_steps} warm-up"
    )
    device, host = (sum(part.values()) / 2**30 for part in (run.memory.device, run.memory.host))
    peak = "at the peak" if run.memory.whole else "and activations, which are not predicted of this family"
    lines.append(f"memory    about {device:.1f} GiB a rank {peak}{f', {host:.1f} GiB on the host' if host else ''}")
    matrices = by_muon(engine.module, config)
    if matrices:
        rate = config.train.muon_lr or config.train.lr
        lines.append(f"muon      {len(matrices)} tensors of hidden matrices, lr {rate:g}; AdamW trains the rest")
    size = checkpoint_bytes(engine.module, topology.ep_size, run.base is None, by_muon=matrices) + run.carried.nbytes
    lines.append(f"saves     {outlook(run.folder / 'checkpoints', size, config.checkpoint.keep)}")
    lines += run.kind.summary(engine.module, config)
    lines += run.kind.records_summary(parts.stream.remembered)
    lines.append("parameters on this rank's EP share (trainable / all):")
    for part, trained, total in parameter_table(engine.module):
        lines.append(f"  {part:<11}{trained:>16,} / {total:,}")
    if config.lora is not None:
        lines.append(f"LoRA of rank {config.lora.rank}, over all ranks:")
        lines += [f"  {line}" for line in coverage(engine.module, topology.ep_size)]
    return "\n".join(lines)


def _batch(run: Run) -> list[str]:
    train, ranks, rows = run.config.train, run.parts.topology.world_size, run.parts.stream.rows
    if isinstance(rows, PackedRows):
        of = f"{train.global_batch_size} samples a step, packed into rows of {rows.capacity:,} tokens on {ranks} ranks"
        return [f"batch     {of}", f"packing   {rows.outlook()}"]
    if run.config.data.packing:
        return [f"batch     {train.global_batch_size} samples a step, packed on {ranks} ranks"]
    accumulation = train.global_batch_size // (train.micro_batch_size * ranks)
    size = f"{train.micro_batch_size} a rank x {ranks} ranks x {accumulation} micro-batches"
    return [f"batch     {train.global_batch_size} samples a step = {size}"]


def result_rows(run: Run) -> dict[str, str]:
    """What the closing table says: name -> value."""
    figures, task = run.progress.figures, run.progress.figures.task or {}
    rows: dict[str, str] = {}

    def add(name: str, value: object, form: str = "{}") -> None:
        if value is not None:
            rows[name] = form.format(value)

    add("training loss", figures.loss, "{:.4f}")
    add("held-out loss", figures.eval_loss, "{:.4f}")
    for kind, value in (figures.accuracy or {}).items():
        add(f"held-out accuracy, {kind}", value, "{:.3f}")
    add("tokens/s", figures.tokens_per_s, "{:,.0f}")
    add("packing", run.parts.stream.fill)
    if figures.ep_sent_bytes:
        add("sent to other ranks' experts", figures.ep_sent_bytes / 2**20, "{:,.1f} MiB a rank and step")
    add("MaxVio", figures.max_vio, "{:.2f}")
    for name, (figure, form) in run.kind.closing.items():
        add(name, task.get(figure), form)
    rows |= run.task.closing_rows()
    if run.session.skipped:
        add("steps not taken", f"{run.session.skipped} (in {run.folder / SKIPPED_STEPS})")
    bad_records = run.folder / BAD_RECORDS
    if bad_records.exists():  # of all ranks
        add("bad records skipped", f"{len(bad_records.read_text().splitlines())} (in {bad_records})")
    add("checkpoint", figures.checkpoint)
    add("monitoring", f"{run.monitor.overhead():.2%} of step time")
    if run.config.monitor.tensorboard:
        add("curves", f"tensorboard --logdir {run.folder}")
    return rows
