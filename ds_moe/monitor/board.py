"""The TensorBoard side of a run: scalars, pictures, text and hparams, written without making the loop wait."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from ds_moe.monitor.coactivation import draw_coactivation
from ds_moe.monitor.gallery import sample_gallery
from ds_moe.monitor.heatmap import LoadHeatMap
from ds_moe.monitor.meters import relative_load, split_by_kind
from ds_moe.monitor.reports import RoutingReport, ShownSample

LOAD_TAG = "moe/load_counts"  # int64 (2, L, E): all and image assignments behind each heat map, for later figures
_FLUSH_S = 5  # a killed run loses at most the curves of so many seconds
_METRICS = ("eval/accuracy", "eval/loss", "train/loss")  # columns of the hparams page

log = logging.getLogger(__name__)


class Board:
    """Event files of one run in `folder`.

    Scalars go to the writer's queue; pictures are drawn by one background thread. After a resume, `first_step` hides
    what an earlier process wrote from that step on, so that curves go on without a fold.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # The queue is long enough never to be full: a full one would block the loop on the disk.
        self._writer = SummaryWriter(str(folder), purge_step=first_step, max_queue=10_000, flush_secs=_FLUSH_S)
        self._artist = ThreadPoolExecutor(1, thread_name_prefix="monitor-pictures")
        self._drawing: Future[None] | None = None
        self._heat_maps: dict[str, LoadHeatMap] = {}  # kept, by tag: a later picture is cheaper than a first
        self._session_end: Any = None
        self.drawing_s = 0.0  # processor seconds of the background thread

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._writer.add_text(tag, markdown, step)

    def hparams(self, config: Mapping[str, Any], step: int) -> None:
        """List the run on the hparams page, by its flat config."""
        values = {key: _hparam(value) for key, value in flatten(config)}
        # SummaryWriter.add_hparams would open a second run named by the time; these records belong to this one.
        experiment, start, self._session_end = hparams_summaries(values, dict.fromkeys(_METRICS, 0.0))
        for summary in (experiment, start):
            self._writer.file_writer.add_summary(summary, step)

    @property
    def drawing(self) -> bool:
        """True while a picture is not finished."""
        return self._drawing is not None and not self._drawing.done()

    def heat_map(self, load: RoutingReport, caption: str, step: int) -> None:
        """Draw the load in the background, and keep the counts for later figures."""
        self._writer.add_tensor(LOAD_TAG, torch.from_numpy(np.stack([load.counts_LE, load.image_counts_LE])), step)
        shares_LE = relative_load(load.counts_LE)
        self._writer.add_histogram("moe/load", shares_LE[~np.isnan(shares_LE)], step)
        self._panels("moe/expert_load", split_by_kind(load.counts_LE, load.image_counts_LE), caption, step)
        if len(load.kind_counts_LE) > 1:
            self._panels("moe/expert_load_by_kind", load.kind_counts_LE, caption, step)

    def _panels(self, tag: str, counts: dict[str, np.ndarray], caption: str, step: int) -> None:
        kinds, (layers, experts) = tuple(counts), next(iter(counts.values())).shape

        def draw() -> np.ndarray:
            if tag not in self._heat_maps or self._heat_maps[tag].kinds != kinds:
                self._heat_maps[tag] = LoadHeatMap(layers, experts, kinds)
            return self._heat_maps[tag].draw(counts, caption)

        self.picture(tag, draw, step)

    def pairs(self, pairs_EE: np.ndarray, caption: str, step: int) -> None:
        """Draw which experts of the first layer serve the same tokens, in the background."""
        self.picture("moe/coactivation", lambda: draw_coactivation(pairs_EE, caption), step)

    def samples(self, shown: list[ShownSample], step: int) -> None:
        """Draw evaluated samples in the background."""
        self.picture("eval/samples", lambda: sample_gallery(shown, f"Held-out samples after step {step:,}"), step)

    def picture(self, tag: str, picture: Callable[[], np.ndarray], step: int) -> None:
        """Draw a picture, uint8 (height, width, 3), in the background."""

        def job() -> None:
            began_s = time.thread_time()
            try:
                self._writer.add_image(tag, picture(), step, dataformats="HWC")
            except Exception:  # a picture is not worth a training run, but its absence must be explained
                log.exception("%s at step %d could not be drawn", tag, step)
            self.drawing_s += time.thread_time() - began_s

        self._drawing = self._artist.submit(job)

    def close(self, finished: bool) -> None:
        """Wait for pictures and curves to be on disk. `finished`: mark the run as complete on the hparams page."""
        self._artist.shutdown(wait=True)
        if finished and self._session_end is not None:
            self._writer.file_writer.add_summary(self._session_end)
        self._writer.close()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hparam(value: Any) -> int | float | str:
    """What the hparams page can show: lists, None, and bools (which it would show as 1 and 0) become JSON."""
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return value if plain else json.dumps(value, default=str)
