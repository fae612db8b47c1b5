"""The RL task on one process without an engine: what it scores, where routing and log-probs belong, what it reports."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ds_moe.checkpoint.progress import Progress
from ds_moe.config.moe import MoEConfig
from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.distributed import Topology
from ds_moe.models.attention import attend_by_sample
from ds_moe.models.convert import convert, moe_layers
from ds_moe.models.presets import build_preset
from ds_moe.moe.tape import checkpoint_contexts
from ds_moe.replay.record import RoutingRecorder, joined
from ds_moe.tasks.rl import task as task_module
from ds_moe.tasks.rl.rollouts import Outcome, RolloutBatch
from ds_moe.tasks.rl.task import PolicyOptimization
from ds_moe.tasks.task import TrainingParts

LAYERS, EXPERTS, TOP_K = 2, 8, 2
FIRST_STEP = Progress(total_steps=10, step=1)  # the first of a rollout file is done


class Model:
    """A converted tiny model in the place of an engine."""

    def __init__(self, checkpointing=False):
        self.module = build_preset("tiny-moe").train()
        convert(self.module, MoEConfig(replay={"enabled": True}))
        if checkpointing:
            self.module.activation_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})

    def __call__(self, **inputs):
        return self.module(**inputs)

    def __getattr__(self, name):
        return getattr(self.module, name)


CPU = Topology(rank=0, world_size=1, local_rank=0, ep_size=1, device=torch.device("cpu"))


def task(model, stream=(), replay=True, note=print, **rl):
    """The task of a run of this model, with the `rl` section."""
    config = RunConfig(
        task="rl",
        model={"preset": "tiny-moe"},
        data={"train": "rollouts.jsonl"},
        moe={"replay": {"enabled": True}} if replay else None,
        rl=rl,
        deepspeed="none",
    )
    return PolicyOptimization(TrainingParts(config, CPU, model, None, stream=stream, note=note))


def rollouts(seed=0):
    """Two sequences, the second shorter, the third without routing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(300, (3, 9), generator=generator)
    attention = torch.ones(3, 9, dtype=torch.int64)
    attention[1, 7:] = 0
    completion = torch.zeros(3, 9, dtype=torch.bool)
    completion[:, 4:] = attention[:, 4:].bool()
    routing = torch.rand(3, 9, LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K].to(torch.int16)
    routing[:, -1] = -1
    routing[1, 6:] = -1
    routing[2] = -1
    inputs = {"input_ids": ids, "attention_mask": attention, "routing": routing}
    return RolloutBatch(
        **vars(Batch.of_rows(inputs, ids.where(completion, NO_LOSS))),
        completion_BS=completion,
        engine_BS=-torch.rand(3, 9, generator=generator),
        advantage_B=torch.tensor([1.0, -0.5, 2.0]),
        reward_B=torch.tensor([1.0, 0.0, float("nan")]),
    )


def routed(batch, routing):
    """The same batch with another routing."""
    return replace(batch, inputs={**batch.inputs, "routing": routing})


def gradients(model):
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


def slow(model, batch, weight):
    """REINFORCE token by token on unpadded sequences, with the expert term of `joint`: the on-policy gradient."""
    total = 0.0
    for row in range(3):
        length = int(batch.inputs["attention_mask"][row].sum())
        ids, routing = (
            batch.inputs["input_ids"][row : row + 1, :length],
            batch.inputs["routing"][row : row + 1, :length],
        )
        output = model(input_ids=ids, routing=routing, output_router_logits=True)
        logits, router_logits = output.logits[0], output.router_logits
        values = []
        for t in range(1, length):
            if not batch.completion_BS[row, t]:
                continue
            value = logits[t - 1].log_softmax(-1)[ids[0, t]]
            if weight and routing[0, t - 1, 0, 0] >= 0:
                expert = [
                    router_logits[layer][t - 1].log_softmax(-1)[int(routing[0, t - 1, layer, k])]
                    for layer, k in itertools.product(range(LAYERS), range(TOP_K))
                ]
                value = value + weight * torch.stack(expert).mean()
            values.append(value * batch.advantage_B[row])
        total = total - torch.stack(values).mean()
    (total / 3).backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("router", ["none", "router_shift", "joint"])
