"""Self-replay over ranks: recorded, then forced, is the live forward and backward bit for bit."""

import pytest

from tests.launcher import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "sizes"), [(2, 2), (4, 3)])
def test_self_replay_is_bit_equal_for_every_ep_size(world_size, sizes, show):
    """EP 1, 2, 4; fp32 and bf16; checkpointing off and on; real images padded (one rank text-only), and packed text."""
    run = run_ranks("tests/distributed/replay_ranks.py", world_size)
    lines = [f"self-replay against live, forward and every gradient, on {world_size} ranks"]
    for rank, found in enumerate(run.json_by_rank):
        assert len(found["rows"]) == 2 * sizes * 2 * 2
        for form, ep_size, dtype, checkpointing, equal, other_equal, router, rows in found["rows"]:
            case = f"rank {rank} {form} EP {ep_size} {dtype} checkpointing {checkpointing}"
            assert equal, case
            assert not other_equal, f"{case}: other experts gave the same (negative control)"
            assert router > 0 and rows > 0, case
            lines.append(f"  {case}: bit-equal; largest router gradient {router:.1e}")
    show("\n".join(lines[:1] + lines[1:25]))
