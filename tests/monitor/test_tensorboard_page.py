"""A run's TensorBoard page: its plugins list what was logged, and a browser draws it."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ds_moe.config.run import RunConfig
from ds_moe.monitor.monitor import make_monitor
from ds_moe.monitor.reports import EvalReport, RoutingReport, ShownSample, StepReport
from tests.launcher import HANGS_S, free_port

CONFIG = {
    "model": {"preset": "tiny-vl-moe"},
    "data": {"train": "digits", "eval": "digits"},
    "moe": {"ep_size": 2, "balance": [{"kind": "aux", "weight": 0.001}]},
    "monitor": {"heatmap_every": 20},
    "deepspeed": "ds_configs/zero3.json",
}
QUESTIONS = ("Which digit is this?", "Is the number even or odd?", "Is it at least five?")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 steps in two processes' worth of monitors: the second one goes on from step 61 of the first one's 80."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    log_run(folder, first_step=1, last_step=80, finished=False)
    log_run(folder, first_step=61, last_step=100, finished=True)
    return folder


def log_run(folder: Path, first_step: int, last_step: int, finished: bool) -> None:
    rng = np.random.default_rng(first_step)
    config = RunConfig.model_validate(CONFIG)
    monitor = make_monitor(config, rank=0, total_steps=100, flops_per_token=1e6, peak_flops=1e10, run_dir=folder)
    monitor.start(first_step, "model  tiny-vl-moe\nranks  2", config.model_dump())
    skew_E = np.linspace(0.1, 2.5, 8)
    for step in range(first_step, last_step + 1):
        routing = None
        if monitor.is_log_step(step):
            image_LE = rng.poisson(400 * skew_E ** (1 - step / 200), (2, 8))
            text_LE = rng.poisson(250 * skew_E[::-1], (2, 8))  # its last expert stays nearly idle
            routing = RoutingReport(image_LE + text_LE, image_LE, 1.9, 2.0 + 1 / step)
        loss = 2.5 * np.exp(-step / 40) + 0.05 * rng.random()
        monitor.step(StepReport(step, loss, 3e-3 * (1 - step / 101), 1 + rng.random(), 1800, 32, 0.17, 0.004), routing)
        if step % 20 == 0:
            share = 1 - np.exp(-step / 40)
            accuracy = {"digit": share, "parity": share**0.5, "at_least_five": share**0.6, "mean": share**0.7}
            monitor.evaluated(EvalReport(step, loss, accuracy, shown_samples()))
    if finished:
        monitor.finish({"loss": "0.21", "accuracy": "0.93"})
    else:
        monitor.close()


def shown_samples() -> list[ShownSample]:
    scans, _ = load_digits(return_X_y=True)
    samples = []
    for i in range(4):
        scan = Image.fromarray((scans[i].reshape(8, 8) * 15).astype(np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        answer = (str(i), "odd" if i % 2 else "even", "no")[i % 3]
        samples.append(ShownSample(scan, QUESTIONS[i % 3], answer, answer if i else "6"))
    return samples


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Iterator[str]:
    """Address of a TensorBoard that serves the run and has read it."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir), "--host", "127.0.0.1"]
    log = run_dir.parent / "tensorboard.log"
    with log.open("w") as stream:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=stream, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + HANGS_S
        while not serves_the_run(address):
            assert server.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=HANGS_S)


def serves_the_run(address: str) -> bool:
    try:
        return "tensorboard" in ask(address, "/data/plugin/images/tags")
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(address: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=HANGS_S) as answer:
        return json.load(answer)


def test_plugins_are_active(page):
    listing = ask(page, "/data/plugins_listing")
    for plugin in ("scalars", "images", "text", "hparams", "timeseries"):
        assert listing[plugin]["enabled"], plugin


def test_scalars_are_listed(page):
    tags = ask(page, "/data/plugin/scalars/tags")["tensorboard"]
    assert set(tags) == {
        *("train/loss", "train/lr", "train/grad_norm", "train/skipped_steps"),
        *("eval/loss", "eval/accuracy", "eval/accuracy_digit", "eval/accuracy_parity", "eval/accuracy_at_least_five"),
        *("perf/tokens_per_s", "perf/step_s", "perf/data_wait_frac", "perf/mem_gib", "perf/mfu"),
        *("moe/max_vio", "moe/max_vio_text", "moe/max_vio_image", "moe/entropy", "moe/dead_experts", "moe/aux_loss"),
        *("moe/max_vio_layer_0", "moe/max_vio_layer_1", "moe/drop_rate", "moe/uncovered_tokens"),
    }


@pytest.mark.parametrize(
    "tag, steps", [("train/loss", [1, *range(10, 101, 10)]), ("eval/accuracy", [20, 40, 60, 80, 100])]
)
def test_a_resumed_curve_has_every_step_once(page, tag, steps):
    points = ask(page, f"/data/plugin/scalars/scalars?run=tensorboard&tag={tag}")
    assert [step for _, step, _ in points] == steps


def test_images_are_listed(page):
    tags = ask(page, "/data/plugin/images/tags")["tensorboard"]
    assert set(tags) == {"moe/expert_load", "eval/samples"}
    for tag in tags:
        shown = ask(page, f"/data/plugin/images/images?run=tensorboard&tag={tag}&sample=0")
        steps = [image["step"] for image in shown]  # maybe not all: these steps are faster than a picture is drawn
        assert steps == sorted(set(steps)) and steps[0] == 20 and steps[-1] == 100
        with urllib.request.urlopen(
            f"{page}/data/plugin/images/individualImage?{shown[-1]['query']}", timeout=HANGS_S
        ) as answer:
            picture = np.asarray(Image.open(answer))
        assert min(picture.shape[:2]) > 300 and picture.std() > 10


def test_hparams_list_the_resolved_config_and_its_metrics(page):
    experiment = ask(page, "/data/plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"moe.ep_size", "moe.router.kind", "train.lr", "deepspeed"} <= names
    groups = ask(
        page,
        "/data/plugin/hparams/session_groups",
        {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_RUNNING", "STATUS_UNKNOWN"],
            "colParams": [
                {"metric": {"tag": "eval/accuracy"}, "includeInResult": True},
                {"hparam": "moe.ep_size", "includeInResult": True},
            ],
            "startIndex": 0,
            "sliceSize": 10,
        },
    )["sessionGroups"]
    assert len(groups) == 1
    assert groups[0]["hparams"]["moe.ep_size"] == 2
    metrics = {value["name"]["tag"]: value for value in groups[0]["metricValues"]}
    assert metrics["eval/accuracy"]["trainingStep"] == 100


@pytest.mark.parametrize(
    "view, color",
    [
        ("scalars", (255, 112, 67)),  # the orange of the first run's curves
        ("images&tagFilter=expert_load", (5, 48, 97)),  # the heat map's blue for nearly idle experts
    ],
)
def test_a_browser_draws_it(page, view, color, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on PATH: the page's HTTP answers are checked, its look is not")
    screenshot = tmp_path / "page.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=20000 "
        "--window-size=1400,1000"
    ).split()
    subprocess.run(
        [chromium, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={screenshot}", f"{page}/#{view}"],
        check=True,
        capture_output=True,
        timeout=HANGS_S,
    )
    pixels = np.asarray(Image.open(screenshot).convert("RGB")).astype(int)
    assert pixels.shape == (1000, 1400, 3)
    assert pixels.std() > 10, "the page is blank"
    likeness = np.abs(pixels[:, 400:] - color).max(axis=2)  # right of the side bar
    assert (likeness < 12).sum() > 200, f"nothing of color {color} in the panel"
