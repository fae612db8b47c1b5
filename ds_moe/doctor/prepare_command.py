"""What `ds-moe data prepare` does: encode the records of a run once, and say what they are like."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ds_moe.config.rules.engine import engine_of
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import load_run
from ds_moe.config.sections import Sources, sources_named
from ds_moe.data.digits import SPLIT_KEYS, Split
from ds_moe.data.fingerprint import Facts
from ds_moe.data.prepared.folder import Prepared
from ds_moe.data.prepared.make import prepare
from ds_moe.data.prepared.report import read_report
from ds_moe.data.processor import Processor
from ds_moe.data.records import DATA_CACHE, open_records
from ds_moe.data.special_tokens import control_use
from ds_moe.errors import UserError
from ds_moe.models.load import model_config, processor_of
from ds_moe.monitor.plot import finish_axes
from ds_moe.tasks.registry import task_kind

LENGTHS = "lengths.png"
SHOWN = 5  # bad records and special tokens that are given a line of their own
BINS = 60


def prepare_data(run: str, overrides: list[str], pixels: bool | None, workers: int) -> None:
    """Prepare data.train and data.eval of a run file, and print a report of each.

    Raises:
        UserError: the run samples its own records, a data file cannot be read, or the folder cannot be written.
    """
    config = load_run(run, overrides)
    kind, processor = task_kind(config), processor_of(config.model, config.data.video)
    splits: list[tuple[Split, Sources | None]] = [("train", config.data.train), ("held-out", config.data.eval)]
    if engine_of(config) is not None:
        print("data.train: prompts, which rl.engine has answered during the run: not prepared")
        del splits[0]
    elif config.data.streaming:
        print("data.train: streamed, and encoded as it comes: not prepared")
        del splits[0]
    for split, given in splits:
        if given is None:
            continue
        of_task = (
            kind.train_records(config, model_config(config.model)) if split == "train" else kind.eval_records(config)
        )
        data = config.data.model_copy(update={"on_bad_record": "skip"})  # all of them are in the report
        records = open_records(given, split, data, Path(config.train.output_dir) / DATA_CACHE, of_task)
        print(f"{SPLIT_KEYS[split]}: {sources_named(given)}, {len(records):,} records")
        prepared = prepare(
            config, split, records, processor, pixels, workers, lambda line: print(f"  {line}", flush=True)
        )
        draw_lengths(prepared.tokens[prepared.tokens > 0], config.data.max_length, prepared.folder / LENGTHS)
        for line in report_lines(read_report(prepared), prepared, config, processor):
            print(f"  {line}")


def report_lines(report: Facts, prepared: Prepared, config: RunConfig, processor: Processor) -> Iterator[str]:
    """What was found, a line each."""
    tokens, images = report["tokens"], report["images"]
    if not report["records"]:
        raise UserError(f"{prepared.folder}: every record is bad, the first: {report['bad_records'][0]}")
    share = tokens["labelled"] / tokens["sum"]
    yield (
        f"tokens    {tokens['min']:,} to {tokens['max']:,} a record, median {tokens['median']:,.0f}, 9 of 10 up to "
        f"{tokens['p90']:,.0f}; {tokens['sum']:,} in all, {share:.1%} of them learned"
    )
    if images["count"]:
        smallest, largest = ("x".join(map(str, images[name])) for name in ("smallest", "largest"))
        yield (
            f"images    {images['count']:,} in {images['records']:,} records, {smallest} to {largest} pixels, median "
            f"{images['median'] / 1e6:.2f} megapixels; {report['patches']:,} patches in all"
        )
    if report["videos"]:
        yield f"videos    in {report['videos']:,} records, which every run decodes: they are not stored"
    for token, times in list(report["special_tokens"].items())[:SHOWN]:
        use = control_use(processor, token)
        fix = f"it stays text: {use}" if use else "data.content_tokens keeps it whole"
        yield f"warning   texts write the special token {token} {times:,} times, which is split into pieces ({fix})"
    if report["bad"]:
        yield f"bad       {report['bad']:,} records, which are encoded anew by every run:"
        yield from (f"          {one['where']}: {one['reason']}" for one in report["bad_records"][:SHOWN])
    size = sum(path.stat().st_size for path in prepared.folder.iterdir())
    what = "with images, as bytes" if prepared.pixels else "without images, which a run decodes (--pixels yes)"
    yield f"stored    {prepared.folder}: {size / 2**20:,.1f} MiB, {what if images['count'] else 'text alone'}"
    yield f"lengths   {prepared.folder / LENGTHS}"


def draw_lengths(tokens: np.ndarray, max_length: int, file: Path) -> None:
    """A histogram of tokens a record."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(tokens, bins=min(BINS, max(1, int(tokens.max(initial=1)))), color="#0072B2")
    if len(tokens):
        axes.axvline(float(np.median(tokens)), color="#D55E00", linewidth=1)
    finish_axes(axes, f"Records by their tokens, the median in red (data.max_length {max_length:,})", "tokens")
    figure.savefig(file)
