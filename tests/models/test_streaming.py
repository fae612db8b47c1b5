"""Weights read from their files row by row: the model that `from_pretrained` loads, and nothing more is read."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moe.config.moe import MoEConfig
from ds_moe.config.sections import LoRAConfig, ModelConfig
from ds_moe.errors import UserError
from ds_moe.models import stored_names, streaming
from ds_moe.models.convert import convert
from ds_moe.models.families import FAMILIES, TRAINED_BLOCKS, expert_state
from ds_moe.models.load import load_model
from ds_moe.models.lora import add_lora
from ds_moe.models.stored_names import HubNames, sources_of
from ds_moe.models.streaming import copy_range, read_unread
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.weights import files as weight_files
from ds_moe.weights.files import SafetensorsFiles
from ds_moe.weights.layouts import Joined, stored_rows
from ds_moe.weights.unread import is_unread
from tests.models.streamed import FORMS, change, file_of, write
from tests.models.test_convert import batch_for
from tests.models.test_families import slow_but
from tests.models.tiny_families import build

NAME = "model.language_model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoint"), request.param)


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    return write(tmp_path_factory.mktemp("checkpoint"), "vl hub")


def whole(parameter):
    parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
    return parameter.data.view(-1), 0


def prepared(folder, dtype, ep, unread, read_as=None, lora=None, moe=None):
    """A converted model, and the bytes read for it; `read_as` is the place in expert parallelism it reads for."""
    torch.manual_seed(1)
    model = load_model(ModelConfig(path=str(folder)), dtype, unread=unread)
    assert all(is_unread(parameter) == unread for parameter in model.parameters())
    if lora is not None:
        add_lora(model, lora, seed=2)
    if model.config.model_type != "qwen3_vl":
        convert(model, MoEConfig(ep_size=ep.size, **(moe or {})), ep)
    size = read_unread(model, SafetensorsFiles.find(str(folder)), read_as or ep, whole) if unread else 0
    return model, size


def differing(ours, theirs):
    """Names of parameters and buffers that are not equal in value, dtype and order."""
    pairs = []
    for kind in ("named_parameters", "named_buffers"):
        one, other = (list(getattr(model, kind)()) for model in (ours, theirs))
        assert [name for name, _ in one] == [name for name, _ in other]
        pairs += [(name, a, b) for (name, a), (_, b) in zip(one, other, strict=True)]
    return [name for name, a, b in pairs if a.dtype != b.dtype or not a.is_contiguous() or not torch.equal(a, b)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_from_pretrained_bit_for_bit(folder, dtype):
    for ep in (ExpertParallel(8, 5), ExpertParallel(2, 0), ExpertParallel(2, 1), ExpertParallel()):
        (ours, size), (theirs, _) = (prepared(folder, dtype, ep, unread) for unread in (True, False))
        assert differing(ours, theirs) == []
        assert ours.training == theirs.training
        assert ours.config.to_dict() == theirs.config.to_dict()
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
        stored = 2 if dtype_of(folder) == torch.bfloat16 else 4
        assert size == stored * sum(parameter.numel() for parameter in ours.parameters())  # not one row of another
    for parameter in theirs.parameters():  # parts of mapped files, not aligned as memory is: products round otherwise
        parameter.data = parameter.data.clone()
    batch = batch_for(ours)
    assert torch.equal(ours(**batch).loss, theirs(**batch).loss)


def dtype_of(folder):
    return next(iter(load_file(next(folder.glob("*.safetensors"))).values())).dtype


def test_tied_embeddings_are_one_parameter(tmp_path):
    model, size = prepared(write(tmp_path, "tied"), torch.float32, ExpertParallel(), True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_the_comparison_notices_experts_of_another_rank(folder):
    """Negative control of the test above."""
    ep = ExpertParallel(2, 1)
    ours, _ = prepared(folder, torch.float32, ep, True, read_as=ExpertParallel(2, 0))
    theirs, _ = prepared(folder, torch.float32, ep, False)
    assert differing(ours, theirs) == [name for name, _ in theirs.named_parameters() if expert_state(name)]


def test_what_is_made_beside_unread_weights_is_real(vl):
    """LoRA of PEFT and of the experts, a router's noise and a loss-free bias: the same as beside weights in memory."""
    lora = LoRAConfig(rank=4, experts=True, train_router=True)
    moe = {"router": {"kind": "noisy_topk"}, "balance": [{"kind": "loss_free"}]}
    for ep in (ExpertParallel(), ExpertParallel(2, 1)):
        (ours, _), (theirs, _) = (
            prepared(vl, torch.bfloat16, ep, unread, lora=lora, moe=moe) for unread in (True, False)
        )
        assert differing(ours, theirs) == []
        added = {name for name, _ in ours.named_parameters() if "lora_" in name or ".lora." in name or "noise" in name}
        assert len(added) == 2 * (8 + 4 + 1)
        trained = [[p.requires_grad for p in model.parameters()] for model in (ours, theirs)]
        assert trained[0] == trained[1]