def test_the_gradient_on_policy_is_the_policy_gradient_under_the_replayed_routing(router, checkpointing):
    model, reference = Model(checkpointing), Model()
    joint = {"joint_lambda": 0.3} if router == "joint" else {}
    policy = task(model, router=router, **joint)
    batch = rollouts()
    assert int(policy.weight(batch)) == 3
    policy.loss(batch, share=3.0).backward()
    expected = slow(reference, batch, joint.get("joint_lambda", 0.0))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_routing_shifted_by_one_is_another_gradient():
    """Negative control of the alignment above."""
    model, reference = Model(), Model()
    batch = rollouts()
    shifted = routed(batch, batch.inputs["routing"].roll(1, dims=1))
    task(model).loss(shifted, share=3.0).backward()
    expected = slow(reference, batch, 0.0)
    worst = max((grad - expected[name]).abs().max() for name, grad in gradients(model).items())
    assert worst > 1e-3


def packed(batch):
    """The same rollouts in one row, as `Rollouts.collate` packs them."""
    lengths = batch.lengths.tolist()
    inputs = {
        name: batch.inputs[name][batch.inputs["attention_mask"].bool()][None] for name in ("input_ids", "routing")
    }
    inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = batch.labels[batch.inputs["attention_mask"].bool()][None]
    row = vars(Batch.of_packed(inputs, labels, lengths, batch.real_B))
    return RolloutBatch(**{**vars(batch), **row})


MANY = {"aggregate": "token_mean", "correction": "tis", "correction_level": "sequence", "kl_weight": 0.1}
OBJECTIVES = {
    "grpo": {"objective": "grpo", "router": "router_shift"},
    "gspo": {"objective": "gspo", "router": "joint"},
    "dapo": {"objective": "dapo", **MANY},
    "cispo": {"objective": "cispo", "correction": "icepop"},
    "gspo, off policy": {"objective": "gspo", "router": "router_shift", "updates_per_batch": 2, "temperature": 0.7},
}


def outcome(model, batch, **rl):
    """Loss, reported figures and gradients of a micro-batch; with several updates, after a step of the policy."""
    policy = task(model, **rl)
    if rl.get("kl_weight"):
        batch.reference_BS = batch.engine_BS - 0.1
    if rl.get("updates_per_batch"):
        batch = policy._with_old(batch)
        for parameter in model.module.parameters():
            parameter.data *= 1.01
    loss = policy.loss(batch, share=3.0)
    loss.backward()
    return loss.item(), policy.metrics(FIRST_STEP), gradients(model)


