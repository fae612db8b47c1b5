"""The monitor of one run turns reports into curves, pictures, progress and a closing table.

Rank 0 has a `RunMonitor`, others a `Monitor`, which does nothing: the training loop needs no `if rank == 0`.
"""

import atexit
import copy
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import MonitorConfig
from ds_moe.monitor.meters import Clock, DeadExperts, routing_scalars, tag, window_scalars
from ds_moe.monitor.progress import Lines, make_display, print_table
from ds_moe.monitor.reports import EvalReport, RoutingReport, StepReport

if TYPE_CHECKING:
    from ds_moe.monitor.board import Board

_NAMED_EXPERTS = 8  # an alarm names at most so many


class Monitor:
    """What every rank can call. This base class does nothing, except that it knows which steps are log steps."""

    def __init__(self, config: MonitorConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps

    def is_log_step(self, step: int) -> bool:
        """Whether routing counts are to be reduced and reported at this step; the same on all ranks.

        The first step shows a number soon in a long run, and keeps the costs of its warm-up in a window of its own.
        """
        return step in (1, self.total_steps) or step % self.config.log_every == 0

    def start(self, first_step: int, summary: str, hparams: Mapping[str, object]) -> None:
        """Call it before the first step, whose number (the saved one + 1 after a resume) is `first_step`.

        `summary`, topology and table of parameters, is shown unchanged; `hparams` is the config, nested or flat.
        """

    def step(self, report: StepReport, routing: RoutingReport | None) -> None:
        """Call it after every optimizer step; at log steps with the routing since the last log step."""

    def evaluated(self, report: EvalReport) -> None:
        """Call it after an evaluation."""

    def note(self, text: str) -> None:
        """Show a remark and write it to TensorBoard: a checkpoint was written, records were skipped."""

    def finish(self, rows: Mapping[str, str]) -> None:
        """Call it at the end of a complete run: writes everything out, then prints `rows` as one table."""

    def close(self) -> None:
        """Write everything out and release the terminal. Safe to call twice; also runs when the process exits."""

    def overhead(self) -> float:
        """Seconds in `step` and processor time of the drawing thread, as a share of the time of the training steps."""
        return 0.0


class RunMonitor(Monitor):
    """Rank 0's monitor."""

    def __init__(
        self, config: MonitorConfig, total_steps: int, peak: float | None, run_dir: Path, console: Console
    ) -> None:
        super().__init__(config, total_steps)
        self._peak_tokens_per_s = peak
        self._run_dir = run_dir
        self._console = console
        self._display = Lines(console, total_steps)  # `start` replaces it
        self._board: Board | None = None
        self._window: list[StepReport] = []  # steps since the last log step
        self._dead = DeadExperts(config.dead_alarm_steps)
        self._load: RoutingReport | None = None  # summed since the last heat map
        self._load_from = self._heat_map_step = self._step = self._routing_step = 0
        self._training_s = self._own_s = 0.0

    def start(self, first_step: int, summary: str, hparams: Mapping[str, object]) -> None:
        self._step = self._heat_map_step = self._routing_step = first_step - 1
        self._load_from = first_step
        self._clock = Clock(self.total_steps)
        self._display.say(summary)
        self._display = make_display(self._console, first_step, self.total_steps)
        if self.config.tensorboard:
            from ds_moe.monitor.board import Board  # imports matplotlib and tensorboard, which takes half a second

            self._board = Board(self._run_dir / "tensorboard", first_step)
            self._board.text("run/summary", textwrap.indent(summary, "    "), self._step)  # columns stay aligned
            self._board.hparams(hparams, self._step)
        atexit.register(self.close)

    def step(self, report: StepReport, routing: RoutingReport | None) -> None:
        began_s = time.perf_counter()
        self._step = report.step
        self._window.append(report)
        seconds_left = self._clock.seconds_left(report.step, began_s, report.step_s)
        scalars = routing_scalars(routing) if routing is not None else {}
        if self.is_log_step(report.step):
            scalars = window_scalars(self._window, self._peak_tokens_per_s) | scalars
            self._window = []
            self._display.window(report.step, scalars, seconds_left)
        self._display.step(report.step, report.loss, seconds_left)
        if routing is not None:
            self._alarm(routing.counts_LE)
        if self._board is not None:
            self._board.scalars(scalars, report.step)
            if routing is not None:
                self._add_load(routing)
                every = self.config.heatmap_every
                due = self._step // every > self._heat_map_step // every
                if due and not self._board.drawing:  # else counts add up, so that pictures never queue
                    self._draw_load()
        self._training_s += report.step_s
        self._own_s += time.perf_counter() - began_s

    def evaluated(self, report: EvalReport) -> None:
        self._display.evaluated(report.step, report.loss, report.accuracy)
        if self._board is None:
            return
        scalars = {"eval/loss": report.loss}
        for kind, share in report.accuracy.items():
            scalars["eval/accuracy" if kind == "mean" else f"eval/accuracy_{tag(kind)}"] = share
        self._board.scalars(scalars | report.scalars, report.step)
        for name, picture in report.pictures.items():
            self._board.picture(name, picture, report.step)
        shown = report.samples[: self.config.sample_images]
        if shown:
            self._board.samples(shown, report.step)

    def note(self, text: str) -> None:
        self._display.say(text)
        if self._board is not None:
            self._board.text("run/notes", text, self._step)

    def finish(self, rows: Mapping[str, str]) -> None:
        if self._board is not None:
            if self._load is not None:  # the steps since the last heat map
                self._draw_load()
            table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
            self._board.text("run/result", "\n".join(table), self._step)
        self._close(finished=True)
        print_table(rows, f"{self._run_dir} after {self._step:,} steps", self._console)

    def close(self) -> None:
        self._close(finished=False)

    def overhead(self) -> float:
        drawing_s = self._board.drawing_s if self._board is not None else 0.0
        return (self._own_s + drawing_s) / self._training_s if self._training_s else 0.0

    def _alarm(self, counts_LE: np.ndarray) -> None:
        dead = self._dead.newly_dead(counts_LE, self._step - self._routing_step)
        self._routing_step = self._step
        if dead:
            names = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:_NAMED_EXPERTS])
            more = f" and {len(dead) - _NAMED_EXPERTS} more" if len(dead) > _NAMED_EXPERTS else ""
            self.note(f"step {self._step}: no token for {self.config.dead_alarm_steps} steps: expert {names}{more}")

    def _add_load(self, routing: RoutingReport) -> None:
        if self._load is None:
            self._load = copy.deepcopy(routing)
            return
        self._load.counts_LE += routing.counts_LE
        self._load.image_counts_LE += routing.image_counts_LE
        for kind, counts_LE in routing.kind_counts_LE.items():
            self._load.kind_counts_LE[kind] += counts_LE
        if self._load.pairs_EE is not None and routing.pairs_EE is not None:
            self._load.pairs_EE += routing.pairs_EE

    def _draw_load(self) -> None:
        caption = f"Expert load relative to a fair share, steps {self._load_from:,} to {self._step:,}"
        self._board.heat_map(self._load, caption, self._step)
        if self._load.pairs_EE is not None:
            caption = f"First MoE layer, steps {self._load_from:,} to {self._step:,}"
            self._board.pairs(self._load.pairs_EE, caption, self._step)
        self._load, self._load_from, self._heat_map_step = None, self._step + 1, self._step

    def _close(self, finished: bool) -> None:
        atexit.unregister(self.close)
        self._display.close()
        if self._board is not None:
            self._board.close(finished)
            self._own_s += self._board.drawing_s
            self._board = None


def make_monitor(
    config: RunConfig,
    *,
    rank: int,
    total_steps: int,
    flops_per_token: float | None,
    peak_flops: float | None,
    run_dir: Path,
    console: Console | None = None,
) -> Monitor:
    """On rank 0 a monitor of the run, whose event files go to `run_dir`/tensorboard; on others one that does nothing.

    `flops_per_token` is forward and backward of activated parameters, `peak_flops` FLOP/s of all ranks; MFU needs both.
    """
    if rank != 0:
        return Monitor(config.monitor, total_steps)
    peak = peak_flops / flops_per_token if peak_flops and flops_per_token else None
    return RunMonitor(config.monitor, total_steps, peak, Path(run_dir), console or Console())
