"""Muon under ZeRO: Newton-Schulz, where matrices lie, and steps against plain float64."""

import json

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from ds_moe.engine import flat_matrices
from ds_moe.engine.flat_matrices import Block
from ds_moe.engine.orthogonal import ITERATIONS, orthogonal
from ds_moe.models.matrices import Stack
from tests.engine.muon_ranks import newton_schulz
from tests.launcher import run_ranks

TOLERANCE = (
    1e-4  # of a weight, of the learning rate, after three steps; entries of an update are about 0.2 learning rates
)
STAGES = (1, 2, 3)
FAST = {"ZeRO 2, EP 2": (2, 2, {}), "ZeRO 3, EP 1": (3, 1, {})}
SLOW = {
    2: {
        **{f"ZeRO {stage}, EP {ep}": (stage, ep, {}) for stage in STAGES for ep in (1, 2)},
        **{f"LoRA, ZeRO {stage}": (stage, 2, {"lora": {"rank": 4, "experts": True}}) for stage in (1, 3)},
        **{f"buckets of one matrix, ZeRO {stage}": (stage, 1, {"bucket": 3000}) for stage in (2, 3)},
        "small sub-groups": (3, 1, {"zero": {"sub_group_size": 20_000}}),
    },
    3: {f"ZeRO {stage}": (stage, 1, {}) for stage in STAGES},
    4: {f"EP 2 x 2 replicas, ZeRO {stage}": (stage, 2, {}) for stage in STAGES},
}
BF16 = {f"ZeRO {stage}": (stage, 2, {"precision": "bf16"}) for stage in (2, 3)}


@pytest.mark.parametrize("shape", [(5, 7, 16), (5, 16, 7), (1, 12, 12)])
def test_newton_schulz_is_jordan_s_and_torch_s(shape):
    torch.manual_seed(0)
    x_nRC = torch.randn(shape)
    exact = torch.stack([newton_schulz(one) for one in x_nRC.double()])
    assert (orthogonal(x_nRC, torch.float32) - exact).abs().max() < 1e-5
    theirs = [_zeropower_via_newtonschulz(one, (3.4445, -4.7750, 2.0315), ITERATIONS, 1e-7) for one in x_nRC]
    assert (orthogonal(x_nRC, torch.bfloat16) - torch.stack(theirs)).abs().max() < 0.1
    assert (torch.stack(theirs) - exact).abs().max() > 1e-3, "the control: bf16 is told from float64"


def test_newton_schulz_of_small_and_of_no_gradients():
    """A gradient of 1e-12 has an update of full length, where torch's, which adds 1e-7 to norms, has almost none."""
    torch.manual_seed(0)
    x_nRC = torch.randn(1, 6, 9)
    both = orthogonal(torch.cat([x_nRC * 1e-12, torch.zeros(1, 6, 9)]), torch.float32)
    assert torch.allclose(both[:1], orthogonal(x_nRC, torch.float32), atol=1e-5)
    assert not both[1].any()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("bucket", [40, 10_000])
def test_blocks_tile_what_ranks_hold(monkeypatch, world, bucket):
    """Every element is in one piece of one block, wherever the partitions cut; each rank meets every matrix once."""
    monkeypatch.setattr(flat_matrices, "BUCKET", bucket)
    stacks = [Stack(1, 5, 7), Stack(7, 4, 3), Stack(1, 2, 9)]
    numels = [stack.count * stack.rows * stack.columns for stack in stacks]
    size = -(-(sum(numels) + 4) // world)  # of a rank's partition; 4 elements are padding
    offsets = [0, numels[0] + 4, numels[0] + 4 + numels[1]]
    placed = [(stack, flat_matrices._cut_by(size, offset)) for stack, offset in zip(stacks, offsets, strict=True)]
    buckets, count = flat_matrices._buckets(placed, world)
    blocks: list[Block] = [block for one in buckets for block in one]
    assert count == 9 and sum(block.stack.count for block in blocks) == count
    hit = torch.zeros(world, size)
    for block in blocks:
        assert sum(piece.size for piece in block.pieces) == block.numel and 0 <= block.owner < world
        for piece in block.pieces:
            seen = []
            for matrices, view in block.by_matrix(piece, hit[piece.rank]):
                view += 1
                seen += range(matrices.start, matrices.stop)
            assert len(seen) == len(set(seen)) and sum(hit[piece.rank] > 1) == 0
    expected = torch.ones(world * size)
    expected[numels[0] : numels[0] + 4] = 0
    expected[sum(numels) + 4 :] = 0
    assert torch.equal(hit.flatten(), expected)
    if bucket == 10_000 and world > 1:
        assert {block.owner for block in blocks} == set(range(world)), "the work is shared"


@pytest.mark.parametrize("kind", [{}, {"dim": -1}, {"interleaved": True}, {"dim": -1, "interleaved": True}])
def test_gate_and_up_are_taken_apart_as_they_lie(kind):
    full_nRC = torch.arange(2 * 4 * 6).view(2, 4, 6)
    gate, up = Stack(2, 4, 6, parts=2, **kind).split(full_nRC)
    across = kind.get("dim") == -1
    matrix = full_nRC[0].T if across else full_nRC[0]
    first = matrix[::2] if kind.get("interleaved") else matrix[: len(matrix) // 2]
    assert torch.equal(gate[0].T if across else gate[0], first)
    assert sorted(torch.cat([gate.flatten(), up.flatten()]).tolist()) == list(range(48))


def check(found):
    assert found["muon"] < TOLERANCE and found["adamw"] < TOLERANCE and found["momentum"] < 1e-7
    assert found["idle"] == 0


def test_steps_equal_float64(show):
    """One launch; `test_every_topology` has the others."""
    found = run_ranks("tests/engine/muon_ranks.py", 2, [json.dumps(FAST), "ZeRO 3, EP 1"]).json
    stacked = found.pop("stacked")
    assert found.keys() == FAST.keys()
    for one in found.values():
        check(one)
    assert stacked["muon"] > 0.1, "the control: gate and up as one matrix is another step"


@pytest.mark.slow  # in `make test`: two of them, above
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_topology(world, show):
    found = run_ranks("tests/engine/muon_ranks.py", world, [json.dumps(SLOW[world]), ""]).json
    assert found.keys() == SLOW[world].keys()
    show("\n".join(f"  {world} ranks, {name:<34} {one}" for name, one in found.items()))
    for one in found.values():
        check(one)


@pytest.mark.slow  # in `make test`: fp32
def test_bf16_with_sums_in_fp32(show):
    """Norms move as AdamW's and momentum is exact. Newton-Schulz in bf16 is not: torch's is as far from float64."""
    found = run_ranks("tests/engine/muon_ranks.py", 2, [json.dumps(BF16), ""]).json
    show("\n".join(f"  bf16, {name} {one}" for name, one in found.items()))
    for one in found.values():
        assert one["adamw"] < TOLERANCE and one["momentum"] < 1e-7 and one["idle"] == 0 and one["muon"] < 1
