"""Which experts of a layer serve the same tokens, as a picture."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ds_moe.monitor.heatmap import INK, index_ticks


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
