"""Pictures of where tokens go: the load of each layer's experts, in colours that the colour-blind can tell apart, and
which experts of a layer serve the same tokens.

They are drawn on matplotlib's Agg canvas, without pyplot, whose global state is not safe outside the main thread.
"""

import functools

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from ds_moe.monitor.meters import max_vio, relative_load

INK, FAINT = "#222222", "#6B6B6B"
_SMALL_CELLS = 64  # panels of at most so many cells have lines between them, and may have numbers in them
_LOG2_RANGE = 2.0  # the colours range from 1/4 to 4 times the fair share


class LoadPanel:
    """The load of one kind of token, drawn on `axes`. A panel is made once and can `show` other counts later.

    `shape` is (layers, experts). Panels at the `bottom` and `left` of a picture have labels there. `numbers` writes the
    load into each cell of a small panel: 0.7 ms a cell each time, too slow during a run.
    """

    def __init__(
        self,
        axes: Axes,
        shape: tuple[int, int],
        kind: str,
        bottom: bool = True,
        left: bool = True,
        numbers: bool = False,
    ) -> None:
        layers, experts = shape
        small = layers * experts <= _SMALL_CELLS
        colors, norm = _load_colors()
        edges, cells = "white" if small else "none", np.zeros((layers, experts))
        self._cells = axes.pcolormesh(cells, cmap=colors, norm=norm, edgecolors=edges)
        self._cells.set_linewidth(1.5 if small else 0)
        self._balance = axes.set_title("", fontsize=8.5, color=FAINT, loc="right", pad=5)
        self._numbers = [
            axes.text(expert + 0.5, layer + 0.5, "", ha="center", va="center", fontsize=7.5)
            for layer in range(layers * (small and numbers))
            for expert in range(experts)
        ]
        axes.set_title(f"{kind} tokens", fontsize=9.5, color=INK, loc="left", pad=5)
        axes.invert_yaxis()
        axes.set_xticks(*index_ticks(experts))
        axes.set_yticks(*index_ticks(layers))
        axes.tick_params(length=0, labelsize=8, colors=INK, labelleft=left)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("expert" if bottom else "", fontsize=9, color=INK)
        axes.set_ylabel("MoE layer" if left else "", fontsize=9, color=INK)
        self.changing: list[Artist] = [self._cells, self._balance]

    def show(self, counts_LE: np.ndarray) -> None:
        """Show these assignments, (L, E); a layer without any is grey."""
        load_LE = relative_load(counts_LE)
        dead = int((load_LE == 0).sum())
        self._cells.set_array(_log2_load(load_LE))
        self._balance.set_text(f"MaxVio {max_vio(counts_LE):.2f}" + (f", {dead} dead" if dead else ""))
        for number, load in zip(self._numbers, load_LE.flat, strict=False):  # the list is empty without `numbers`
            number.set_text("-" if np.isnan(load) else f"{load:.2f}" if load < 9.95 else f"{load:.0f}")
            number.set_color(INK if 0.35 < load < 2.8 or np.isnan(load) else "white")


