"""Predicted memory against counts by hand and, for what autograd keeps, against what it really saves."""

import inspect
from math import ceil, log2
from unittest import mock

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch.autograd.graph import saved_tensors_hooks

from ds_moe.config.deepspeed import zero_plan
from ds_moe.config.run import RunConfig
from ds_moe.config.zero_plan import ZeroPlan
from ds_moe.engine.activation_offload import KEPT_LAYERS, LAYERS_ON_THE_WAY
from ds_moe.engine.flat_matrices import BUCKET
from ds_moe.memory import predict as memories
from ds_moe.memory.activations import INPUTS_ON_DEVICE, activations
from ds_moe.memory.parameter_counts import EXPERT_GROUP, count_parameters
from ds_moe.memory.predict import predict, predict_loading
from ds_moe.memory.rows import largest_row
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.families import family_of
from ds_moe.models.freeze import set_trainable
from ds_moe.models.load import build_outline
from ds_moe.models.presets import preset_config
from ds_moe.moe.all_to_all import ExpertParallel
from ds_moe.moe.backends import Permutation
from ds_moe.moe.dispatch import Dispatcher


def run(preset: str = "tiny-moe", **sections) -> RunConfig:
    data = {"train": "x", "max_length": 64, **sections.pop("data", {})}
    size = {"tokens_per_micro_batch": 128} if data.get("packing") else {"micro_batch_size": 2}
    train = {**size, "global_batch_size": 8, "steps": 1, **sections.pop("train", {})}
    moe = {"ep_size": 2, **sections.pop("moe", {})}
    return RunConfig(model={"preset": preset}, data=data, moe=moe, train=train, deepspeed="zero.json", **sections)


def zero(stage: int = 3, bf16: bool = False, **keys) -> ZeroPlan:
    return zero_plan({"zero_optimization": {"stage": stage, **keys}, "bf16": {"enabled": bf16}})


def outline(config: RunConfig):
    model = build_outline(preset_config(config.model.preset))
    set_trainable(model, config)
    return model


def predicted(config: RunConfig, ds: ZeroPlan, world_size: int = 4, on_cpu: bool = True) -> memories.Memory:
    return predict(outline(config), config, ds, world_size, on_cpu)


def total(config: RunConfig, ds: ZeroPlan, on_cpu: bool = False) -> int:
    return sum(predicted(config, ds, on_cpu=on_cpu).device.values())


