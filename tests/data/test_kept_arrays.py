"""Arrays are kept whole, whoever else writes them."""

import numpy as np

from ds_moe.data.kept_arrays import read_arrays, write_arrays


def test_two_hosts_that_write_the_same_file_at_once(tmp_path, monkeypatch):
    """Their processes may have the same number."""
    file, save = tmp_path / "kept.npz", np.savez

    def while_another_writes(stream, **arrays):
        monkeypatch.setattr(np, "savez", save)
        write_arrays(file, a=np.arange(3))
        save(stream, **arrays)

    monkeypatch.setattr(np, "savez", while_another_writes)
    write_arrays(file, a=np.arange(4))
    assert read_arrays(file, "a")[0].tolist() == [0, 1, 2, 3] and list(tmp_path.iterdir()) == [file]
