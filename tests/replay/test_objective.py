"""Policy losses against a loop over tokens, closed forms, masks, accumulation; group advantages; metrics."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from ds_moe.config.tasks import CORRECTION_BOUNDS
from ds_moe.replay.metrics import means, metrics, routing_difference
from ds_moe.replay.objective import OBJECTIVES, Objective, PolicyInputs, group_advantages, policy_loss

KINDS = ("grpo", "dapo", "gspo", "cispo")
ROUTERS = (
    {"router": "none"},
    {"router": "router_shift", "gamma_place": "before", "gamma_floor": 0.9},
    {"router": "router_shift", "gamma_place": "after", "gamma_floor": 0.9},
    {"router": "joint", "joint_lambda": 0.3},
)
LENGTHS = (5, 1, 0, 3)
B, S, L, K = len(LENGTHS), 7, 3, 2
NAN = math.nan


def make_inputs(shift=0.3, seed=0, per_token=False):
    """fp64 inputs with ragged completions, a row without any, and tokens without routing."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    old_BS, old_BSLK = -rand(B, S).abs() - 0.1, -rand(B, S, L, K).abs()
    return PolicyInputs(
        logprob_BS=(old_BS + shift * rand(B, S)).requires_grad_(),
        old_BS=old_BS,
        engine_BS=old_BS + shift * rand(B, S),
        mask_BS=torch.stack([(torch.arange(S) >= 2) & (torch.arange(S) < 2 + length) for length in LENGTHS]),
        advantage=rand(B, S) if per_token else rand(B),
        expert_BSLK=(old_BSLK + shift * rand(B, S, L, K)).requires_grad_(),
        old_expert_BSLK=old_BSLK,
        routed_BS=torch.rand(B, S, generator=g) < 0.7,
        reference_BS=old_BS + shift * rand(B, S),
    )


def grads(loss, inputs):
    """Of the live log-probabilities of tokens and experts."""
    found = torch.autograd.grad(loss, (inputs.logprob_BS, inputs.expert_BSLK), allow_unused=True, retain_graph=True)
    return [torch.zeros(B, S, L, K, dtype=torch.float64) if grad is None else grad for grad in found]