def counts(model) -> tuple[int, int]:
    """(experts, all else)."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    return experts, sum(p.numel() for p in model.parameters()) - experts


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_are_counted_exactly(stage):
    """Experts are spread over all ranks of EP x EDP, the rest over all ranks of DP, by ZeRO stage."""
    experts, rest = counts(outline(run()))
    owned, held = (experts + rest) / 4, rest + experts / 2
    found = predicted(run(), zero(stage)).device
    assert found["weights"] == pytest.approx(4 * (owned if stage == 3 else held), abs=4)
    assert found["optimizer"] == pytest.approx(12 * owned, abs=4)
    assert found["runtime"] == memories.RUNTIME_BYTES["cpu"]


@pytest.mark.parametrize(("stage", "bf16", "copies"), [(1, False, 4), (2, False, 4), (3, False, 0), (3, True, 6)])
def test_the_step_holds_gradients_and_the_largest_group_in_fp32(stage, bf16, copies):
    """In bf16 flattened before it is made fp32: 2 + 4 bytes an element. All experts of this model are one group. What
    ZeRO-3 sums in fp32, Adam reads where it is."""
    config, ds = run(), zero(stage, bf16, reduce_bucket_size=1000)
    model = outline(config)
    experts, rest = counts(model)
    parts = _moments(config, ds, model)["the optimizer steps"]
    width = 2 if bf16 else 4
    assert parts["gradients"] == width * (experts + rest) / 4
    assert parts["fp32 gradient of step"] == copies * max(experts, rest) / 4
    limited = _moments(config, zero(3, True, sub_group_size=500), model)["the optimizer steps"]
    assert limited["fp32 gradient of step"] == 6 * 500


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-vl-moe"])
@pytest.mark.parametrize("limit", [10**9, 30_000, 12_000])
def test_experts_form_the_groups_that_deepspeed_makes_of_them(preset, limit, monkeypatch):
    """The largest of them, over the ranks that share it; `limit` cuts within and between layers."""
    split = split_params_into_different_moe_groups_for_optimizer
    assert inspect.signature(split).parameters["max_group_size"].default == EXPERT_GROUP
    monkeypatch.setattr("ds_moe.memory.parameter_counts.EXPERT_GROUP", limit)
    model = family_of(built := preset_config(preset)).model_class(built)
    convert(model, run(moe={"ep_size": 1}).moe, ExpertParallel())
    for layer in moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name = False, "ep_size_1"
    params = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    groups = [group for group in split([{"name": "matrices", "params": params}], limit) if group.get("moe")]
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    assert (len(sizes) > 2) == (limit < 10**6)
    found = count_parameters(build_outline(built), 1, 4)
    assert found.expert_group == max(sizes) / 4
    assert found.group == max(found.expert_group, found.dense_trained)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_has_one_moment_of_hidden_matrices_and_works_with_a_block(stage):
    adamw, muon = (run(train={"optimizer": name}) for name in ("adamw", "muon"))
    left = ("embed_tokens", "lm_head", "norm", ".mlp.gate.")
    named = outline(muon).named_parameters()
    matrices = sum(p.numel() for name, p in named if not any(part in name for part in left))
    theirs, ours = (predicted(config, zero(stage)) for config in (adamw, muon))
    assert theirs.device["optimizer"] - ours.device["optimizer"] == 4 * matrices / 4
    assert memories.MUON_BUCKET == BUCKET
    few = memories._orthogonalised(matrices / 4, 1000, zero(stage), 4)  # all are sent at once, the largest is at work
    many = memories._orthogonalised(1e12, 1e12, zero(stage, True), 4)
    assert (few, many) == (4 * matrices / 4 + 20 * 1000, 16 * BUCKET / 4)


def _moments(config: RunConfig, ds: ZeroPlan, model, on_cpu: bool = True, world_size: int = 4) -> dict:
    ep_size = config.moe.ep_size
    mine, made = count_parameters(model, ep_size, world_size), activations(model, config, ds.width, ep_size)
    return memories._moments(mine, ds, made, config, world_size, on_cpu)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_norm_takes_a_copy_of_one_gradient_in_fp64(stage):
    """Below ZeRO-3, where one rank may own the largest parameter whole; ours of ZeRO-3 makes none."""
    config, model = run(moe={"ep_size": 4}), outline(run())
    sizes = {name: p.numel() / (4 if ".mlp.experts." in name else 1) for name, p in model.named_parameters()}
    experts, rest = counts(model)
    copied = _moments(config, zero(stage), model)["the gradient norm is taken"]["fp64 copy of a gradient"]
    assert copied == (0 if stage == 3 else 8 * min(max(sizes.values()), max(rest, experts) / 4))


def test_gradients_at_the_end_of_backward_by_stage():
    """ZeRO-1 has all of its copy's, and on an accelerator its partition besides; the others what is not yet reduced."""
    config, model = run(), outline(run())
    experts, rest = counts(model)
    held, owned = rest + experts / 2, (experts + rest) / 4
    mine = count_parameters(model, 2, 4)
    unreduced = max(mine.largest.trained, mine.table_trained)
    wanted = {1: held, 2: owned + unreduced, 3: owned + unreduced}
    for stage, elements in wanted.items():
        assert _moments(config, zero(stage), model)["the backward pass ends"]["gradients"] == 4 * elements
    accelerator = _moments(config, zero(1), model, on_cpu=False)["the backward pass ends"]
    assert accelerator["gradients"] == 4 * (held + owned)
    two = run(train={"global_batch_size": 16})  # two micro-batches: the first one's gradients wait
    head = mine.table_trained  # of the second one, just made
    for one, stage, elements in ((two, 1, held), (two, 2, owned), (config, 2, 0)):
        assert _moments(one, zero(stage), model)["the loss goes back"]["gradients"] == 4 * (elements + head)


