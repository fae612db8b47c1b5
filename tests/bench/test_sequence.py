"""The benchmark of rows that ranks share: its arithmetic."""

from tools.bench.sequence import bench


def found(ranks: int, above: int, loss: float = 2.0) -> dict:
    seconds = [9.0, 8.0 / ranks]
    return {"ranks": ranks, "tokens": 4096, "above_libraries_bytes": above, "losses": [loss, 1.0], "seconds": seconds}


def test_every_row_is_beside_that_of_one_rank():
    one, two, four = bench.with_shares([found(1, 1000), found(2, 590), found(4, 360)])
    assert (one["memory_share"], two["memory_share"], four["memory_share"]) == (1.0, 0.59, 0.36)
    assert (one["tokens_per_s"], two["tokens_per_s"]) == (512, 1024)
    assert bench.failed([one, two, four]) == [four]


def test_another_loss_fails():
    results = bench.with_shares([found(1, 1000), found(2, 500, loss=2.00001)])
    assert bench.failed(results) == results[1:]


def test_a_row_that_cannot_be_dealt_is_refused_in_one_line(capsys):
    assert bench.main(["--ranks", "2"]) == 2
    assert capsys.readouterr().err == "error: --ranks begins with 1, and --tokens is a multiple of 8 x --samples\n"
