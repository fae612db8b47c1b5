"""What the doctor says of the servers of a run: as they are, at once, and without changing anything."""

import time
from pathlib import Path

import pytest

from ds_moe.config.run_file import load_run
from ds_moe.doctor.case import Case, Device
from ds_moe.doctor.engine import check_engine
from ds_moe.models.processor import tiny_processor
from tests.rollout.fake_vllm import FakeVllm

RUN = Path(__file__).resolve().parents[1] / "runs" / "online.yaml"


def findings(fake, on_cpu=True):
    overrides = ["rl.engine.kind=vllm", f"rl.engine.urls=[{fake.url}]", "train.precision=null"]
    case = Case(load_run(RUN, overrides), 2, Device(on_cpu, 2**33, "this machine"), 4, processor=tiny_processor("vl"))
    return [(one.level, one.text) for one in check_engine(case) if fake.url in one.text]


@pytest.fixture
def fake():
    with FakeVllm() as one:
        one.paused = True  # as a run leaves it that hands weights over at this moment
        yield one


def test_a_server_that_is_right(fake):
    [(level, text)] = findings(fake)
    assert level == "ok" and "vLLM serves policy in float32, with routed experts" in text
    assert fake.paused and all(call.method == "GET" for call in fake.calls)


def test_each_wrong_setting_is_a_line_with_its_flag(fake):
    fake.settings |= {"aux_output_config.enable_return_routed_experts": False, "max_model_len": 127}
    found = findings(fake)
    assert [level for level, _ in found] == ["error", "error"]
    for flag in ("--enable-return-routed-experts", "--max-model-len is 127"):
        assert sum(flag in text for _, text in found) == 1


def test_the_dtype_is_that_of_the_machine_where_the_job_runs(fake):
    fake.settings["model_config.dtype"] = "torch.bfloat16"
    [(level, text)] = findings(fake)
    assert level == "error" and "its dtype is bfloat16, but it is given weights in fp32" in text
    [(level, text)] = findings(fake, on_cpu=False)
    assert level == "ok"


def test_no_server_is_told_at_once(fake):
    fake.die()
    began = time.monotonic()
    [(level, text)] = findings(fake)
    assert level == "error" and "Connection refused" in text and time.monotonic() - began < 30