def test_an_unread_weight_takes_no_memory_and_poisons_what_uses_it(vl):
    model = load_model(ModelConfig(path=str(vl)), torch.bfloat16, unread=True)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == 8 and bool(parameter.isnan().all())
    for buffer in model.buffers():
        assert not is_unread(buffer) and not buffer.isnan().any()


@pytest.mark.parametrize("form", ["vl hub", "vl memory", "moe per expert", "moe stacked"])
def test_any_range_of_any_layout_in_blocks_of_any_size(form, tmp_path, monkeypatch):
    """ZeRO-3 shards begin and end within rows and within experts."""
    theirs = load_model(ModelConfig(path=str(write(tmp_path, form))), torch.float32)
    stored = SafetensorsFiles.find(str(tmp_path)).shapes
    sources = sources_of(theirs, theirs.state_dict(), stored)
    for block, mapped in itertools.product((1, 5000, 2**24), (0, 2**26)):
        monkeypatch.setattr(streaming, "BLOCK", block)
        monkeypatch.setattr(weight_files, "MAPPED", mapped)
        files = SafetensorsFiles.find(str(tmp_path))
        for name in (name for name, _ in theirs.named_parameters() if "layers.1.mlp" in name or "patch_embed" in name):
            weight = theirs.get_parameter(name).detach()
            rows = stored_rows(files, sources.get(name), weight.shape)
            total, width = weight.numel(), weight.shape[1:].numel()
            for start, stop in ((0, total), (1, total - 1), (total // 3, 2 * total // 3), (total - 1, total), (7, 7)):
                into = torch.empty(stop - start)
                copy_range(rows, width, start, into)
                assert torch.equal(into, weight.flatten()[start:stop]), (name, start, stop, block)


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    write(tmp_path, "vl memory")
    norm = "model.language_model.norm.weight"
    change(file_of(tmp_path, norm), lambda name, value: None if name == norm else value)
    change(file_of(tmp_path, NAME), lambda name, value: value[:, :-1] if name == NAME else value)
    save_file({**load_file(file_of(tmp_path, NAME)), "other.weight": torch.ones(2)}, file_of(tmp_path, NAME))
    for unread in (True, False):
        with pytest.raises(UserError, match="does not fit") as caught:
            load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=unread)
        message = str(caught.value)
        assert str(tmp_path) in message and "\n" not in message
        for kind, name in (("missing", norm), ("unexpected", "other.weight"), ("mismatched", NAME)):
            assert name in message.partition(f"{kind}_keys")[2].partition("]")[0]


def test_single_experts_that_cannot_be_stacked_are_named(tmp_path):
    write(tmp_path, "moe per expert")
    gone, cut = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (3, 6))
    change(file_of(tmp_path, gone), lambda name, value: None if name == gone else value)
    change(file_of(tmp_path, cut), lambda name, value: value[:, :-1] if name == cut else value)
    with pytest.raises(UserError, match=rf"does not fit Qwen3MoeForCausalLM: .*{gone}', '{cut}'\]"):
        load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=True)


