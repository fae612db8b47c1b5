"""Checkpoints streamed into EP and ZeRO shards: the engine of a completely loaded model, bit for bit."""

import math

import pytest

from ds_moe.weights.files import SafetensorsFiles
from tests.launcher import run_ranks
from tests.models.streamed import FORMS, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for form in FORMS:
        write(folder / form, form)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "cases"), [(2, "FEW"), (2, "SHORT"), (4, "LONG")])
def test_streamed_equals_loaded_complete_and_sharded(folder, world_size, cases, show):
    run = run_ranks("tests/distributed/streaming_ranks.py", world_size, [folder, cases])
    lines = [f"streamed against loaded complete, {world_size} ranks: all weights, masters, buffers and the loss equal"]
    for rank, result in enumerate(run.json_by_rank):
        for form, ep_size, stage, dtype, sections, differing, same_loss, size in result["found"]:
            name = f"{form} {dtype}, EP {ep_size}, ZeRO {stage} {' '.join(sections)}"
            assert differing == [] and same_loss, name
            experts, others = bytes_of(folder / form, FORMS[form][-1].itemsize)
            if stage == 3:  # rows at the ends of shards are read by two ranks
                assert size == pytest.approx((experts + others) / world_size, rel=0.02), name
            else:
                assert size == others + experts / ep_size, name
            lines.append(f"  rank {rank}: {name:<45} read {size / (experts + others):.0%} of the weights")
        differing, _, _ = result["broken"]  # negative control: the experts of one layer in another order
        assert len(differing) == 2 and all("down_proj" in name for name in differing)
    assert not all(result["broken"][1] for result in run.json_by_rank)
    show("\n".join(lines))


def bytes_of(folder, width):
    """Bytes of the experts, and of all else."""
    sizes = {True: 0, False: 0}
    for name, shape in SafetensorsFiles.find(str(folder)).shapes.items():
        sizes[".experts." in name] += width * math.prod(shape)
    return sizes[True], sizes[False]
