"""The step model: counts against transformers and by hand, what must hold between topologies."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ds_moe import cli
from ds_moe.errors import UserError
from ds_moe.memory.predict import BUSY, KEPT_FREE
from tools.step_model import costs, links, machines, shapes
from tools.step_model import step_time as steps
from tools.step_model import sweep as sweeps

H100 = machines.MACHINES["h100-8x"]
BIG = shapes.PRESETS["qwen3-vl-30b-a3b"]
SMALL = shapes.Decoder("small", D=8, layers=2, heads=2, kv_heads=1, head_dim=6, F=10, E=4, K=2, vocabulary=20)
MEASURED = replace(H100, name="measured", peak_flops={"fp32": 1e10}, source="a test")


def topology(**changes):
    return costs.Topology(**({"nodes": 4, "devices_per_node": 8, "ep_size": 8, "checkpointing": True} | changes))


def transformers_model(decoder, device="meta", **changes):
    config = Qwen3MoeConfig(
        **{"hidden_size": decoder.D, "num_hidden_layers": decoder.layers, "num_attention_heads": decoder.heads},
        **{"num_key_value_heads": decoder.kv_heads, "head_dim": decoder.head_dim, "moe_intermediate_size": decoder.F},
        **{"num_experts": decoder.E, "num_experts_per_tok": decoder.K, "vocab_size": decoder.vocabulary},
        **{"tie_word_embeddings": decoder.tied, **changes},
    )
    with torch.device(device):
        return Qwen3MoeForCausalLM(config)


# --- counts


@pytest.mark.parametrize("name, total_b, active_b", [("30b-a3b", 30.5, 3.3), ("235b-a22b", 235, 22)])
def test_presets_have_the_parameters_of_their_names(name, total_b, active_b):
    decoder = shapes.PRESETS[f"qwen3-vl-{name}"]
    assert shapes.parameters(decoder) / 1e9 == pytest.approx(total_b, rel=0.01)
    assert shapes.active_parameters(decoder) / 1e9 == pytest.approx(active_b, rel=0.03)


@pytest.mark.parametrize(
    "decoder, changes",
    [
        (SMALL, {}),
        (replace(SMALL, tied=True), {}),
        (replace(SMALL, layers=3, dense_layers=1, dense_F=14), {"intermediate_size": 14, "mlp_only_layers": [1]}),
        (BIG, {}),
    ],
)
def test_parameters_are_those_of_transformers_and_of_its_config(decoder, changes, tmp_path):
    model = transformers_model(decoder, **changes)
    assert shapes.parameters(decoder) == sum(parameter.numel() for parameter in model.parameters())
    model.config.save_pretrained(tmp_path)
    assert shapes.read_decoder(str(tmp_path)) == replace(decoder, name=str(tmp_path / "config.json"))


def test_a_vision_language_config_is_read_by_its_text_part():
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "num_experts": 4}
    text |= {"hidden_size": 8, "moe_intermediate_size": 10, "num_experts_per_tok": 2, "vocab_size": 20}
    assert shapes.from_config({"text_config": text, "vision_config": {"depth": 3}}, "small") == SMALL


def test_flops_by_hand():
    """One token: 2 FLOPs a weight; its own key is the only one it sees."""
    projections = 8 * 12 + 2 * 8 * 6 + 12 * 8  # q, k and v, o
    layer = 2 * (projections + 8 * 4 + 2 * 3 * 8 * 10) + 4 * 2 * 6  # router, 2 experts, scores of 2 heads
    assert shapes.forward_flops(SMALL, tokens=1, sequence=1) == 2 * layer + 2 * 8 * 20
    assert shapes.score_flops(SMALL, tokens=3, sequence=3) == 4 * 2 * 6 * (1 + 2 + 3)


def test_flops_are_those_that_torch_counts():
    model = transformers_model(SMALL, "cpu", attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(2 * 5).view(2, 5)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    every_key = SMALL.layers * (4 * 10 * 5 * 12 - shapes.score_flops(SMALL, 10, 5))  # eager attention skips no key
    rotary = counter.get_total_flops() - 3 * (shapes.forward_flops(SMALL, 10, 5) + every_key)
    assert rotary == pytest.approx(0, abs=2 * 10 * SMALL.head_dim)  # the angles: a product of its own


@pytest.mark.parametrize("ep_size", (1, 2))
def test_operations_hold_the_flops_of_the_forward(ep_size):
    for decoder in (SMALL, BIG, replace(SMALL, layers=3, dense_layers=1, dense_F=14)):
        work = costs.operations(topology(ep_size=ep_size, tokens=512, sequence=128), decoder)
        total = sum(operation.count * operation.forward * operation.flops for operation in work)
        assert total == pytest.approx(shapes.forward_flops(decoder, 512, 128), rel=1e-12)


def test_an_expert_with_few_rows_costs_the_reading_of_its_weights():
    def experts(tokens):
        work = costs.operations(topology(tokens=tokens, sequence=1), BIG)
        return [operation for operation in work if operation.name == "experts"]

    few, many = experts(8), experts(8192)
    assert all(flops_s < bytes_s for flops_s, bytes_s in (costs.roofline_s(each, H100, "bf16") for each in few))
    assert all(flops_s >= bytes_s for flops_s, bytes_s in (costs.roofline_s(each, H100, "bf16") for each in many))
    weights = 2 * 16 * 3 * BIG.D * BIG.F  # bytes of 16 experts
    assert weights < sum(operation.bytes for operation in few) < 1.1 * weights
    one = experts(1)  # 8 rows: no more than 8 experts are read
    assert sum(operation.bytes for operation in one) < 0.51 * sum(operation.bytes for operation in few)


# --- collectives


def test_groups_stand_where_deepspeed_puts_them():
    assert links.ep_group(topology(ep_size=8)) == links.Group(8, 8)
    assert links.edp_group(topology(ep_size=8)) == links.Group(4, 1)
    assert links.ep_group(topology(ep_size=16)) == links.Group(16, 8)
    assert links.edp_group(topology(ep_size=2)) == links.Group(16, 4)
    assert links.dp_group(topology()) == links.Group(32, 8)
    assert links.ep_group(topology(nodes=2, devices_per_node=6, ep_size=4)).neighbours == 2  # ranks 4 5 | 6 7
    assert links.Group(16, 8).remote == 0.5 and not links.Group(8, 8).crosses


def test_collectives_by_hand():
    machine = replace(H100, intra=machines.Link(100.0, 0.0), inter=machines.Link(10.0, 0.0))
    assert links.all_to_all_s(800, links.Group(8, 8), machine) == pytest.approx(800 * 7 / 8 / 100)
    assert links.all_to_all_s(800, links.Group(16, 8), machine) == pytest.approx(800 / 2 / 10)
    assert links.gather_s(800, links.Group(16, 8), machine) == pytest.approx(800 * 15 / 16 / (8 * 10))
    assert links.gather_s(800, links.Group(16, 1), machine) == pytest.approx(800 * 15 / 16 / 10)
    assert links.all_reduce_s(800, links.Group(8, 8), machine) == pytest.approx(2 * 800 * 7 / 8 / 100)
    slow = replace(machine, intra=machines.Link(math.inf, 1.0))
    assert links.gather_s(800, links.Group(8, 8), slow, messages=5) == 5 * 3
    assert links.all_to_all_s(800, links.Group(1, 1), slow) == links.gather_s(800, links.Group(1, 1), slow) == 0


def seconds(result, bound, names=""):
    return sum(term.total_s(1) for term in result.terms if term.bound == bound and names in term.name)


def test_what_is_sent():
    one = steps.estimate(topology(ep_size=1), BIG, H100)
    assert seconds(one, steps.EXCHANGE) == 0 < seconds(one, steps.ZERO, "experts")
    all_ranks = steps.estimate(topology(ep_size=32), BIG, H100)
    assert seconds(all_ranks, steps.EXCHANGE) > 0 == seconds(all_ranks, steps.ZERO, "experts")
    alone = steps.estimate(topology(nodes=1, devices_per_node=1, ep_size=1), BIG, H100)
    assert seconds(alone, steps.EXCHANGE) == seconds(alone, steps.ZERO) == 0


def test_zero_stages_differ_in_when_they_send():
    def term(stage, name):
        terms = steps.estimate(topology(zero_stage=stage, accumulation=4), BIG, H100).terms
        return next(term for term in terms if term.name == name)

    first, second = term(1, "all-reduce of others"), term(2, "all-reduce of others")
    assert first.last_s == second.backward_s > 0 == first.backward_s
    assert second.total_s(4) == pytest.approx(4 * first.total_s(4))
    gather = term(3, "all-gather of others")
    assert gather.forward_s >= gather.backward_s > 0 == gather.step_s < term(1, "all-gather of others").step_s


def test_zero_3_gathers_a_small_model_once():
    assert steps.layers_kept(topology(), shapes.PRESETS["tiny-64"]) == 4
    assert steps.layers_kept(topology(ep_size=1), BIG) == 1  # the last layer, right before its backward pass
    assert steps.layers_kept(topology(ep_size=1), shapes.PRESETS["qwen3-vl-235b-a22b"]) == 0


# --- times


def test_full_overlap_is_never_slower_and_never_faster_than_what_it_must_do():
    for ep_size, stage, accumulation in ((1, 3, 1), (8, 3, 2), (8, 1, 3), (16, 2, 1), (32, 3, 1)):
        result = steps.estimate(topology(ep_size=ep_size, zero_stage=stage, accumulation=accumulation), BIG, H100)
        bounds = result.bounds(accumulation)
        assert sum(bounds.values()) == pytest.approx(result.step_s)
        work = bounds["FLOPs"] + bounds["memory traffic"] + bounds["optimizer"] + bounds.get("all-to-all", 0)
        assert work * (1 - 1e-12) <= result.step_overlap_s <= result.step_s
        assert result.mfu <= result.mfu_overlap < 1
        assert result.tokens_per_s == pytest.approx(32 * 4096 * accumulation / result.step_s)


@pytest.mark.parametrize("ep_size, stage", [(1, 3), (8, 1), (32, 3)])
def test_time_and_memory_grow_with_tokens(ep_size, stage):
    asked = [topology(ep_size=ep_size, zero_stage=stage, tokens=tokens, sequence=1) for tokens in (1, 7, 64, 999, 8192)]
    results = [steps.estimate(each, BIG, H100) for each in asked]
    times, sizes = [result.step_s for result in results], [total(each) for each in asked]
    assert times == sorted(set(times))
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]  # with few tokens the optimizer's step needs most
    overlapped = [result.step_overlap_s for result in results]
    assert overlapped == sorted(overlapped)  # with few tokens ZeRO's collectives hide all differences


def test_the_busiest_rank_holds_up_all():
    even, uneven = (steps.estimate(topology(max_vio=vio), BIG, H100) for vio in (0.0, 0.5))
    assert uneven.step_s > even.step_s
    rows = [seconds(result, steps.COMPUTE, "experts") for result in (even, uneven)]
    assert rows[1] == pytest.approx(1.5 * rows[0])
    assert costs.busiest_rows(topology(max_vio=99.0), BIG) == 8 * 4096 * BIG.K  # all rows of the EP group
    assert costs.busiest_rows(topology(max_vio=99.0, ep_size=1), BIG) == 4096 * BIG.K


def test_checkpointing_trades_time_for_memory():
    off, on = topology(checkpointing=False), topology()
    slower, faster = (steps.estimate(each, BIG, H100) for each in (on, off))
    assert slower.step_s > faster.step_s and slower.mfu < faster.mfu
    assert total(on) < total(off)
    assert {term.name: term.again_s for term in slower.terms}["lm_head"] == 0


# --- memory


def total(asked, decoder=BIG):
    return sum(sweeps.memory(asked, decoder, H100).values())


@pytest.mark.parametrize("ep_size", (1, 2, 8, 32))
@pytest.mark.parametrize("name", ["qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b"])
def test_a_higher_zero_stage_needs_no_more_memory(name, ep_size):
    asked = topology(ep_size=ep_size, dtype="fp32")  # in bf16 the shipped JSONs sum in fp32 under ZeRO-2 and 3 alone
    sizes = [total(replace(asked, zero_stage=stage), shapes.PRESETS[name]) for stage in (3, 2, 1)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("ep_size, stage, words", [(8, 3, ["--checkpointing"]), (1, 1, []), (4, 2, [])])
def test_memory_is_what_the_doctor_s_plan_says(ep_size, stage, words, tmp_path, capsys):
    transformers_model(BIG).config.save_pretrained(tmp_path)
    asked = topology(ep_size=ep_size, zero_stage=stage, checkpointing=bool(words), tokens=8192)
    options = ["--gpus", "32", "--ep-size", str(ep_size), "--zero", str(stage), "--micro-batch", "2", *words]
    assert cli.main(["plan", str(tmp_path), *options, "--json", str(tmp_path / "plan.json")]) == 0
    [plan] = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert sweeps.memory(asked, BIG, H100) == plan["device_bytes"]
    assert sweeps.fits(plan["device_bytes"], 80 * 2**30) is plan["fits"]
    assert not sweeps.fits({"all": 91.0}, 100.0) and sweeps.fits({"all": 90.0}, 100.0)
    roomy = replace(H100, runtime=2.0**31)
    assert sweeps.memory(asked, BIG, roomy)["runtime"] == 2**31


def test_a_cpu_keeps_what_it_frees():
    asked = topology(ep_size=2, dtype="fp32", nodes=1, devices_per_node=2)
    assert sweeps.memory(asked, SMALL, replace(MEASURED, name="cpu"))[KEPT_FREE] > 0
    assert KEPT_FREE not in sweeps.memory(asked, SMALL, MEASURED)


# --- sweep


def test_the_best_of_a_sweep_is_the_best_of_all():
    asked = topology(tokens=16384, devices_per_node=8)
    points = sweeps.sweep(asked, BIG, H100, (8, 16, 64))
    assert [p.topology.ep_size for p in points[16]] == [1, 2, 4, 8, 16]
    for count, row in points.items():
        fastest, size = 0.0, None
        for ep_size in range(1, 129):
            each = replace(asked, nodes=count // 8, ep_size=ep_size)
            try:
                result = steps.estimate(each, BIG, H100)
            except UserError:
                continue
            if total(each) <= BUSY * H100.memory and result.tokens_per_s > fastest:
                fastest, size = result.tokens_per_s, ep_size
        winner = sweeps.best(row)
        assert (winner and winner.topology.ep_size) == size
    assert sweeps.best(points[8]) is None  # 16,384 tokens: their logits alone need 25 GB
