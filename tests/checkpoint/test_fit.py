"""Whether a run may go on from a checkpoint, where only their run files differ and no tensor tells."""

import json
import re

import pytest

from ds_moe.checkpoint.files import STATE
from ds_moe.checkpoint.fit import Resumption, misfits
from ds_moe.config.run import RunConfig
from ds_moe.config.run_file import write_run
from ds_moe.data.position import order_of


def run_with(lora):
    return RunConfig(
        model={"preset": "tiny-vl-moe"}, data={"train": "digits"}, train={"steps": 1}, lora=lora, deepspeed="zero3"
    )


@pytest.mark.parametrize(
    ("lora", "refusal"),
    [
        ({"rank": 8, "alpha": 32, "dropout": 0.1}, None),
        (
            {"rank": 8, "alpha": 16},
            r"lora.alpha 16 and lora.rslora false multiply updates by 2; .* 4 \(set them to 32",
        ),
        ({"rank": 8, "rslora": True}, "lora.alpha 32 and lora.rslora true multiply updates by 11.3.* to 32 and false;"),
        ({"rank": 16, "alpha": 64}, r"lora.rank is 16; the updates of .* have rank 8 \(set it to 8; or choose another"),
    ],
)
def test_low_rank_updates_go_on_with_the_rank_and_the_factor_that_they_had(tmp_path, lora, refusal):
    trained = run_with({"rank": 8, "alpha": 32})
    write_run(trained, tmp_path)
    (tmp_path / STATE).write_text(json.dumps({"data": {**order_of(trained), "epoch": 0, "step": 1}}))
    run = run_with(lora)
    found = misfits(tmp_path, Resumption(run, None, 1, None, order_of(run), False))
    if refusal is None:
        assert found == []
    else:
        [line] = found
        assert "\n" not in line and "begin from an export" in line
        assert re.search(refusal, line), line
