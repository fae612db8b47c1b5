"""Rules about keys without effect or in contradiction, within a run file and between it and its model."""

import pytest
from transformers import Qwen3MoeConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from ds_moe.config.check import UNUSED, check_model
from ds_moe.config.run_file import ALL_KEYS, load_run
from ds_moe.errors import UserError
from tests.config.run_text import BASE, complaint

LORA = "lora={rank: 8}"
GATE = ["task=gate", "moe=null", "model.preset=tiny-vl-dense", "gate.adapters_in=adapters", "data.train=routed.jsonl"]
LATER = [*GATE, "gate.stage=end_to_end"]
OVER_EXPERTS = [*GATE, "model.preset=tiny-vl-moe", "moe={ep_size: 1}"]
EVALUATED = ["data.eval=held_out.jsonl", "train.eval_every=5"]
SHARED = ["data.packing=true", "train.sequence_parallel=2"]  # rows that two ranks share
RL = ["task=rl", "data.train=rollouts.jsonl"]
LOCAL = [*RL, "rl.engine={kind: local, prompts: 4, max_new_tokens: 16}"]  # 4 steps a round
PAIRS = ["task=dpo", "data.train=pairs.jsonl"]
# Every rule: overrides that trigger it, and words of the complaint.
RULES = {
    "path and preset": (["model.path=x"], "model.path is 'x' and model.preset is 'tiny-vl-moe'; set only one"),
    "neither path nor preset": (["model.preset=null"], "neither model.path nor model.preset is set"),
    "steps and epochs": (["train.epochs=1"], "train.steps is 10 and train.epochs is 1; set only one"),
    "neither steps nor epochs": (["train.steps=null"], "neither train.steps nor train.epochs is set"),
    "local at EP 2": (["moe.dispatch.kind=local"], "moe.dispatch.kind local needs moe.ep_size 1, which is 2"),
    "all_to_all at EP 1": (
        ["moe.dispatch.kind=all_to_all", "moe.ep_size=1"],
        "needs moe.ep_size more than 1, which is 1",
    ),
    "moe.router.order": (
        ["moe.router.order=topk_then_softmax", "moe.router.scores=sigmoid"],
        "moe.router.order would not be used: moe.router.scores is sigmoid",
    ),
    "moe.router.normalize": (
        ["moe.router.normalize=false", "moe.router.order=topk_then_softmax"],
        "moe.router.normalize would not be used: moe.router.order is topk_then_softmax",
    ),
    "moe.router.drop": (["moe.router.drop=score"], "drop would not be used: moe.router.capacity_factor is not set"),
    "moe.dispatch.chunks": (["moe.dispatch.chunks=2", "moe.ep_size=1"], "would not be used: moe.ep_size is 1"),
    "moe.experts.recompute": (
        ["moe.experts.recompute=all", "moe.experts.backend=reference"],
        "moe.experts.recompute would not be used: moe.experts.backend reference decides that itself",
    ),
    "recompute beside LoRA": (
        ["moe.experts.recompute=all", "lora={rank: 8, experts: true}"],
        "would not be used: the experts have LoRA updates",
    ),
    "liger beside LoRA": (
        ["moe.experts.backend=liger", "lora={rank: 8, experts: true}"],
        "moe.experts.backend liger would not be used: experts with LoRA updates need torch's products",
    ),
    "groups alone": (["moe.router.groups=4"], "moe.router.groups is 4 and moe.router.top_groups is not set"),
    "expert choice in a causal model": (["moe.router.kind=expert_choice"], "leaks the future and cannot generate"),
    "expert choice that would generate": (
        ["data.eval=digits", "train.eval_generate=true", "moe.router={kind: expert_choice, allow_noncausal: true}"],
        "expert_choice cannot generate answers; set train.eval_generate to false",
    ),
    "a balancer of a router that learns nothing": (
        ["moe.balance=[{kind: aux}]", "moe.router.kind=hash"],
        "moe.balance aux would not be used: moe.router.kind hash learns nothing",
    ),
    "a balancer of balanced experts": (
        ["moe.balance=[{kind: aux}]", "moe.router={kind: expert_choice, allow_noncausal: true}"],
        "moe.balance aux would not be used: moe.router.kind expert_choice gives all experts the same load",
    ),
    "aux twice": (["moe.balance=[{kind: aux}, {kind: aux}]"], "moe.balance lists aux 2 times"),
    "none beside aux": (["moe.balance=[{kind: none}, {kind: aux}]"], "moe.balance lists none beside aux"),
    "warm-up without end": (["train.warmup_steps=10"], "train.warmup_steps 10 takes all of the run's 10 steps"),
    "flash attention in fp32": (
        ["model.attention=flash_attention_2", "train.precision=fp32"],
        "flash_attention_2 has no fp32 kernels",
    ),
    "more frames at least than at most": (
        ["data.train=a.jsonl", "data.video.min_frames=9", "data.video.max_frames=3"],
        "data.video.min_frames 9 is more than data.video.max_frames 3; lower it, or raise data.video.max_frames",
    ),
    "packed rows without bounds": (
        ["data.packing=true", "model.attention=eager"],
        "model.attention eager knows no bounds between the samples of a packed row; set it to sdpa",
    ),
    "data.root": (["data.root=images"], 'data.root would not be used: the data is "digits"'),
    "data.root of a tar": (
        ["data.train=a.tar", "data.eval=null", "data.root=images"],
        "a.tar brings its images, and no",
    ),
    "data.root of a hub dataset": (
        ["data.train=hub:a/b", "data.eval=null", "data.root=x"],
        "hub:a/b brings its images",
    ),
    "data.root beside roots": (
        ["data.train=[{path: a, root: b}]", "data.eval=null", "data.root=images"],
        "every source has a root of its own",
    ),
    "data.shuffle_window_mb": (["data.shuffle_window_mb=8"], "data.shuffle_window_mb would not be used"),
    "data.mixture": (["data.mixture.temperature=2"], "data.mixture would not be used: data.train is one source"),
    "data.mixture.epoch": (["data.train=[a, b]", "data.mixture.epoch=longest"], "an epoch is every record once"),
    "data.video": (["data.video.fps=4"], 'data.video would not be used: the data is "digits"'),
    "data.train_on": ([*RL, "data.train_on=last"], "task rl learns completions, not answers"),
    "data.length_grouping": (["data.length_grouping=true", "train.global_batch_size=1"], "global_batch_size is 1"),
    "data.length_grouping beside packing": (
        ["data.length_grouping=false", "data.packing=true"],
        "data.length_grouping would not be used: data.packing fills rows",
    ),
    "train.micro_batch_size": (
        ["data.packing=true", "train.micro_batch_size=4"],
        "train.micro_batch_size would not be used: data.packing fills rows of train.tokens_per_micro_batch tokens",
    ),
    "train.tokens_per_micro_batch": (
        ["train.tokens_per_micro_batch=4096"],
        "train.tokens_per_micro_batch would not be used: data.packing is False",
    ),
    "rows that hold less than a sample may have": (
        ["data.packing=true", "train.tokens_per_micro_batch=1024"],
        "train.tokens_per_micro_batch 1024 is less than data.max_length 2048: a sample is never cut; make it as large",
    ),
    "shared rows that are padded": (
        ["train.sequence_parallel=2"],
        "train.sequence_parallel 2 shares packed rows, and data.packing is false; set it to true",
    ),
    "shared rows of another task": (
        [*RL, *SHARED],
        "train.sequence_parallel 2 is for task sft, and task is rl; remove it",
    ),
    "shared rows and flash attention": (
        [*SHARED, "model.attention=flash_attention_2"],
        "train.sequence_parallel 2 runs sdpa sample by sample",
    ),
    "shared rows and experts that choose": (
        [*SHARED, "moe.router={kind: expert_choice, allow_noncausal: true}"],
        "moe.router.kind expert_choice chooses among all tokens of a row, of which train.sequence_parallel 2 gives",
    ),
    "shared rows and places": (
        [*SHARED, "moe.router.kind=hash"],
        "moe.router.kind hash places tokens by their index in a row, of which train.sequence_parallel 2 gives a rank",
    ),
    "shared rows and capacity": (
        [*SHARED, "moe.router.capacity_factor=1.5"],
        "moe.router.capacity_factor counts the tokens of a row, of which train.sequence_parallel 2 gives a rank a part",
    ),
    "data.prefetch_factor": (
        ["data.prefetch_factor=2"],
        "data.prefetch_factor would not be used: data.num_workers is 0",
    ),
    "train.offload_activations": (
        ["train.offload_activations=true"],
        "train.offload_activations would not be used: train.gradient_checkpointing is False; remove it",
    ),
    "offload of a supervised gate": (
        [*GATE, "train.offload_activations=true", "train.gradient_checkpointing=true"],
        "train.offload_activations would not be used: gate.stage supervised runs the model without gradients",
    ),
    "train.min_lr_ratio": (["train.min_lr_ratio=0.1", "train.schedule=linear"], "train.schedule is linear"),
    "train.muon_lr": (["train.muon_lr=0.1"], "train.muon_lr would not be used: train.optimizer is adamw"),
    "train.muon_momentum": (["train.muon_momentum=0.9"], "would not be used: train.optimizer is adamw"),
    "muon of a gate": ([*GATE, "train.optimizer=muon"], "train.optimizer muon is for the hidden layers of a model"),
    "muon of routers alone": (
        ["train.optimizer=muon", "train.stage=router_only"],
        "train.optimizer muon leaves routers to AdamW, and train.stage router_only trains nothing else; leave it out",
    ),
    "train.eval_every": (["train.eval_every=5"], "train.eval_every would not be used: data.eval is not set"),
    "train.eval_batch_size": (["train.eval_batch_size=5"], "eval_batch_size would not be used: data.eval is not set"),
    "train.eval_samples": (["train.eval_samples=5", "data.eval=digits"], "train.eval_every is not set"),
    "train.eval_generate": (["train.eval_generate=false"], "eval_generate would not be used: data.eval is not set"),
    "train.max_new_tokens": (
        ["train.max_new_tokens=5", "data.eval=digits", "train.eval_generate=false"],
        "train.max_new_tokens would not be used: train.eval_generate is false",
    ),
    "monitor.dead_alarm_steps": (
        ["monitor.dead_alarm_steps=5", "moe=null"],
        "monitor.dead_alarm_steps would not be used: there is no moe section",
    ),
    "monitor.heatmap_every": (
        ["monitor.heatmap_every=5", "monitor.tensorboard=false"],
        "heatmap_every would not be used: monitor.tensorboard is false",
    ),
    "lora.experts": (["moe=null", "lora={experts: true}"], "lora.experts would not be used: there is no moe section"),
    "lora.train_router": (["moe=null", "lora={train_router: true}"], "train_router would not be used: there is no moe"),
    "model.freeze": ([LORA, "model.freeze=[vision]"], "model.freeze would not be used: lora freezes the whole model"),
    "lora of nothing": (["lora={targets: []}"], "nothing would be trained"),
    "lora of experts with an odd rank": (["lora={rank: 12, experts: true}"], "lora.rank 12 is no multiple of 8"),
    "lora and router_only": ([LORA, "train.stage=router_only"], "remove it, or the lora section"),
    "lora and a router that learns nothing": (
        ["lora={train_router: true}", "moe.router.kind=hash"],
        "moe.router.kind hash learns nothing: set lora.train_router false",
    ),
    "gate": (["gate.width=8"], "gate would not be used: task is sft"),
    "gate.text": (
        [*GATE, "gate.modalities=vision", "gate.text=last"],
        "gate.text would not be used: gate.modalities is",
    ),
    "gate.text_layer": ([*GATE, "gate.text_layer=1"], "gate.text_layer would not be used: gate.text is embeddings"),
    "gate.vision": ([*GATE, "gate.modalities=text", "gate.vision=mean"], "not be used: gate.modalities is text"),
    "gate.top_k": ([*GATE, "gate.top_k=2"], "gate.top_k would not be used: gate.select is soft"),
    "gate.temperature": (
        [*GATE, "gate.select=top_k", "gate.top_k=1", "gate.temperature=0.5"],
        "gate.temperature would not be used: gate.select top_k with gate.top_k 1",
    ),
    "gate.class_weights": ([*LATER, "gate.class_weights=balanced"], "would not be used: gate.stage is end_to_end"),
    "gate.entropy_weight": ([*GATE, "gate.entropy_weight=0.1"], "would not be used: gate.stage is supervised"),
    "gate.kl_weight": (
        [*GATE, "gate.start=x", "gate.kl_weight=0.1"],
        "gate.kl_weight would not be used: gate.stage is supervised",
    ),
    "gate.adapter_lr": ([*LATER, "gate.adapter_lr=0.1"], "adapter_lr would not be used: gate.stage is end_to_end"),
    "dpo": (["dpo.beta=0.2"], "dpo would not be used: task is sft"),
    "dpo.label_smoothing": ([*PAIRS, "dpo.loss=ipo", "dpo.label_smoothing=0.1"], "not be used: dpo.loss is ipo"),
    "dpo.margin": ([*PAIRS, "dpo.margin=1.0"], "dpo.margin would not be used: dpo.loss is dpo"),
    "dpo.reference": (
        [*PAIRS, "dpo.loss=simpo", "dpo.reference=stored"],
        "not be used: dpo.loss simpo has no reference",
    ),
    "dpo.reference_dir": ([*PAIRS, "lora.rank=8", "dpo.reference_dir=x"], "not be used: the reference is the base"),
    "dpo.replay_reference": (
        [*PAIRS, "dpo.loss=simpo", "dpo.replay_reference=true"],
        "dpo.replay_reference would not be used: dpo.loss simpo has no reference",
    ),
    "a supervised gate that would answer": (
        [*GATE, *EVALUATED, "train.eval_generate=true"],
        "train.eval_generate would not be used: gate.stage supervised learns which adapter, and answers nothing",
    ),
    "a gate on digits": ([*GATE, "data.train=digits"], 'data.train is "digits", whose records name no adapter'),
    "a gate without adapters": ([*GATE, "gate.adapters_in=null"], "neither gate.adapters nor gate.adapters_in is set"),
    "a gate over routers of another kind": (
        [*OVER_EXPERTS, "moe.router.kind=hash"],
        "moe.router.kind hash would change the routing: task gate freezes the base",
    ),
    "a gate over other routing": (
        [*OVER_EXPERTS, "moe.router.top_k=3"],
        "moe.router.top_k 3 would change the routing: task gate freezes the base",
    ),
    "a gate over balanced experts": (
        [*OVER_EXPERTS, "moe.balance=[{kind: loss_free}]"],
        "moe.balance loss_free would not be used: task gate freezes the routers; remove it",
    ),
    "a gate over other weights": (
        [*OVER_EXPERTS, "moe.experts.apply_weight=before"],
        "moe.experts.apply_weight before would change the base",
    ),
    "a gate that replays": ([*OVER_EXPERTS, "moe.replay.enabled=true"], "moe.replay.enabled needs task rl"),
    "a gate that trains routers": (
        [*OVER_EXPERTS, "train.stage=router_only"],
        "train.stage router_only would not be used: task gate freezes the routers; remove it",
    ),
    "a load that no gate makes": (
        [*OVER_EXPERTS, "monitor.dead_alarm_steps=5"],
        "monitor.dead_alarm_steps would not be used: gate.stage supervised trains without the experts; remove it",
    ),
    "a gate with lora": ([*GATE, LORA], "section lora would not be used: task gate brings the adapters itself"),
    "a gate upon a frozen part": ([*GATE, "model.freeze=[vision]"], "task gate freezes the whole model; remove it"),
    "a pull to no gate": ([*LATER, "gate.kl_weight=0.1"], "near that of gate.start, which is not set"),
    "top_k without k": ([*GATE, "gate.select=top_k"], "gate.select top_k needs gate.top_k; set it"),
    "layer without number": ([*GATE, "gate.text=layer"], "gate.text layer needs gate.text_layer; set it"),
    "a constant gate": ([*LATER, "gate.select=top_k", "gate.top_k=1"], "learns nothing from the answers of stage"),
    "text for tokens": ([*GATE, "gate.per=token", "gate.text=last"], "per token reads each token's own embedding"),
    "patience without evaluations": (["train.patience=2"], "train.patience counts periodic evaluations"),
    "patience over samples": ([*EVALUATED, "train.patience=2", "train.eval_samples=5"], "remove train.eval_samples"),
    "patience and periodic checkpoints": (
        [*EVALUATED, "train.patience=2", "checkpoint.every=5"],
        "checkpoint.every beside train.patience",
    ),
    "rl": (["rl.objective=dapo"], "rl would not be used: task is sft"),
    "rl in a gate's run": ([*GATE, "rl.objective=dapo"], "rl would not be used: task is gate"),
    "moe.replay.moves_bias": ([*RL, "moe.replay={enabled: true, moves_bias: true}"], "lists no loss_free"),
    "moves_bias without replay": (
        ["moe.replay.moves_bias=true", "moe.balance=[{kind: loss_free}]"],
        "moe.replay.moves_bias would not be used: moe.replay.enabled is false",
    ),
    "rl.gamma_floor": ([*RL, "rl.gamma_floor=0.5"], "rl.gamma_floor would not be used: rl.router is none"),
    "rl.gamma_place": ([*RL, "rl.gamma_place=after"], "rl.gamma_place would not be used: rl.router is none"),
    "rl.joint_lambda": ([*RL, "rl.joint_lambda=1.0"], "rl.joint_lambda would not be used: rl.router is none"),
    "rl.correction_low": ([*RL, "rl.correction_low=0.5"], "rl.correction is none"),
    "rl.correction_high": ([*RL, "rl.correction_high=5.0"], "rl.correction is none"),
    "rl.correction_level": ([*RL, "rl.correction_level=sequence"], "rl.correction is none"),
    "rl.kl_kind": ([*RL, "rl.kl_kind=k1"], "rl.kl_kind would not be used: rl.kl_weight is 0"),
    "replay without rollouts": (["moe.replay.enabled=true"], "moe.replay.enabled needs task rl"),
    "router terms without replay": ([*RL, "rl.router=joint"], "set moe.replay.enabled to true"),
    "replay of another router": (
        [*RL, "moe.replay.enabled=true", "moe.router.kind=hash"],
        "moe.replay.enabled needs moe.router.kind topk, which is hash",
    ),
    "rl.reward": ([*RL, "rl.reward.function=contains"], "rl.reward would not be used: there is no rl.engine"),
    "rl.reward.function": (
        [*LOCAL, "rl.reward.function=exact", "rl.reward.functions=[{function: contains}]"],
        "rl.reward.function would not be used: rl.reward.functions lists them",
    ),
    **{
        f"rl.reward.{key}": ([*LOCAL, f"rl.reward.{key}={value}"], "would not be used: the rewards are built in")
        for key, value in {"timeout_s": 1.0, "processes": 1, "memory_gb": 1.0, "max_failed": 0.1}.items()
    },
    "rl.reward.overlong_penalty": (
        [*LOCAL, "rl.reward.overlong_penalty=2.0"],
        "rl.reward.overlong_penalty would not be used: rl.reward.overlong_buffer is not set",
    ),
    **{
        f"rl.engine.{key}": ([*LOCAL, f"rl.engine.{key}={value}"], f"rl.engine.{key} would not be used: rl.engine.kind")
        for key, value in {
            "urls": "[http://h:1]",
            "model": "m",
            "key_from": "KEY",
            "in_flight": 8,
            "wait_s": 1.0,
        }.items()
    },
    "an engine nowhere": ([*RL, "rl.engine={prompts: 8}"], "rl.engine.kind vllm needs rl.engine.urls"),
    "a round of broken steps": (
        [*LOCAL, "rl.engine.completions=3"],
        "4 x rl.engine.completions 3 = 12 is no multiple of",
    ),
    "patience between the updates of a batch": (
        [*RL, *EVALUATED, "train.patience=2", "rl.updates_per_batch=2"],
        "train.eval_every 5 evaluates between checkpoints, of which rl.updates_per_batch 2 allows one every 2 steps",
    ),
    "updates beyond a round": ([*LOCAL, "rl.updates_per_batch=3"], "does not divide the 4 steps of a round"),
    "an engine under epochs": ([*LOCAL, "train.steps=null", "train.epochs=2"], "makes new rollouts; set train.steps"),
    "weights among checkpoints": (
        [*LOCAL, "train.output_dir=runs/a", "rl.engine.weights_dir=runs/a/checkpoints"],
        "rl.engine.weights_dir runs/a/checkpoints lies in the folder of checkpoints",
    ),
    "lag without correction": ([*LOCAL, "rl.engine.lag=1"], "set rl.correction to tis, mis or icepop"),
    "no room for a prompt": ([*LOCAL, "rl.engine.max_new_tokens=4096"], "leaves no room for a prompt in data.max_leng"),
    "rl.clip_low": ([*RL, "rl.clip_low=0.1"], "rl.clip_low would not be used: rl.updates_per_batch is 1"),
    "rl.clip_high": ([*RL, "rl.clip_high=0.1"], "rl.clip_high would not be used: rl.updates_per_batch is 1"),
    "rl with dropout": ([*RL, "moe.router.expert_dropout=0.1"], "routes otherwise than the rollouts were; remove it"),
    "rl with noise": ([*RL, "moe.router.kind=noisy_topk"], "noisy_topk routes otherwise than the rollouts were"),
    "a router that cannot have shifted": (
        [*RL, "moe.replay.enabled=true", "rl.router=router_shift"],
        "rl.router router_shift needs rl.updates_per_batch above 1",
    ),
    "bounds of a correction": (
        [*RL, "rl.correction=mis", "rl.correction_low=3.0"],
        "the bounds of mis are 3.0 and 2.0; the low one must be smaller",
    ),
    "a bias that decays in every file": (
        [*RL, "train.steps=null", "train.epochs=1", "train.schedule=constant", "moe.balance=[{kind: loss_free}]"],
        "set its decay_from to 1",
    ),
    "router terms of sigmoid scores": (
        [*RL, "moe.replay.enabled=true", "moe.router.scores=sigmoid", "rl.router=joint"],
        "rl.router joint needs moe.router.scores softmax",
    ),
    "rl on digits": (["task=rl", "data.train=digits"], "data.train is digits, but task rl reads a rollout file"),
    "rl without end": (
        [*RL, "train.steps=null", "train.epochs=1", "train.schedule=linear"],
        "train.schedule linear needs train.steps under task rl",
    ),
    "monitor.sample_images": (
        ["monitor.sample_images=2", "data.eval=digits", "train.eval_generate=false"],
        "sample_images would not be used: train.eval_generate is false",
    ),
}


