"""Makes trl.json: what TRL's DPOTrainer (simpo: CPOTrainer) finds on the model and the pairs of `tiny_policy.py`.

TRL is no dependency. In an environment of its own that also sees this project and its packages:

    pip install trl && python -m tests.tasks.dpo.trl_values
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from datasets import Dataset
from trl.experimental.cpo import CPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ds_moe.data.batch import NO_LOSS
from ds_moe.models.processor import tiny_processor
from tests.tasks.dpo.tiny_policy import (
    BETA,
    LOSSES,
    TEXTS,
    encoded_pairs,
    gradient_digest,
    model_digest,
    policy_and_reference,
)

TYPES = {"dpo": ["sigmoid"], "ipo": ["ipo"], "hinge": ["hinge"], "robust": ["robust"]}


def examples(processor):
    """Prompt and answers as TRL's collator takes them: our own ids."""
    found = []
    for pair in encoded_pairs(processor):
        chosen, rejected = pair.sequences()
        [start, other] = [int((one.labels != NO_LOSS).nonzero()[0]) for one in (chosen, rejected)]
        assert start == other and torch.equal(chosen.input_ids[:start], rejected.input_ids[:start])
        answers = []
        for one in (chosen, rejected):
            learned = (one.labels != NO_LOSS).nonzero().flatten()
            assert learned.tolist() == list(range(start, start + len(learned)))  # one piece
            answers.append(one.input_ids[start : start + len(learned)].tolist())  # what follows is not looked at
        found.append(
            {"prompt_ids": chosen.input_ids[:start].tolist(), "chosen_ids": answers[0], "rejected_ids": answers[1]}
        )
    return found


def by_trl(settings, processor, folder):
    policy, reference = policy_and_reference()
    types, weights = list(TYPES[settings["loss"]]), [1.0]
    if "rpo_alpha" in settings:
        types, weights = [*types, "sft"], [1.0, settings["rpo_alpha"]]
    arguments = trl.DPOConfig(
        output_dir=folder,
        beta=BETA,
        loss_type=types,
        loss_weights=weights,
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    rows = [{"prompt": question, "chosen": chosen, "rejected": rejected} for question, chosen, rejected in TEXTS]
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),  # only to make the trainer: the batches below have our ids
        processing_class=processor.tokenizer,
    )
    collate = DataCollatorForPreference(processor.tokenizer.pad_token_id)
    trainer.model.train()  # there is no dropout; its figures are kept by mode
    every = examples(processor)
    batches = [[one] for one in every] if "rpo_alpha" in settings else [every]
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(trainer.model, collate(batch)) / len(batches)
        part.backward()
        loss += part.item()
    metrics = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return policy, loss, {
        "logp_chosen": metrics["logps/chosen"],
        "logp_rejected": metrics["logps/rejected"],
        "reward_chosen": metrics["rewards/chosen"],
        "reward_rejected": metrics["rewards/rejected"],
    }  # fmt: skip


def by_cpo(settings, processor):
    """SimPO: CPOTrainer's log-probs and loss, without its data pipeline."""
    policy, _ = policy_and_reference()
    batch = DataCollatorForPreference(processor.tokenizer.pad_token_id)(examples(processor))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, NO_LOSS)
    logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    sums, means = (CPOTrainer.get_batch_logps(logits, labels, average_log_prob=mean) for mean in (False, True))
    trainer = SimpleNamespace(
        loss_type="simpo",
        beta=BETA,
        simpo_gamma=settings["margin"],
        label_smoothing=settings["label_smoothing"],
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *means.chunk(2))
    losses.mean().backward()
    figures = {"logp_chosen": sums.chunk(2)[0], "logp_rejected": sums.chunk(2)[1]}
    figures |= {"reward_chosen": chosen, "reward_rejected": rejected}
    return policy, losses.mean().item(), {name: one.mean().item() for name, one in figures.items()}


def main():
    processor, found = tiny_processor("text"), {}
    for name, settings in LOSSES.items():
        with tempfile.TemporaryDirectory() as folder:
            of_trl = by_cpo(settings, processor) if name == "simpo" else by_trl(settings, processor, folder)
        policy, loss, figures = of_trl
        found[name] = {"loss": loss, **figures, "gradients": gradient_digest(policy)}
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    result = {"versions": versions, "model": model_digest(policy_and_reference()[0]), "losses": found}
    Path(__file__).with_name("trl.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
