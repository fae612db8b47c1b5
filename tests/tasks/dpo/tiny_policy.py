"""A tiny dense policy, its reference and five pairs: what TRL's trainer and ours are compared on."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ds_moe.config.run import RunConfig
from ds_moe.data.batch import NO_LOSS
from ds_moe.distributed import Topology
from ds_moe.models.processor import tiny_processor
from ds_moe.tasks.dpo.pair_record import parse_pair
from ds_moe.tasks.dpo.pairs import PAIRS
from ds_moe.tasks.dpo.task import PreferenceOptimization
from ds_moe.tasks.task import TrainingParts

CPU = Topology(rank=0, world_size=1, local_rank=0, ep_size=1, device=torch.device("cpu"))
BETA = 0.3
# Name -> our section `dpo`. The SFT term is a mean over a pair's tokens here and over a micro-batch's there, so TRL is
# given that one a pair at a time.
LOSSES = {
    "dpo": {"loss": "dpo"},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "dpo and sft": {"loss": "dpo", "rpo_alpha": 0.7},
    "simpo": {"loss": "simpo", "margin": 0.6, "label_smoothing": 0.1},
}
TEXTS = [
    ("Is this digit even or odd?", "even", "odd"),
    ("Which digit is this?", "This digit is even.", "7"),
    ("Is the number five or more?", "no", "Tell me whether this number is five or more."),
    ("Even or odd?", "odd", "Read the digit"),
    ("What number is written here?", "The number in the image is odd", "yes, five or more"),
]
PROJECTIONS = 3


def policy_and_reference():
    """Two models whose log-probs differ."""
    tokenizer = tiny_processor("text").tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer), tie_word_embeddings=False
    )
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Qwen3ForCausalLM(config)
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.data += (0.3 if seed == 0 else 0.25) * torch.randn_like(parameter)
        models.append(model.eval())
    return models


def model_digest(model):
    return [float(parameter.detach().double().square().sum()) for parameter in model.parameters()]


def encoded_pairs(processor):
    pairs = []
    for question, chosen, rejected in TEXTS:
        record = {"prompt": question, "chosen": chosen, "rejected": rejected}
        pairs.append(PAIRS.encode(parse_pair(record, "tiny:1", None), processor, 512, 1))
    return pairs


def gradient_digest(model):
    """Of each parameter's gradient the norm, and products with fixed directions of length 1."""
    found = {}
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        gradient = parameter.grad.double()
        directions = torch.randn(PROJECTIONS, *gradient.shape, generator=generator, dtype=torch.float64)
        products = [float((one / one.norm() * gradient).sum()) for one in directions]
        found[name] = [float(gradient.norm()), *products]
    return found


class Bare:
    """A model in the place of an engine."""

    def __init__(self, model):
        self.module, self.eval, self.train = model, model.eval, model.train

    def __call__(self, **inputs):
        return self.module(**inputs)


def found_by_ours(name, packed, swapped=False):
    processor = tiny_processor("text")
    config = RunConfig(
        task="dpo",
        model={"preset": "tiny-moe"},
        data={"train": "-"},
        dpo={"beta": BETA, **LOSSES[name]},
        deepspeed="none",
    )
    policy, reference = policy_and_reference()
    task = PreferenceOptimization(TrainingParts(config, CPU, Bare(policy), None))
    batch = PAIRS.collate(encoded_pairs(processor), processor, packed=packed)
    batch.reference_P2 = reference_logprobs(reference, processor)
    if swapped:
        batch.reference_P2 = batch.reference_P2.flip(1)
    loss = task.loss(batch, share=len(TEXTS))
    loss.backward()
    pairs = task._sums["pairs"]
    figures = ("logp_chosen", "logp_rejected", "reward_chosen", "reward_rejected")
    means = {figure: float(task._sums[figure] / pairs) for figure in figures}
    return {"loss": loss.item(), "gradients": gradient_digest(policy), **means}


@torch.no_grad()
def reference_logprobs(reference, processor):
    """(P, 2), sequence by sequence."""
    found = []
    for pair in encoded_pairs(processor):
        for one in pair.sequences():
            logprob_SV = reference(one.input_ids.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
            target = one.labels[1:]
            kept = target != NO_LOSS
            found.append(logprob_SV[kept].gather(1, target[kept].unsqueeze(1)).sum())
    return torch.stack(found).view(-1, 2)


def found_in_float64(name):
    """Loss and gradients by plain formulas, each sequence in a forward of its own, from the same fp32 weights."""
    settings, processor = LOSSES[name], tiny_processor("text")
    policy, reference = (model.double() for model in policy_and_reference())
    pairs = encoded_pairs(processor)
    for pair in pairs:
        chosen, rejected = (_sums(policy, reference, one) for one in pair.sequences())
        (_plain_loss(settings, *chosen, *rejected) / len(pairs)).backward()
    return gradient_digest(policy)


def _sums(policy, reference, sequence):
    """Log-prob of an answer by the policy, by the reference, and its tokens."""
    target = sequence.labels[1:]
    kept, found = target != NO_LOSS, []
    for model in (policy, reference):
        logprob_SV = model(sequence.input_ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
        found.append(logprob_SV[kept].gather(1, target[kept].unsqueeze(1)).sum())
    return found[0], found[1].detach(), int(kept.sum())


def _plain_loss(settings, chosen, chosen_reference, chosen_tokens, rejected, rejected_reference, rejected_tokens):
    smoothing, kind = settings.get("label_smoothing", 0.0), settings["loss"]
    first, second = chosen - chosen_reference, rejected - rejected_reference
    margin = BETA * (first - second)
    if kind == "simpo":
        margin = BETA * (chosen / chosen_tokens - rejected / rejected_tokens) - settings["margin"]
    wins, loses = -torch.log(torch.sigmoid(margin)), -torch.log(torch.sigmoid(-margin))
    loss = {
        "dpo": lambda: wins,
        "ipo": lambda: (first / chosen_tokens - second / rejected_tokens - 1 / (2 * BETA)) ** 2,
        "hinge": lambda: (1 - margin).clamp(min=0),
        "robust": lambda: ((1 - smoothing) * wins - smoothing * loses) / (1 - 2 * smoothing),
        "simpo": lambda: (1 - smoothing) * wins + smoothing * loses,
    }[kind]()
    return loss - settings.get("rpo_alpha", 0.0) * chosen / chosen_tokens