@pytest.mark.parametrize("overrides, expected", RULES.values(), ids=RULES)
def test_a_rule_names_the_override_at_fault(run, overrides, expected):
    message = complaint(run(), *overrides)
    assert expected in message
    assert message.startswith("override ") or "neither" in message


def test_every_unused_rule_is_tested_and_is_about_a_key():
    assert set(UNUSED) <= set(RULES)
    assert set(UNUSED) <= set(ALL_KEYS)


def test_an_unused_key_names_its_line(run):
    assert complaint(run(BASE.replace("  steps: 10", "  steps: 10\n  eval_every: 5"))) == (
        "run.yaml:9: train.eval_every would not be used: data.eval is not set, so nothing is evaluated; remove it"
    )


MOE, DENSE, TEXT = Qwen3VLMoeConfig(), Qwen3VLConfig(), Qwen3MoeConfig()  # 60, no and 128 experts


@pytest.mark.parametrize(
    "model, overrides, expected",
    [
        (MOE, ["moe=null"], "a qwen3_vl_moe model has experts but the run has no moe section"),
        (DENSE, [], "run.yaml:5: section moe would not be used: qwen3_vl is a dense model"),
        (
            DENSE,
            ["moe=null", *SHARED[:1], "train.sequence_parallel=5"],
            "train.sequence_parallel 5 does not divide the ",
        ),
        (MOE, ["moe.ep_size=8"], "moe.ep_size 8 does not divide the model's 60 experts (1, 2, 3, 4, 5, 6, 10, 12"),
        (MOE, ["moe.router.top_k=61"], "moe.router.top_k 61 exceeds the model's 60 experts"),
        (MOE, ["moe.router={groups: 7, top_groups: 2}"], "moe.router.groups 7 does not divide the 60 experts"),
        (MOE, ["moe.router={groups: 4, top_groups: 5}"], "moe.router.top_groups 5 exceeds moe.router.groups 4"),
        (MOE, ["moe.router={groups: 30, top_groups: 1}"], "leaves 2 experts, fewer than the top_k of 4"),
        (MOE, ["moe.router={top_k: 1, expert_dropout: 0.1}"], "moe.router.expert_dropout would not be used"),
        (TEXT, [], 'data.train is "digits", images that the text-only qwen3_moe model cannot see'),
        (TEXT, ["data.train=a.jsonl", "data.max_pixels=9"], "data.max_pixels would not be used: qwen3_moe takes no"),
    ],
)
def test_the_run_must_fit_its_model(run, model, overrides, expected):
    config = load_run(run(), overrides)
    with pytest.raises(UserError) as raised:
        check_model(config, model)
    assert expected in str(raised.value)


def test_runs_that_fit_their_models(run):
    check_model(load_run(run()), MOE)
    check_model(load_run(run(), ["moe=null"]), DENSE)
    check_model(load_run(run(), ["data.train=a.jsonl"]), TEXT)