class LoadHeatMap:
    """A panel for each kind of token, one below the other.

    Frame, ticks and labels are drawn once. Later draws repaint only what changes, at a fraction of the cost.
    """

    def __init__(self, layers: int, experts: int, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        width, height = float(np.clip(0.42 * experts, 2.8, 12)), float(np.clip(0.36 * layers, 0.72, 4.5))  # inches each
        left, top, right, bottom, gap = 0.75, 0.85, 1.3, 0.6, 0.65
        total_width = left + width + right
        total_height = top + len(kinds) * (height + gap) - gap + bottom
        self.figure = Figure(figsize=(total_width, total_height), dpi=100, facecolor="white")
        self._canvas = FigureCanvasAgg(self.figure)

        def axes_at(x: float, y: float, w: float, h: float) -> Axes:  # inches from the lower left corner
            return self.figure.add_axes((x / total_width, y / total_height, w / total_width, h / total_height))

        self._panels = {}
        for row, kind in enumerate(kinds):
            axes = axes_at(left, total_height - top - height - row * (height + gap), width, height)
            self._panels[kind] = LoadPanel(axes, (layers, experts), kind, bottom=row == len(kinds) - 1)
        bar_height = float(np.clip(height, 1.0, 3.0))
        draw_load_scale(axes_at(total_width - right + 0.25, total_height - top - bar_height, 0.14, bar_height))
        x, y = 0.16 / total_width, 1 - 0.26 / total_height
        self._caption = self.figure.text(x, y, "", fontsize=10.5, color=INK, va="center")
        self._changing = [self._caption, *(artist for panel in self._panels.values() for artist in panel.changing)]
        for artist in self._changing:
            artist.set_animated(True)  # so that canvas.draw() leaves it out
        self._canvas.draw()
        self._still = self._canvas.copy_from_bbox(self.figure.bbox)

    def draw(self, counts: dict[str, np.ndarray], caption: str) -> np.ndarray:
        """The picture of these counts, by kind of token, as uint8 (height, width, 3)."""
        self._caption.set_text(caption)
        for kind, counts_LE in counts.items():
            self._panels[kind].show(counts_LE)
        self._canvas.restore_region(self._still)
        for artist in self._changing:
            artist.draw(self._canvas.get_renderer())
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()


def draw_load_scale(axes: Axes) -> None:
    """The colour scale of every load panel."""
    colors, norm = _load_colors()
    bar = axes.figure.colorbar(ScalarMappable(norm, colors), cax=axes, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "fair share", "2 x", "4 x or more"], fontsize=8, color=INK)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)


@functools.cache
def _load_colors() -> tuple[Colormap, Normalize]:
    """Colours of log2(load / fair share): matplotlib's `under` for a dead expert, `bad` for a layer without tokens."""
    return colormaps["RdBu_r"].with_extremes(under="black", bad="#DDDDDD"), Normalize(-_LOG2_RANGE, _LOG2_RANGE)


def _log2_load(load_LE: np.ndarray) -> np.ndarray:
    """log2 of the load, clipped to the scale's range; a dead expert lies below the range, and NaN is masked."""
    clipped_LE = np.clip(load_LE, 2**-_LOG2_RANGE, 2**_LOG2_RANGE)
    return np.ma.masked_invalid(np.where(load_LE == 0, -_LOG2_RANGE - 1, np.log2(clipped_LE)))


def index_ticks(count: int) -> tuple[np.ndarray, list[str]]:
    """Tick positions in the middle of cells, and the cells' indices. Of many cells, only every 2^n-th has a tick."""
    stride = 1
    while count / stride > 16:
        stride *= 2
    indices = np.arange(0, count, stride)
    return indices + 0.5, [str(i) for i in indices]


def coactivation(pairs_EE: np.ndarray) -> np.ndarray:
    """Share of the tokens of expert i (row) that also use expert j (column), (E, E) float64.

    The diagonal and rows of experts without tokens are NaN. Were experts chosen independently, an entry would be the
    column expert's share of all tokens.
    """
    own_E1 = np.diag(pairs_EE).astype(np.float64)[:, None]
    own_E1[own_E1 == 0] = np.nan
    shares_EE = pairs_EE / own_E1
    np.fill_diagonal(shares_EE, np.nan)
    return shares_EE


def draw_coactivation(pairs_EE: np.ndarray, caption: str) -> np.ndarray:
    """The picture as uint8 (height, width, 3). Entries without a value are grey."""
    figure = Figure(figsize=(4.6, 4.4), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.12, 0.08, 0.68, 0.78))
    axes.set_facecolor("#DDDDDD")
    shown = axes.imshow(np.ma.masked_invalid(coactivation(pairs_EE)), cmap="viridis", vmin=0)
    positions, labels = index_ticks(len(pairs_EE))
    axes.set_xticks(positions - 0.5, labels)
    axes.set_yticks(positions - 0.5, labels)
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.set_xlabel("also used expert", fontsize=9, color=INK)
    axes.set_ylabel("share of the tokens of expert", fontsize=9, color=INK)
    figure.colorbar(shown, cax=figure.add_axes((0.84, 0.08, 0.03, 0.78))).ax.tick_params(length=0, labelsize=8)
    figure.text(0.02, 0.95, caption, fontsize=9.5, color=INK, va="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
