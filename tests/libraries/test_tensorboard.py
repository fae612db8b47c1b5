"""What TensorBoard's writer does that a reader of its manual would not expect. A failing test: a guard may go.

`docs/libraries.md` lists them all.
"""

import inspect

from tensorboard.summary.writer.event_file_writer import EventFileWriter, _AsyncWriter
from torch.utils.tensorboard import SummaryWriter


def test_hparams_are_written_as_a_run_of_their_own(tmp_path):
    """Guard: `Board.hparams` of monitor/board.py writes the records into the run's own file."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_hparams({"a": 1}, {"loss": 0.0})
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()]


def test_after_ten_events_adding_one_waits_for_the_disk():
    """Guard: `Board` of monitor/board.py makes the queue so long that it does not fill up."""
    assert inspect.signature(EventFileWriter).parameters["max_queue_size"].default == 10
    assert "self._byte_queue.put(" in inspect.getsource(_AsyncWriter.write)
