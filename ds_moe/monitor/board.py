"""The TensorBoard files of a run: scalars, pictures, text and hparams, written while the training loop goes on."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from ds_moe.monitor.gallery import sample_gallery
from ds_moe.monitor.heatmap import LoadHeatMap, draw_coactivation
from ds_moe.monitor.meters import relative_load, split_by_kind
from ds_moe.monitor.reports import RoutingReport, ShownSample

LOAD_TAG = "moe/load_counts"  # int64 (2, L, E): the counts behind each heat map, of all tokens and of image tokens
_FLUSH_S = 5  # seconds; a killed run loses at most the curves of this time
_METRICS = ("eval/accuracy", "eval/loss", "train/loss")  # columns of the hparams page

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class Board:
    """Event files of one run in `folder`. A background thread draws pictures; TensorBoard's writer has one for scalars.

    After a resume, what an earlier process wrote from `first_step` on is hidden: no curve runs twice over a step.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # A full queue would make the loop wait for the disk, so this one is too long to fill up.
        self._writer = SummaryWriter(str(folder), purge_step=first_step, max_queue=10_000, flush_secs=_FLUSH_S)
        self._artist = ThreadPoolExecutor(1, thread_name_prefix="monitor-pictures")
        self._drawing: Future[None] | None = None
        self._heat_maps: dict[str, LoadHeatMap] = {}  # by tag; redrawing a heat map is cheaper than making a new one
        self._session_end: Summary | None = None
        self.drawing_s = 0.0  # processor time of the background thread

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._writer.add_text(tag, markdown, step)

    def hparams(self, config: Mapping[str, object], step: int) -> None:
        """List the run on TensorBoard's hparams page. Nested keys of the config are joined by dots."""
        values = {key: _hparam(value) for key, value in flatten(config)}
        # SummaryWriter.add_hparams would write a second run, named by the time; these records go into this one.
        experiment, start, self._session_end = hparams_summaries(values, dict.fromkeys(_METRICS, 0.0))
        for summary in (experiment, start):
            self._writer.file_writer.add_summary(summary, step)

    @property
    def drawing(self) -> bool:
        """Whether the background thread is still at work."""
        return self._drawing is not None and not self._drawing.done()

    def heat_map(self, load: RoutingReport, caption: str, step: int) -> None:
        """Draw the load in the background. The counts are written too, so that figures can be made from them later."""
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
            except Exception:  # a picture is no reason to end a training run; the log says why it is missing
                log.exception("%s at step %d could not be drawn", tag, step)
            self.drawing_s += time.thread_time() - began_s

        self._drawing = self._artist.submit(job)

    def close(self, finished: bool) -> None:
        """Wait until pictures and curves are on disk. `finished` marks the run as complete on the hparams page."""
        self._artist.shutdown(wait=True)
        if finished and self._session_end is not None:
            self._writer.file_writer.add_summary(self._session_end)
        self._writer.close()


def flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings, each with its keys joined by dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hparam(value: object) -> int | float | str:
    """A value that the hparams page can show. Lists, None and bools (it shows true as 1) become JSON."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return value
    return json.dumps(value, default=str)
