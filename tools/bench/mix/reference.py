"""What plain transformers makes of the records: sample by sample, without padding, in one process."""

from pathlib import Path

import torch

from ds_moe.data.encode import collate
from ds_moe.models.processor import load_processor
from tools.bench.mix.model import plain_model
from tools.bench.mix.rivals import encoded_records, global_batches


def references(model_folder: Path, records: Path, batch_size: int, max_length: int, max_pixels: int) -> list[dict]:
    """For each global batch its loss (a mean over labels), the norm of its gradients, and its tokens."""
    processor, model = load_processor(model_folder), plain_model(model_folder)
    found = []
    for batch in global_batches(encoded_records(records, processor, max_length, max_pixels), batch_size):
        rows = [collate([sample], processor) for sample in batch]
        labels = sum(int(row.label_tokens) for row in rows)
        model.zero_grad()
        loss = 0.0
        for row in rows:
            own = model(**row.with_labels, use_cache=False, num_items_in_batch=labels).loss
            own.backward()
            loss += own.item()
        norms = [parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack(norms).norm().item()
        found.append({"loss": loss, "grad_norm": norm, "tokens": sum(int(row.tokens) for row in rows)})
    return found


def lengths(model_folder: Path, records: Path, max_length: int, max_pixels: int) -> list[tuple[int, int, int]]:
    """(tokens, image tokens, labelled tokens) of each record."""
    processor = load_processor(model_folder)
    merged = processor.image_processor.merge_size**2
    return [
        (len(one.input_ids), int(one.image_grid_thw.prod()) // merged, int((one.labels[1:] != -100).sum()))
        for one in encoded_records(records, processor, max_length, max_pixels)
    ]