def test_buckets_are_whole_on_accelerators_and_filled_on_cpus():
    model, ds = outline(run()), zero(3, reduce_bucket_size=10**7)
    held = count_parameters(model, 2, 4).held
    assert _moments(run(), ds, model)["the backward pass ends"]["gradient buckets"] == 8 * held
    whole = _moments(run(), ds, model, on_cpu=False)["the backward pass ends"]["gradient buckets"]
    assert whole == 4 * (10**7 + held)


def test_experts_without_a_replica_are_not_gathered():
    model = outline(run())
    experts, rest = counts(model)
    assert count_parameters(model, 2, 2).gathered == rest
    assert count_parameters(model, 2, 4).gathered == rest + experts / 2


def test_zero3_keeps_what_it_reuses_soon():
    model, experts_rest = outline(run()), sum(counts(outline(run(moe={"ep_size": 1}))))
    mine = count_parameters(model, 1, 4)
    everything = memories._gathered(mine, zero(), repeats=False)
    assert everything == mine.gathered == experts_rest
    nothing = memories._gathered(mine, zero(stage3_max_reuse_distance=0), repeats=False)
    assert nothing == max(2 * mine.largest.gathered, mine.table) < everything


def test_offloaded_states_are_on_the_host():
    experts, rest = counts(outline(run()))
    owned = (experts + rest) / 4
    found = predicted(run(), zero(3, bf16=True, offload_optimizer={"device": "cpu"}), on_cpu=False)
    assert found.host == {"optimizer": int(12 * owned), "gradients": int(2 * owned), "fp32 gradient of step": 4 * owned}
    assert "optimizer" not in found.device
    both = zero(3, bf16=True, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"})
    assert predicted(run(), both, on_cpu=False).host["weights"] == int(2 * owned)


def test_the_starting_policy_is_a_copy_of_the_weights_on_the_host():
    rl = {"kl_weight": 0.1, "engine": {"kind": "local"}}
    with_copy, without = (run(task="rl", rl={**rl, "kl_weight": weight}) for weight in (0.1, 0.0))
    for on_cpu in (False, True):
        copied, plain = (predicted(one, zero(3), on_cpu=on_cpu) for one in (with_copy, without))
        where, before = (copied.device, plain.device) if on_cpu else (copied.host, plain.host)
        assert where.pop("starting policy") == copied.device["weights"] and where == before
    lora = {"rank": 2, "targets": ["q_proj"]}
    assert "starting policy" not in predicted(run(task="rl", rl=rl, lora=lora), zero(3), on_cpu=False).host


def test_lora_trains_its_updates_alone():
    config = run(lora={"rank": 4, "experts": True})
    trained = sum(p.numel() for p in outline(config).parameters() if p.requires_grad)
    found = predicted(config, zero(3))
    assert found.device["optimizer"] == pytest.approx(12 * trained / 4, abs=4)
    assert found.device["optimizer"] < predicted(run(), zero(3)).device["optimizer"] / 5


def test_memory_shrinks_with_what_should_shrink_it():
    vl, bf16 = "tiny-vl-moe", zero(3, bf16=True)
    usual = total(run(vl), bf16)
    assert total(run(vl, train={"gradient_checkpointing": True}), bf16) < usual
    assert total(run(vl, train={"micro_batch_size": 1}), bf16) < usual
    frozen = run(vl)
    frozen.model.freeze = ["vision"]
    assert total(frozen, bf16) < usual
    assert total(run(vl), zero(3, bf16=True, offload_optimizer={"device": "cpu"})) < usual
    recompute = [total(run(vl, moe={"experts": {"recompute": what}}), bf16) for what in ("all", "act", "none")]
    assert recompute[0] < recompute[1] == usual < recompute[2]
    assert total(run(vl, moe={"experts": {"backend": "reference"}}), bf16) > recompute[2]


def test_rows_travel_only_between_ranks():
    def made(ep_size: int):
        return activations(outline(run()), run(moe={"ep_size": ep_size}), 4, ep_size)

    text = preset_config("tiny-moe")
    assert made(2).exchange == 2 * 2 * 64 * text.num_experts_per_tok * text.hidden_size * 4
    assert made(1).exchange == 0 and made(1).kept == made(2).kept


def test_logits_are_those_of_a_tile(monkeypatch):
    """Bounded however long the micro-batch is; what grows is the gradient of hidden states."""
    text = preset_config("tiny-moe")

    def logits(tokens: int, width: int = 2, on_cpu: bool = False) -> int:
        config = run(data={"packing": True}, train={"tokens_per_micro_batch": tokens})
        return activations(outline(config), config, width, 1, on_cpu).logits - tokens * width * text.hidden_size

    assert logits(64) == 64 * text.vocab_size * (2 + 2)
    assert logits(64, on_cpu=True) == 64 * text.vocab_size * (2 + 2 + 8)
    monkeypatch.setattr("ds_moe.memory.activations.ACCELERATOR_TILE_BYTES", 2 * 1000 * text.vocab_size + 1)
    assert logits(64) == 64 * text.vocab_size * 4
    assert logits(2000) == logits(200_000) == 1000 * text.vocab_size * 4
    assert logits(2000, width=4) == 500 * text.vocab_size * 8


def test_a_packed_row_counts_by_its_tokens():
    padded, packed = run(), run(data={"packing": True})
    one, other = (activations(outline(config), config, 4, 2) for config in (padded, packed))
    assert (one.logits, one.work, one.exchange) == (other.logits, other.work, other.exchange)
    shared = run(data={"packing": True}, train={"tokens_per_micro_batch": 256, "sequence_parallel": 2})
    assert activations(outline(shared), shared, 4, 2) == other  # two ranks share a row that is twice as long
    longer = run(data={"packing": True}, train={"tokens_per_micro_batch": 256})
    assert activations(outline(longer), longer, 4, 2).kept == 2 * other.kept
    # A step of 8 samples on 4 ranks may have several rows a rank: gradients wait between them.
    one, other = (
        _moments(config, zero(2), outline(config))["the loss goes back"]["gradients"] for config in (padded, packed)
    )
    assert one < other


def test_offload_moves_inputs_of_layers_to_the_host_of_gpus():
    def made(on_cpu: bool, preset: str = "tiny-vl-moe", **keys):
        config = run(preset, train={"gradient_checkpointing": True, **keys})
        return outline(config).config, activations(outline(config), config, 2, 2, on_cpu)

    model, kept = made(on_cpu=False)
    offloaded = made(on_cpu=False, offload_activations=True)[1]
    text, vision, T = model.get_text_config(), model.vision_config, 128
    patches = T * vision.spatial_merge_size**2 // 2
    on_device = vision.depth + text.num_hidden_layers - INPUTS_ON_DEVICE
    assert on_device > 0 == kept.moved
    assert kept.kept - offloaded.kept == 2 * on_device * patches * vision.hidden_size
    buffers = vision.depth * 2 ** ceil(log2(patches * vision.hidden_size))
    buffers += (text.num_hidden_layers - KEPT_LAYERS) * 2 ** ceil(log2(T * text.hidden_size))
    assert offloaded.moved == 2 * buffers
    assert made(on_cpu=True, offload_activations=True)[1] == made(on_cpu=True)[1]
    assert INPUTS_ON_DEVICE == KEPT_LAYERS + LAYERS_ON_THE_WAY
    config = run(train={"gradient_checkpointing": True, "offload_activations": True})
    assert predicted(config, zero(3, bf16=True), on_cpu=False).host["inputs of layers"] > 0


def test_the_longest_row_is_the_last_that_fits():
    config, ds = run(data={"packing": True}), zero(3, bf16=True)
    limit = total(run(data={"packing": True}, train={"tokens_per_micro_batch": 64 + 7 * 256}), ds)
    assert largest_row(config, lambda other: total(other, ds) <= limit) == 64 + 7 * 256
    assert largest_row(config, lambda other: total(other, ds) <= limit - 1) == 64 + 6 * 256
    assert largest_row(config, lambda other: False) is None
    assert largest_row(config, lambda other: True) > 10**6 - 256


@pytest.mark.parametrize("recompute", ["none", "act", "all"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-vl-moe"])
def test_activations_are_what_autograd_saves(preset, packing, recompute):
    """Distinct storages of a real forward, parameters aside, within 3% of the count: that of one more layer, so that
    what the ends of the model keep, and small things, do not blur it."""
    config = run(preset, moe={"ep_size": 1, "experts": {"recompute": recompute}}, data={"packing": packing})
    saved = []
    for layers in (2, 4):
        built = preset_config(preset)
        built.get_text_config().num_hidden_layers = layers
        saved.append(_saved_bytes(config, built))
    counted = activations(outline(config), config, 4, 1).layer
    assert (saved[1] - saved[0]) / 2 == pytest.approx(counted, rel=0.03)


def _saved_bytes(config: RunConfig, built) -> int:
    model = family_of(built).model_class(built).train()
    convert(model, config.moe, ExpertParallel())
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    def planned(dispatcher: Dispatcher, *decision) -> Permutation:
        """The functions that move rows keep its indices beside what autograd saves."""
        permutation = permuted(dispatcher, *decision)
        for indices in permutation[:-1]:
            pack(indices)
        return permutation

    permuted = Dispatcher.permutation
    ids_BS, packed = torch.randint(10, 200, (2, config.data.max_length)), {}
    if config.data.packing:  # five samples
        attend_by_sample(model)
        ids_BS, lengths = ids_BS.reshape(1, -1), [50, 10, 30, 8, 30]
        positions = torch.cat([torch.arange(length) for length in lengths])
        packed = {"position_ids": positions.expand(*((4, 1) if hasattr(built, "vision_config") else (1,)), -1)}
        packed["cu_seq_lens_q"] = packed["cu_seq_lens_k"] = torch.tensor([0, *lengths]).cumsum(0).int()
    with saved_tensors_hooks(pack, lambda tensor: tensor), mock.patch.object(Dispatcher, "permutation", planned):
        loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False, **packed).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_a_term_left_out_is_noticed(monkeypatch):
    """Negative control of the comparison above: without what attention keeps, the count is off."""
    monkeypatch.setattr("ds_moe.memory.activations._attention", lambda *_: 0)
    with pytest.raises(AssertionError):
        test_activations_are_what_autograd_saves("tiny-moe", False, "act")


def test_freed_memory_is_kept_on_cpus_alone():
    config, ds = run(), zero(3)
    on_cpu, on_gpu = (predicted(config, ds, on_cpu=where) for where in (True, False))
    assert on_cpu.device[memories.KEPT_FREE] > 0 and memories.KEPT_FREE not in on_gpu.device
    from_files = run()
    from_files.model.preset, from_files.model.path = None, "somewhere"  # read into place: no copy is left behind
    streamed = predict(outline(config), from_files, ds, 4, on_cpu=True).device[memories.KEPT_FREE]
    assert on_cpu.device[memories.KEPT_FREE] - streamed == 4 * count_parameters(outline(config), 2, 4).held
    moments = {"early": {"a": 5.0, "b": 1.0}, "late": {"b": 4.0, "c": 2.0}}
    assert memories._kept_free(moments, moments["late"]) == 5 + 4 + 2 - 6


def test_the_start_holds_a_share_where_weights_are_streamed():
    model = outline(run())
    experts, rest = counts(model)
    whole = predict_loading(model, run(), zero(3, bf16=True), 4)
    assert (whole.host, whole.device, whole.streamed) == (2 * (experts + rest), 2 * rest + experts, False)
    streamed = run()
    streamed.model.preset, streamed.model.path = None, "somewhere"
    for stage, elements in ((2, rest + experts / 2), (3, (experts + rest) / 4)):
        found = predict_loading(model, streamed, zero(stage, bf16=True), 4)
        assert found.streamed and found.device == int(2 * elements)
        assert found.host == found.device + memories.READING_BYTES


def test_the_table_names_every_purpose_and_the_moment():
    memory = memories.Memory({"weights": 2**30, "nothing": 0}, {"optimizer": 2**31}, "the loss goes back")
    lines = memory.table()
    assert len(lines) == 3 and lines[0].split() == ["weights", "1.000", "GiB", "on", "the", "device"]
    assert "2.000 GiB  on the host" in lines[1] and lines[2].endswith("on the device, when the loss goes back")