def largest_difference(one, other):
    (loss, figures, grads), (other_loss, other_figures, other_grads) = one, other
    assert figures.keys() == other_figures.keys() and grads.keys() == other_grads.keys()
    worst = max((grads[n] - g).abs().max() / g.abs().max().clamp_min(1e-12) for n, g in other_grads.items())
    of_figures = max(abs(figures[n] - value) / max(abs(value), 1.0) for n, value in other_figures.items())
    return max(abs(loss - other_loss), of_figures), float(worst)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_packed_row_comes_to_what_padded_rows_come_to(objective, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    found = []
    for lay in (lambda batch: batch, packed, packed):
        model, batch = Model(), lay(rollouts())
        attend_by_sample(model.module)
        if len(found) == 2:  # negative control: the second completion's log-probs go to the third sample
            monkeypatch.setattr(task_module, "_in_samples", shifted(task_module._in_samples))
        found.append(outcome(model, batch, **OBJECTIVES[objective]))
    loss, gradient = largest_difference(found[1], found[0])
    assert loss <= 2e-6 and gradient <= 5e-6
    loss, gradient = largest_difference(found[2], found[0])
    assert loss > 1e-3 or gradient > 1e-3


def shifted(in_samples):
    return lambda values, mask_BS: in_samples(values.roll(1, 0), mask_BS)


def test_what_is_reported(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    model = Model()
    notes = []
    policy = task(model, router="router_shift", note=notes.append)
    batch = rollouts()
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, batch.inputs["input_ids"][:, 1:, None])[..., 0]
    difference = (logprobs - batch.engine_BS[:, 1:])[batch.completion_BS[:, 1:]]
    policy.loss(batch, share=3.0)
    found = policy.metrics(FIRST_STEP)
    assert len(notes) == 1 and "was data.train sampled from this model at rl.temperature?" in notes[0]  # it was not
    assert found["reward"] == 0.5  # of the two that are known
    assert (
        found["replayed"] == pytest.approx(8 / 13)
        and found["ratio"] == pytest.approx(1)
        and found["gamma"] == pytest.approx(1)
        and found["clip_fraction"] == 0
    )
    assert found["mismatch_k3"] == pytest.approx((difference.exp() - difference - 1).mean().item(), rel=1e-4)
    assert 0.5 < found["routers_changed"] <= 1  # random experts
    with RoutingRecorder(model.module) as recorder:
        model(**{key: batch.inputs[key] for key in ("input_ids", "attention_mask")})
    first = joined(recorder.take(), 3)[:, :, :1]  # the first layer sees the same input live and replayed
    replayed = routed(batch, torch.cat([first, batch.inputs["routing"][:, :, 1:]], dim=2))
    policy.loss(replayed, share=3.0)
    assert policy.metrics(FIRST_STEP)["routers_changed"] <= 0.5


def test_forwards_of_an_evaluation_are_not_watched():
    model = Model()
    policy = task(model, router="joint")
    batch = rollouts()
    policy.loss(batch, share=3.0)
    kept = len(policy.router._logprob_TLK)
    model.module.eval()
    model(input_ids=batch.inputs["input_ids"])
    assert kept == LAYERS == len(policy.router._logprob_TLK)


def test_several_updates_share_one_old_policy_and_checkpoints_wait_for_the_last():
    model = Model()
    stream = [[rollouts(step)] for step in range(5)]
    policy, progress = task(model, stream, updates_per_batch=3, router="router_shift"), Progress(total_steps=5)
    taken, boundaries = [], []
    with torch.no_grad():
        for [batch] in itertools.islice(policy.steps(progress), 5):
            taken.append(batch)
            boundaries.append(policy.at_boundary)
            for parameter in model.module.parameters():  # an optimizer step
                parameter.mul_(1.01)
            progress.step += 1
    assert boundaries == [False, False, True, False, True]  # 3 and the 2 that are left
    fresh = Model()
    scored = task(fresh, updates_per_batch=3, router="router_shift")
    for number, batch in enumerate(taken[:3]):
        alone = scored._with_old(rollouts(number))
        assert torch.equal(alone.old_BS, batch.old_BS)  # of the first weights, for all three
        assert torch.equal(alone.old_expert_BSLK, batch.old_expert_BSLK)
    assert not torch.equal(scored._with_old(rollouts(3)).old_BS, taken[3].old_BS)
    assert model.module.training and all(layer.load.take() is None for layer in moe_layers(model.module))


def test_a_dense_policy_needs_no_routing():
    model = Model()
    model.module = build_preset("tiny-vl-dense").train()
    batch = rollouts()
    del batch.inputs["routing"]
    policy = task(model, replay=False)
    assert torch.isfinite(policy.loss(batch, share=3.0))


def test_a_step_whose_advantages_are_all_zero_is_said_once_and_counted(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    model, notes = Model(), []
    remembered = [Outcome(0.5, group, float("nan"), True) for group in "aabbc"]
    policy = task(model, SimpleNamespace(remembered=remembered), note=notes.append)
    assert policy.closing_rows() == {}
    flat, mixed = (replace(rollouts(), advantage_B=torch.tensor(values)) for values in ([0.0] * 3, [0.0, -0.5, 0.0]))
    filled = replace(rollouts(), advantage_B=torch.tensor([1.0, -0.5, 0.0]))
    flat.advantage_B[2] = 1.0
    for batch in (flat, filled):
        batch.completion_BS[2], batch.labels[2] = False, NO_LOSS  # what completes nothing is no completion
    for step, (batch, share) in enumerate([(mixed, 2 / 3), (flat, 1.0), (flat, 1.0), (filled, 0.0)], start=5):
        loss = policy.loss(batch, share=3.0)
        found = policy.metrics(Progress(total_steps=10, step=step))
        assert found["zero_advantage"] == pytest.approx(share) and (loss == 0) == (share == 1)
    [note] = notes
    assert note == (
        "step 6: the advantages of all 2 completions are 0, so it learns nothing from rewards (3 of 3 groups of "
        "data.train have equal rewards); sample more completions of a prompt, or give a reward that tells them apart"
    )
    counted = "2 of 4 (3 of 3 groups of data.train have equal rewards)"
    assert policy.closing_rows() == {"steps with advantages of 0 only": counted}
