"""EarlyStopping of ds_moe/training/run.py: what counts as better, when waiting ends, and which result stays."""

import math
from types import SimpleNamespace

import pytest

from ds_moe.checkpoint import save
from ds_moe.checkpoint.files import step_folders, step_name
from ds_moe.checkpoint.progress import Figures, Progress
from ds_moe.training import checkpoints
from ds_moe.training.run import EarlyStopping


def test_it_waits_for_a_better_loss_and_no_longer():
    stopping = EarlyStopping(patience=2)
    losses = [3.0, 2.0, 2.5, 1.5, 1.5, 1.6]  # an equal loss is no better one
    seen = [(stopping.note(loss, Figures(step)), stopping.exhausted) for step, loss in enumerate(losses)]
    assert [better for better, _ in seen] == [True, True, False, True, False, False]
    assert [exhausted for _, exhausted in seen] == [False] * 5 + [True]
    assert (stopping.best, stopping.waited, stopping.figures) == (1.5, 2, Figures(3))


def test_the_result_is_a_copy():
    stopping, figures = EarlyStopping(patience=1), Figures(1)
    stopping.note(1.0, figures)
    figures.step = 2
    assert stopping.figures == Figures(1)


def test_what_is_no_number_is_never_the_best():
    stopping = EarlyStopping(patience=3)
    assert not stopping.note(math.nan, Figures()) and not stopping.note(math.inf, Figures())
    assert stopping.note(7.0, Figures()) and not stopping.note(math.nan, Figures()) and stopping.best == 7.0
    assert stopping.waited == 1 and not stopping.exhausted


def test_a_resumed_run_keeps_its_best_and_waits_on():
    stopping = EarlyStopping(patience=2)
    stopping.go_on(0.5, Figures(40), waited=1)  # as `train.resume` does
    assert not stopping.exhausted and not stopping.note(0.6, Figures(50)) and stopping.exhausted
    assert stopping.figures == Figures(40)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_began_in_another_folder_takes_no_checkpoint_there_for_its_best(tmp_path, monkeypatch, elsewhere):
    """A checkpoint that is called like the best one may be one of an earlier run in the same output folder."""
    own = tmp_path / "run/checkpoints"
    for step in (1, 2):
        (own / step_name(step)).mkdir(parents=True)
    monkeypatch.setattr(save, "incomplete", lambda path: None)
    notes, progress = [], Progress(step=2, total_steps=4, best_loss=0.5, best=Figures(1), waited=1)
    progress.best_checkpoint = step_name(1)
    run = SimpleNamespace(patience=EarlyStopping(3), progress=progress, folder=tmp_path / "run")
    run.monitor, run.parts = SimpleNamespace(note=notes.append), SimpleNamespace(topology=SimpleNamespace(rank=0))
    checkpoints.wait_on(run, (tmp_path / "other/checkpoints" if elsewhere else own) / step_name(2))
    checkpoints.keep_best_newest(run)
    assert (run.patience.best, run.patience.waited, run.patience.figures) == (0.5, 1, Figures(1))
    assert len(step_folders(own)) == (2 if elsewhere else 1) and len(notes) == elsewhere
