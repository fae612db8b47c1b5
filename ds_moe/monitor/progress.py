"""What people see of a run: a bar on a terminal, plain lines in a log file, and a table at the end."""

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table


class Lines:
    """Prints one line for each window, in ASCII and never wrapped."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def step(self, step: int, loss: float, seconds_left: float) -> None:
        pass  # `window` prints a line

    def window(self, step: int, scalars: Mapping[str, float], seconds_left: float) -> None:
        width = len(str(self._total_steps))
        self.say(
            f"step {step:>{width}}/{self._total_steps}  loss {scalars['train/loss']:.4f}  "
            f"lr {scalars['train/lr']:.2e}  grad {scalars['train/grad_norm']:.3f}  "
            f"{scalars['perf/tokens_per_s']:,.0f} tokens/s  {scalars['perf/step_s']:.3g} s/step  "
            f"ETA {duration(seconds_left)}"
        )

    def evaluated(self, step: int, loss: float, accuracy: Mapping[str, float]) -> None:
        self.say(f"eval at step {step}  {describe(loss, accuracy)}")

    def say(self, text: str) -> None:
        # console.print would style and wrap the text. People follow a log file while it is written, so flush.
        print(text, file=self._console.file, flush=True)

    def close(self) -> None:
        pass


class Bar(Lines):
    """A bar in the last line of the terminal. A thread of rich redraws it twice a second; remarks scroll above it."""

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        super().__init__(console, total_steps)
        count = 2 * len(str(total_steps)) + 1
        self._progress = Progress(
            BarColumn(None, table_column=Column(min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=count)),
            TextColumn("{task.fields[facts]}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            refresh_per_second=2,
            expand=True,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=first_step - 1, facts="waiting for the first step", eta="?"
        )
        self._rate = self._accuracy = ""
        self._progress.start()

    def step(self, step: int, loss: float, seconds_left: float) -> None:
        facts = f"loss {loss:.4f}{self._accuracy}{self._rate}"
        self._progress.update(self._task, completed=step, facts=facts, eta=duration(seconds_left))

    def window(self, step: int, scalars: Mapping[str, float], seconds_left: float) -> None:
        self._rate = f"  {scalars['perf/tokens_per_s']:,.0f} tokens/s"

    def evaluated(self, step: int, loss: float, accuracy: Mapping[str, float]) -> None:
        if "mean" in accuracy:
            self._accuracy = f"  accuracy {accuracy['mean']:.3f}"
        super().evaluated(step, loss, accuracy)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class SampleCount:
    """How far an evaluation is: a bar on a terminal, elsewhere a line for every tenth of the samples."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._tenths, self._began_s = console, total, 0, time.perf_counter()
        columns = (BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, expand=True, disable=not redraws(console))
        self._task = self._bar.add_task("evaluate", total=total)
        self._bar.start()

    def done(self, samples: int) -> None:
        self._bar.update(self._task, completed=samples)
        tenths = 10 * samples // self._total
        if tenths > self._tenths and not redraws(self._console):
            left_s = (time.perf_counter() - self._began_s) / samples * (self._total - samples)
            text = f"evaluated {samples}/{self._total} samples  ETA {duration(left_s)}"
            print(text, file=self._console.file, flush=True)
        self._tenths = tenths

    def close(self) -> None:
        self._bar.stop()


def make_display(console: Console, first_step: int, total_steps: int) -> Lines:
    """A bar if the console can redraw it, else lines."""
    return Bar(console, first_step, total_steps) if redraws(console) else Lines(console, total_steps)


def redraws(console: Console) -> bool:
    """Whether a line can be written over: not in files, pipes, CI, SLURM logs and dumb terminals."""
    return console.is_terminal and not console.is_dumb_terminal


def describe(loss: float, accuracy: Mapping[str, float]) -> str:
    """`loss 0.1234  accuracy 0.950 (digit 0.940, parity 0.960)`."""
    kinds = ", ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items() if kind != "mean")
    mean = f"  accuracy {accuracy['mean']:.3f}" if "mean" in accuracy else ""
    return f"loss {loss:.4f}{mean}" + (f" ({kinds})" if kinds else "")


def duration(seconds: float) -> str:
    """`0:01:40`, or `?` for infinity."""
    return str(timedelta(seconds=round(seconds))) if seconds < float("inf") else "?"


def print_table(rows: Mapping[str, str], title: str, console: Console | None = None) -> None:
    """Print two columns, name and value, below a title.

    In a log file the table is as wide as its longest row, because a wrapped path cannot be copied.
    """
    console = console or Console()
    if not console.is_terminal:
        widest = max((len(name) + len(str(value)) for name, value in rows.items()), default=0)
        console = Console(file=console.file, width=2 * max(widest, console.width))
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(str(value)))
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