def oracle(objective, inputs):
    """The loss, one token after the other, from scalars that keep their gradient."""
    kind = OBJECTIVES[objective.kind]
    low = 1 - (kind.clip_low if objective.clip_low is None else objective.clip_low)
    high = 1 + (kind.clip_high if objective.clip_high is None else objective.clip_high)
    rows = []
    for b in range(B):
        tokens = [t for t in range(S) if inputs.mask_BS[b, t]]
        logs, scores, gammas, weights = [], [], [], []
        for t in tokens:
            live, old, gamma = inputs.logprob_BS[b, t], inputs.old_BS[b, t], 1.0
            if objective.router != "none" and inputs.routed_BS[b, t]:
                pairs = [
                    (inputs.expert_BSLK[b, t, layer, k], inputs.old_expert_BSLK[b, t, layer, k])
                    for layer in range(L)
                    for k in range(K)
                ]
                if objective.router == "joint":
                    live = live + objective.joint_lambda * sum(new for new, _ in pairs) / (L * K)
                    old = old + objective.joint_lambda * sum(before for _, before in pairs) / (L * K)
                else:
                    mean = sum(abs(new.item() - before.item()) for new, before in pairs) / (L * K)
                    gamma = max(math.exp(-mean), objective.gamma_floor)
            before = objective.gamma_place == "before"
            logs.append(live - old + (math.log(gamma) if before else 0.0))
            scores.append(live)
            gammas.append(1.0 if before else gamma)
            w = math.exp(inputs.old_BS[b, t].item() - inputs.engine_BS[b, t].item())
            bounds = CORRECTION_BOUNDS.get(objective.correction)
            if objective.correction == "none":
                w = 1.0
            elif objective.correction == "tis":
                w = min(w, bounds[1])
            else:
                w = w if bounds[0] <= w <= bounds[1] else 0.0
            weights.append(w)
        losses = []
        for i, t in enumerate(tokens):
            advantage = inputs.advantage[b, t] if inputs.advantage.dim() == 2 else inputs.advantage[b]
            ratio = (sum(logs) / len(logs) if objective.kind == "gspo" else logs[i]).exp()
            bounded = min(max(ratio.item(), low), high)
            if objective.kind == "cispo":
                value = bounded * advantage * scores[i]
            else:
                value = min(ratio * advantage, bounded * advantage)
            loss = -weights[i] * gammas[i] * value
            if objective.kl_weight:
                d = inputs.reference_BS[b, t] - inputs.logprob_BS[b, t]
                loss = (
                    loss + objective.kl_weight * {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[objective.kl_kind]
                )
            losses.append(loss)
        rows.append(losses)
    rows = [losses for losses in rows if losses]
    if (objective.aggregate or kind.aggregate) == "token_mean":
        return sum(sum(losses) for losses in rows) / sum(len(losses) for losses in rows)
    return sum(sum(losses) / len(losses) for losses in rows) / len(rows)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_of_a_loop(kind, router, per_token):
    inputs = make_inputs(per_token=per_token)
    clips = {"clip_low": 0.1, "clip_high": 0.15}
    for more in (
        {},
        clips,
        {**clips, "correction": "tis", "aggregate": "token_mean"},
        {"correction": "mis", "aggregate": "sequence_mean", "kl_weight": 0.2},
        {**clips, "correction": "icepop", "kl_weight": 0.1, "kl_kind": "k2"},
        {"kl_weight": 0.1, "kl_kind": "k1"},
    ):
        objective = Objective(kind=kind, **router, **more)
        loss, stats = policy_loss(objective, inputs)
        expected = oracle(objective, inputs)
        torch.testing.assert_close(loss, expected)
        for found, right in zip(grads(loss, inputs), grads(expected, inputs), strict=True):
            torch.testing.assert_close(found, right)
        assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("router", ["none", "joint"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo"])
def test_gradcheck(kind, router):
    inputs = make_inputs()
    objective = Objective(kind=kind, router=router, clip_low=0.1, clip_high=0.2, correction="tis", kl_weight=0.1)

    def loss(logprob_BS, expert_BSLK):
        return policy_loss(objective, inputs._replace(logprob_BS=logprob_BS, expert_BSLK=expert_BSLK))[0]

    assert gradcheck(loss, (inputs.logprob_BS, inputs.expert_BSLK))


@pytest.mark.parametrize("router", ["none", "router_shift", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_the_gradient_is_reinforce(kind, router):
    inputs = make_inputs(shift=0.0)
    objective = Objective(kind=kind, router=router, correction="icepop")
    loss, stats = policy_loss(objective, inputs)
    assert bool((stats["ratio_BS"] == 1).all()) and bool((stats["weight_BS"] == 1).all())
    assert not bool(stats["clipped_BS"].any())
    if router == "router_shift":
        assert bool((stats["gamma_BS"] == 1).all())

    score_BS = inputs.logprob_BS
    if router == "joint":
        score_BS = score_BS + objective.joint_lambda * inputs.expert_BSLK.mean((2, 3)) * inputs.routed_BS
    terms_BS = score_BS * inputs.advantage[:, None] * inputs.mask_BS
    if OBJECTIVES[kind].aggregate == "token_mean":
        reinforce = -terms_BS.sum() / sum(LENGTHS)
    else:
        reinforce = -sum(terms_BS[b].sum() / n for b, n in enumerate(LENGTHS) if n) / 3
    for found, right in zip(grads(loss, inputs), grads(reinforce, inputs), strict=True):
        torch.testing.assert_close(found, right)


def test_only_cispo_keeps_the_gradient_of_a_clipped_token():
    inputs = make_inputs()._replace(advantage=torch.ones(B, dtype=torch.float64))
    inputs = inputs._replace(logprob_BS=(inputs.old_BS + 3).requires_grad_())
    for kind in KINDS:
        loss, stats = policy_loss(Objective(kind=kind), inputs)
        grad_BS = grads(loss, inputs)[0]
        assert bool(stats["clipped_BS"][inputs.mask_BS].all())
        assert bool((grad_BS[inputs.mask_BS] != 0).all()) == (kind == "cispo")


# --- masks and missing routing


def scrambled(inputs, junk):
    """The same batch with `junk` wherever no completion token is."""

    def scramble(value, live):
        if value is None or value.dim() < 2:
            return value
        mask = inputs.mask_BS.view(B, S, *[1] * (value.dim() - 2))
        return torch.where(mask, value.detach(), junk).requires_grad_(live)

    names = ("logprob_BS", "old_BS", "engine_BS", "advantage", "expert_BSLK", "old_expert_BSLK", "reference_BS")
    live = ("logprob_BS", "expert_BSLK")
    changed = {name: scramble(getattr(inputs, name), name in live) for name in names}
    return inputs._replace(**changed, routed_BS=inputs.routed_BS | ~inputs.mask_BS)


@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 1e30, 7.0])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_completion_changes_nothing(kind, router, junk):
    inputs = make_inputs(per_token=True)
    other = scrambled(inputs, junk)
    for level in ("token", "sequence"):
        objective = Objective(kind=kind, **router, correction="mis", correction_level=level, kl_weight=0.1)
        (loss, stats), (other_loss, other_stats) = policy_loss(objective, inputs), policy_loss(objective, other)
        assert loss.item() == other_loss.item()
        for grad, other_grad in zip(grads(loss, inputs), grads(other_loss, other), strict=True):
            assert torch.equal(grad, other_grad)
        assert means(metrics(inputs, stats)) == means(metrics(other, other_stats))


@pytest.mark.parametrize("kind", KINDS)
def test_enormous_ratios_stay_finite(kind):
    inputs = make_inputs()
    old_BS = inputs.old_BS.clone()
    old_BS[0, 2], old_BS[3, 2] = -math.inf, -1e30
    logprob_BS = inputs.logprob_BS.detach().clone()
    logprob_BS[1, 2] = -1e5
    inputs = inputs._replace(old_BS=old_BS.float(), logprob_BS=logprob_BS.float().requires_grad_())
    for correction in ("none", "tis", "mis", "icepop"):
        loss, stats = policy_loss(Objective(kind=kind, correction=correction, kl_weight=0.1), inputs)
        assert bool(loss.isfinite()) and bool(torch.autograd.grad(loss, inputs.logprob_BS)[0].isfinite().all())
        assert all(map(math.isfinite, means(metrics(inputs, stats)).values()))


@pytest.mark.parametrize("router", ["router_shift", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_routing_counts_as_it_does_alone(kind, router):
    """Samples 0 and 1 have no routing, and NaN where it would be; 2 and 3 have one."""
    without_B = torch.tensor([True, True, False, False])
    inputs = make_inputs()
    expert_BSLK = torch.where(without_B.view(B, 1, 1, 1), NAN, inputs.expert_BSLK.detach()).requires_grad_()
    inputs = inputs._replace(expert_BSLK=expert_BSLK, routed_BS=~without_B.unsqueeze(1).expand(B, S))
    objective = Objective(kind=kind, router=router, aggregate="token_mean")
    loss, _ = policy_loss(objective, inputs, normalizer=1.0)

    def alone(rows_B, objective):
        rows = PolicyInputs(*(value[rows_B] for value in inputs))
        return policy_loss(objective, rows, normalizer=1.0)[0]

    parts = alone(without_B, replace(objective, router="none")) + alone(~without_B, objective)
    torch.testing.assert_close(loss, parts)
    for found, right in zip(grads(loss, inputs), grads(parts, inputs), strict=True):
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, right)


def test_a_surrogate_sees_nothing_outside_the_mask(monkeypatch):
    """What `SurrogateInputs` promises to a new kind of objective."""
    seen = []

    def surrogate(policy, low, high):
        seen.append(policy)
        return OBJECTIVES["grpo"].surrogate(policy, low, high)

    monkeypatch.setitem(OBJECTIVES, "cispo", OBJECTIVES["cispo"]._replace(surrogate=surrogate))
    inputs = scrambled(make_inputs(per_token=True), NAN)
    policy_loss(Objective(kind="cispo", router="router_shift"), inputs)
    for values_BS in seen[0][:3]:
        assert values_BS[~inputs.mask_BS].abs().sum() == 0 and bool(values_BS[inputs.mask_BS].isfinite().all())


def test_what_the_objective_needs_and_lacks_is_named():
    inputs = make_inputs()._replace(expert_BSLK=None, reference_BS=None)
    with pytest.raises(ValueError, match="router: joint needs expert_BSLK"):
        policy_loss(Objective(router="joint"), inputs)
    with pytest.raises(ValueError, match="kl_weight: 0.1 needs reference_BS"):
        policy_loss(Objective(kl_weight=0.1), inputs)


# --- accumulation


@pytest.mark.parametrize("kind", KINDS)
def test_parts_with_a_normalizer_are_the_whole(kind):
    inputs = make_inputs()
    objective = Objective(kind=kind, router="joint", correction="tis", kl_weight=0.1)
    whole, stats = policy_loss(objective, inputs)
    count = sum(LENGTHS) if OBJECTIVES[kind].aggregate == "token_mean" else 3
    parts = [PolicyInputs(*(value[rows] for value in inputs)) for rows in ([0], [1, 2], [2], [3])]
    parts[2] = parts[2]._replace(mask_BS=torch.zeros_like(parts[2].mask_BS))  # a micro-batch without completion
    done = [policy_loss(objective, part, normalizer=count / len(parts)) for part in parts]
    averaged = sum(loss for loss, _ in done) / len(parts)  # as DeepSpeed does over ranks and accumulation steps
    torch.testing.assert_close(averaged, whole)
    for found, right in zip(grads(averaged, inputs), grads(whole, inputs), strict=True):
        torch.testing.assert_close(found, right)
    unweighted = sum(policy_loss(objective, part)[0] for part in parts) / len(parts)
    assert (unweighted - whole).abs() > 1e-3  # negative control: means of means

    pieces = [metrics(part, piece) for part, (_, piece) in zip(parts, done, strict=True)]
    added = {name: torch.stack([piece[name] for piece in pieces]).sum() for name in pieces[0]}
    assert means(added) == pytest.approx(means(metrics(inputs, stats)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_completion_gives_zero_with_a_gradient(kind):
    inputs = make_inputs()
    inputs = inputs._replace(mask_BS=torch.zeros_like(inputs.mask_BS))
    loss, stats = policy_loss(Objective(kind=kind, router="joint"), inputs)
    assert loss.item() == 0 and all(grad.abs().sum() == 0 for grad in grads(loss, inputs))
    assert means(metrics(inputs, stats)) == {}


# --- advantages


@pytest.mark.parametrize("normalize_std", [True, False])
def test_group_advantages_of_a_loop(normalize_std):
    group_B = torch.tensor([7, 3, 7, 3, 7, 900, 3, 5, 5])
    reward_B = torch.tensor([1.0, 0.9, 0.0, 0.9, 0.5, 4.0, 0.9, -2.0, 3.0])
    found_B = group_advantages(reward_B, group_B, normalize_std)
    for b in range(len(group_B)):
        rewards = reward_B[group_B == group_B[b]].double()
        expected = reward_B[b].item() - rewards.mean().item()
        if normalize_std:
            expected /= rewards.std().item() + 1e-6 if len(rewards) > 1 else 1.0
        assert found_B[b].item() == pytest.approx(expected, abs=1e-6)
    assert found_B[group_B == 3].tolist() == [0, 0, 0]  # equal rewards, whose mean in fp32 is another number
    assert found_B[5] == 0  # a group of one


# --- metrics


def test_metrics_of_a_loop():
    inputs = make_inputs(shift=0.8)
    objective = Objective(router="router_shift", gamma_floor=0.5, correction="icepop", kl_weight=0.1)
    _, stats = policy_loss(objective, inputs)
    found = means(metrics(inputs, stats))
    tokens = [(b, t) for b in range(B) for t in range(S) if inputs.mask_BS[b, t]]
    d = [(inputs.old_BS[at] - inputs.engine_BS[at]).item() for at in tokens]
    w = [math.exp(x) for x in d]
    routed = [at for at in tokens if inputs.routed_BS[at]]
    gamma = torch.stack([stats["gamma_BS"][at] for at in routed])
    expected = {
        "mismatch_k3": sum(math.exp(x) - x - 1 for x in d),
        "mismatch_large": sum(abs(x) > math.log(2) for x in d),
        "engine_ratio": sum(w),
        "ess": sum(w) ** 2 / sum(x * x for x in w),
        "dropped": sum(not 0.5 <= x <= 5 for x in w),
        "ratio": sum(stats["ratio_BS"][at].item() for at in tokens),
        "clip_fraction": sum(stats["clipped_BS"][at].item() for at in tokens),
        "entropy": -sum(inputs.logprob_BS[at].item() for at in tokens),
        "kl": sum(stats["kl_BS"][at].item() for at in tokens),
        "replayed": len(routed),
    }
    expected["incomparable_tokens"] = 0
    expected = {name: value / len(tokens) for name, value in expected.items()}
    expected |= {"gamma": gamma.mean().item(), "gamma_std": gamma.std(correction=0).item()}
    assert found == pytest.approx(expected)
    assert 0 < found["clip_fraction"] < 1 and 0 < found["dropped"] < 1 and 0 < found["mismatch_large"] < 1


@pytest.mark.parametrize("sentinel", [-9999.0, -1e9])
def test_a_log_prob_of_minus_infinity_is_counted_apart(sentinel):
    """Servers write -9999 for it. Clamped to e^20, one such token made mismatch_k3 4.9e8 over the number of tokens."""
    inputs = make_inputs(shift=0.3)
    at = tuple(inputs.mask_BS.nonzero()[0].tolist())
    without, broken = inputs.mask_BS.clone(), inputs.engine_BS.clone()
    without[at], broken[at] = False, sentinel
    found, expected = (
        means(metrics(one, policy_loss(Objective(), one)[1]))
        for one in (inputs._replace(engine_BS=broken), inputs._replace(mask_BS=without))
    )
    assert found["incomparable_tokens"] == 1 and expected["incomparable_tokens"] == 0
    for name in ("mismatch_k3", "engine_ratio", "ess"):
        assert found[name] == pytest.approx(expected[name]) and found[name] < 2
    assert found["mismatch_large"] > 0  # where it counts as any other that is far off


def test_metrics_where_engine_and_trainer_agree():
    inputs = make_inputs(shift=0.0)
    _, stats = policy_loss(Objective(router="router_shift", correction="mis"), inputs)
    found = means(metrics(inputs, stats))
    assert found["mismatch_k3"] == found["mismatch_large"] == found["clip_fraction"] == found["dropped"] == 0
    assert found["ratio"] == found["ess"] == found["gamma"] == 1 and found["gamma_std"] == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16])
def test_routing_difference_of_sets(dtype):
    g = torch.Generator().manual_seed(0)
    live, replayed = (torch.rand(200, L, 3, generator=g).argsort(-1)[..., :K] for _ in range(2))
    mask_T = torch.rand(200, generator=g) < 0.8
    differs = [[set(live[t, i].tolist()) != set(replayed[t, i].tolist()) for i in range(L)] for t in range(200)]
    kept = [row for row, keep in zip(differs, mask_T.tolist(), strict=True) if keep]
    found = means(routing_difference(live, replayed.to(dtype), mask_T))
    expected = {
        "routers_changed": sum(map(sum, kept)) / (L * len(kept)),
        "tokens_changed": sum(map(any, kept)) / len(kept),
    }
    assert found == pytest.approx(expected) and 0 < found["routers_changed"] < found["tokens_changed"] < 1
    assert means(routing_difference(live.flip(-1), live.to(dtype), mask_T)) == dict.fromkeys(expected, 0.0)


def test_a_router_without_replay_is_not_compared():
    live, replayed = (
        torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]]),
        torch.tensor([[[1, 0], [-1, -1]], [[-1, -1]] * 2]),
    )
    sums = routing_difference(live, replayed, torch.tensor([True, True]))
    assert {name: value.item() for name, value in sums.items()} == {
        "routers": 1,
        "routers_changed": 0,
        "tokens_compared": 1,
        "tokens_changed": 0,
    }
