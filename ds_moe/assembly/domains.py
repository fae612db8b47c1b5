"""Routers from data: each expert's row points to the mean hidden state of that expert's domain."""

import random
from functools import partial

import torch
from torch import Tensor, nn

from ds_moe.assembly.dense import DenseModel
from ds_moe.config.sections import DataConfig, ModelConfig
from ds_moe.data.images import RecordError
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records
from ds_moe.data.records import open_records
from ds_moe.errors import UserError
from ds_moe.models.families import family_of
from ds_moe.models.load import load_model
from ds_moe.models.processor import load_processor


def open_domain(path: str) -> Records:
    """A data file (its first bad record is an error), or "digits": the training split of the bundled scans."""
    return open_records(path, "train", DataConfig(train=path))


@torch.no_grad()
def hidden_means(model: DenseModel, domains: list[Records], samples: int, seed: int) -> Tensor:
    """(domains, layers, H) fp32: the mean input of each layer's FFN over all tokens of a domain, image tokens included.

    The whole model is loaded, on the accelerator if there is one. Each sample is a forward of its own; of a domain
    `samples` are used, chosen by `seed`, or all if there are fewer.
    """
    processor = load_processor(model.folder)
    loaded = load_model(ModelConfig(path=str(model.folder)), model.dtype).eval()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    loaded.to(device)
    ffns = [layer.mlp for layer in loaded.get_submodule(f"{family_of(loaded).decoder}.layers").children()]
    sums_LH = torch.zeros(len(ffns), loaded.config.get_text_config().hidden_size, dtype=torch.float64)

    def add(layer: int, ffn: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums_LH[layer] += args[0].flatten(0, -2).sum(0, dtype=torch.float64).cpu()

    for layer, ffn in enumerate(ffns):
        ffn.register_forward_pre_hook(partial(add, layer))
    means = []
    for records in domains:
        sums_LH.zero_()
        tokens = 0
        chosen = random.Random(seed).sample(range(len(records)), min(samples, len(records)))
        for index in sorted(chosen):
            inputs = _inputs(records, index, processor)
            loaded(**{key: value.to(device) for key, value in inputs.items()})
            tokens += inputs["input_ids"].numel()
        means.append((sums_LH / tokens).float())
    return torch.stack(means)


def router_rows(means_DLH: Tensor, std: float) -> Tensor:
    """(layers, domains, H): each domain's mean minus the mean over the domains, scaled to an RMS of `std`.

    The part that all domains have in common is left out: it would add the same number to every logit, which does not
    change a softmax.

    Raises:
        UserError: domains whose means do not differ.
    """
    directions_DLH = means_DLH - means_DLH.mean(0)
    rms_DL1 = directions_DLH.square().mean(-1, keepdim=True).sqrt()
    if not rms_DL1.all():
        raise UserError("branches.router: the domains' hidden means do not differ; give each expert data of its own")
    return (directions_DLH / rms_DL1 * std).transpose(0, 1)


def _inputs(records: Records, index: int, processor: Processor) -> dict[str, Tensor]:
    """One record as the model's forward takes it, without labels."""
    limits = DataConfig(train="the records")
    try:
        encoded = records.record_kind.encode(records.sample(index), processor, limits.max_length, limits.max_pixels)
    except RecordError as error:
        raise UserError(f"{records.where(index)}: {error}") from error
    return records.record_kind.collate([encoded], processor).inputs
