"""The code of an exported folder's model card runs as it is written, with plain transformers alone."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from ds_moe.cli import main
from ds_moe.export.model import export_checkpoint
from ds_moe.models.convert import EXPERT_BIAS
from ds_moe.models.processor import load_processor
from tests.saved import save_untrained

QUESTIONS = {"vl": "What is in the picture?", "text": "What is a mixture of experts?"}  # of the cards
# ds_moe is installed in this environment; here its import fails, as on a machine that lacks it.
PLAIN = "import runpy, sys; sys.modules['ds_moe'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"


def snippets(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    (folder / "snippet.py").write_text(code)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if "transformers" in os.environ.get("PYTHONPATH", ""):  # `make test-transformers` has the newest one there
        environment["PYTHONPATH"] = str(Path(transformers.__file__).parents[1])
    command = [sys.executable, "-c", PLAIN, "snippet.py"]
    environment |= {"PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def ours(folder: Path, kind: str) -> str:
    """The same question, asked with the processor that runs are trained with."""
    processor = load_processor(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto")
    question: object = QUESTIONS[kind]
    if kind == "vl":
        question = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": question}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if kind == "vl":
        inputs = processor(text=text, images=[load_image(str(folder / "picture.png"))], return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 12 * 10 // 4  # of 37 x 50 pixels
    else:
        inputs = processor.tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=128)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


CASES = {
    "vl": ("tiny-vl-moe", "bf16"),
    "dense": ("tiny-vl-dense", "fp32"),
    "text": ("tiny-moe", "fp32"),
}
QUICK = ("text",)  # in `make test`


@pytest.fixture(
    scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def exported(request, tmp_path_factory) -> tuple[Path, str]:
    preset, precision = CASES[request.param]
    folder = tmp_path_factory.mktemp("exported")
    moe = None if request.param == "dense" else {}
    sections = "" if moe is None else "moe: {}\n"
    checkpoint = save_untrained(folder / "run", preset, sections, moe, precision=precision)
    export_checkpoint(checkpoint, folder / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "out" / "picture.png")
    return folder / "out", "text" if request.param == "text" else "vl"


def test_the_code_of_the_card_answers_as_the_trained_model_does(exported):
    folder, kind = exported
    *with_torchvision, code = snippets(folder)
    status, answer, errors = run(code, folder)
    assert status == 0, errors
    expected = ours(folder, kind)
    assert answer == f"{expected}\n" and len(expected) > 20
    assert len(with_torchvision) == (kind == "vl")
    for other in with_torchvision:
        status, answer, errors = run(other, folder)
        if find_spec("torchvision") is not None:
            assert answer == f"{expected}\n", errors
        else:  # which is why there is the other one; when this fails, one snippet is enough
            assert status == 1 and "requires the Torchvision library" in errors


@pytest.mark.slow
def test_a_snippet_with_too_few_image_tokens_is_noticed(tmp_path):
    """Negative control: the comparison above runs what is written."""
    export_checkpoint(save_untrained(tmp_path / "run", "tiny-vl-dense"), tmp_path / "out")
    Image.new("RGB", (37, 50)).save(tmp_path / "out" / "picture.png")
    code = snippets(tmp_path / "out")[1]
    assert "merge_size**2" in code
    status, _, errors = run(code.replace("merge_size**2", "merge_size**3"), tmp_path / "out")
    assert status == 1 and "shape mismatch" in errors.splitlines()[-1]


def test_a_snippet_that_needs_ds_moe_is_noticed(tmp_path):
    status, _, errors = run("import ds_moe.models.load", tmp_path)
    assert status == 1 and "ds_moe" in errors.splitlines()[-1]


def test_routing_that_differs_is_said_on_the_terminal_and_in_the_card(tmp_path, capsys):
    moe = {"router": {"route_scale": 2.5}, "balance": [{"kind": "loss_free"}]}
    sections = "moe: {router: {route_scale: 2.5}, balance: [{kind: loss_free}]}\n"
    save_untrained(tmp_path / "run", "tiny-vl-moe", sections, moe)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert said.startswith("note: plain transformers cannot repeat moe.router.route_scale 2.5, moe.balance loss_free:")
    assert said.removeprefix("note: p") in card and (tmp_path / "out" / EXPERT_BIAS).is_file() and EXPERT_BIAS in card
    save_untrained(tmp_path / "plain", "tiny-vl-moe", "moe: {}\n", {})
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "plain_out")]) == 0
    assert "note: " not in capsys.readouterr().out
    assert "## Routing" not in (tmp_path / "plain_out" / "README.md").read_text()