@pytest.mark.parametrize("unread", [True, False])
def test_files_that_cannot_be_read(tmp_path, unread):
    write(tmp_path, "vl memory")
    file = file_of(tmp_path, NAME)
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(UserError, match=rf"model.path .*{tmp_path.name}.*{file.name} cannot be read"):
        load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=unread)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} cannot be read.*No such file"):
        load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=unread)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="is no index"):
        load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=unread)


def test_names_that_transformers_translates_are_streamed_too(tmp_path):
    """Here those of the model inside, without the prefix."""
    write(tmp_path, "moe stacked")
    expected = load_model(ModelConfig(path=str(tmp_path)), torch.float32)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(file).items()}, file)
    model = load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=True)
    assert all(is_unread(parameter) for parameter in model.parameters())
    read_unread(model, SafetensorsFiles.find(str(tmp_path)), ExpertParallel(), whole)
    assert differing(model, expected) == []


def test_rows_of_a_weight_that_files_hold_in_parts(tmp_path):
    parts = {name: torch.randn(rows, 3) for name, rows in (("q", 4), ("k", 1), ("v", 2))}
    save_file(parts, tmp_path / "model.safetensors")
    files, whole = SafetensorsFiles.find(str(tmp_path)), torch.cat(list(parts.values()))
    rows = stored_rows(files, Joined(("q", "k", "v")), whole.shape)
    assert all(torch.equal(rows(a, b), whole[a:b]) for a, b in itertools.combinations(range(8), 2))
    assert stored_rows(files, Joined(("q", "k")), whole.shape) is None


def test_what_cannot_be_streamed_is_loaded_complete(tmp_path, monkeypatch):
    """Weights that transformers would compute in another way than stacking tensors."""
    write(tmp_path, "moe per expert")
    expected = load_model(ModelConfig(path=str(tmp_path)), torch.float32)
    monkeypatch.setattr(stored_names, "_stacks", lambda operations: False)
    model = load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=True)
    assert not any(is_unread(parameter) for parameter in model.parameters())
    assert differing(model, expected) == []


# A bias, stacks, other names, a bias that is a frozen parameter, images, names that change together.
QUICK = {"glm4_moe", "gpt_oss", "mixtral", "ernie4_5_moe", "qwen3_5_moe", "kimi_linear", "kimi_k25"}
WITH_IMAGES = [name for name, family in FAMILIES.items() if family.vision and not family.measured]
COMPUTED = {"inkling2_text", "kimi_k25"}  # gate and up rows that interleave; one tensor that becomes three


@pytest.mark.parametrize("family", slow_but([*TRAINED_BLOCKS, *WITH_IMAGES], QUICK))
def test_a_family_whose_block_stays_is_streamed_and_written_as_its_hub_names_it(family, tmp_path):
    source, _ = build(family)
    source.save_pretrained(tmp_path)
    files = SafetensorsFiles.find(str(tmp_path))
    config = ModelConfig(path=str(tmp_path), attention="eager")
    for dtype, ep in ((torch.bfloat16, ExpertParallel()), (torch.float32, ExpertParallel(2, 1))):
        ours, theirs = (load_model(config, dtype, unread=unread) for unread in (True, False))
        assert any(map(is_unread, ours.parameters())) == (family not in COMPUTED)
        for model in (ours, theirs):
            convert(model, MoEConfig(ep_size=ep.size), ep)
        read_unread(ours, files, ep, whole)
        assert differing(ours, theirs) == []
    names = HubNames(source)
    weights = {name: value.detach() for name, value in source.state_dict().items()}
    written = [names.tensors({name: weights[name] for name in group}) for group in names.groups(weights)]
    in_files = {name: tensor for tensors in written for name, tensor in tensors.items()}
    assert in_files.keys() == files.shapes.keys() and len(in_files) == sum(map(len, written))
    assert all(torch.equal(in_files[name], files.read(name)) for name in in_files)


@pytest.mark.parametrize("unread", [False, True])
def test_a_pickle_is_not_read(tmp_path, unread):
    write(tmp_path, "moe stacked")
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError, match="has no weights in safetensors files"):
        load_model(ModelConfig(path=str(tmp_path)), torch.float32, unread=unread)
