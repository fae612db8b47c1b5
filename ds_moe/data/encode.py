"""Samples become tensors: `encode` makes ids, labels and patches of one sample, `collate` a micro-batch of several.

Shapes: B samples in R rows of S tokens (see `batch.py`), P patches of all their images, I images.

To a model a video is a row of images, one for each group of frames (two of them), between which the prompt says the
time. transformers computes a video so too, only under names of its own; here images and videos share one pass of the
vision tower, so that ranks with either keep step with those without. What is said of images below, of tokens and
patches, means groups of frames as well.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ds_moe.config.sections import VideoConfig
from ds_moe.data.ahead import MadeAhead, Patches
from ds_moe.data.batch import NO_LOSS, Batch
from ds_moe.data.chat import Sample, final_answer
from ds_moe.data.chat_template import DEFAULT_RULES, TokenRules, tokenize
from ds_moe.data.images import ImageSource, RecordError, image_size, load_image, shown_size
from ds_moe.data.patches import table_of
from ds_moe.data.processor import ImageProcessor, Processor, VideoReader
from ds_moe.data.special_tokens import text_of
from ds_moe.data.videos import Film, VideoPlan, VideoSource, frames_of, look
from ds_moe.errors import one_line

Pixels = bool | MadeAhead  # whether images are decoded, or what makes their patches


@dataclass(frozen=True)
class Encoded:
    """The tensors of one sample, unpadded."""

    input_ids: Tensor  # (S,) int64
    labels: Tensor  # (S,) int64, NO_LOSS outside assistant turns
    prompt: int  # so many ids precede the last answer: its generation starts from them
    pixel_values: Tensor | None = None  # (P, ...) float32, a row a patch; or its bytes, see `patches.py`
    image_grid_thw: Tensor | None = None  # (I, 3) int64, patches a side; 1 in the first column of videos
    real: bool = True  # False for a filler
    kind: str | None = None  # the record's own label

    @property
    def nbytes(self) -> int:
        tensors = (self.input_ids, self.labels, self.pixel_values)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def encode(
    sample: Sample,
    processor: Processor,
    max_length: int,
    max_pixels: int,
    rules: TokenRules = DEFAULT_RULES,
    pixels: Pixels = True,
) -> Encoded:
    """Decode the images and videos of a sample and tokenize it. What the model writes is a label, end tokens included.

    With `pixels` False none is decoded: the tokens are the same ones, and `pixel_values` and the grid are None.
    `input_ids` are those of the prompt, in which videos have a token of their own.

    Raises:
        RecordError: what `tokenize` refuses; an image or a video that does not decode or has more than `max_pixels`
            pixels, either for a text-only model, or more than `max_length` tokens, theirs included: nothing is cut off.
    """
    if sample.grounded and not processor.grounds:
        raise RecordError("the record has 'objects', but how this model writes boxes is not known (write them as text)")
    reader = processor.video_reader(rules.video) if sample.videos else None
    films = [look(video, rules.video, max_pixels) for video in sample.videos]
    plans = [reader.plan(film, video.name) for film, video in zip(films, sample.videos, strict=True)] if reader else []
    pixel_values, grid, image_ids = encode_images(sample.images, processor, max_pixels, pixels)
    if plans and pixel_values is not None and pixel_values.dtype == torch.uint8:
        pixel_values = table_of(processor).floats(pixel_values)  # as those of videos are
    tokens = tokenize(sample.turns, processor, image_ids, sample.tools, rules, plans)
    of_media = tokens_of_images(image_ids, processor) + sum(plan.tokens * plan.grid[0] for plan in plans)
    check_length(len(tokens.ids), of_media, max_length)  # before a video is decoded
    if plans and pixels:
        pixel_values, grid = _with_videos(sample, films, plans, reader, (pixel_values, grid), max_pixels, rules.video)
    input_ids = torch.tensor(tokens.ids)
    labels = torch.where(torch.tensor(tokens.label), input_ids, NO_LOSS)
    return Encoded(input_ids, labels, tokens.prompt, pixel_values, grid, kind=sample.kind)


def answer_text(encoded: Encoded, processor: Processor, content_tokens: Sequence[str] = ()) -> str:
    """The last answer as its template writes it, tool calls too, without its thought and control tokens."""
    ids = encoded.input_ids[encoded.prompt :].tolist()
    return final_answer(text_of(ids, processor, content_tokens)).strip() if encoded.real else ""


def encode_images(
    sources: list[ImageSource], processor: Processor, max_pixels: int, pixels: Pixels = True
) -> tuple[Tensor | None, Tensor | None, list[list[int]]]:
    """(pixel_values, image_grid_thw, what stands in `input_ids` for each image); (None, None, []) without images.

    With `pixels` False only the images' headers are read, and the first two are None.

    Raises:
        RecordError: as `encode` does for images; without pixels not for an image that is cut off.
    """
    if not sources:
        return None, None, []
    prepare = processor.image_processor
    if prepare is None:
        raise RecordError("the record has an image, but the model reads text only (use a vision-language model)")
    merged = prepare.merge_size**2
    if not pixels and prepare.do_resize:  # else its rule for sizes is not the one that it follows
        sizes = [image_size(source, max_pixels) for source in sources]
        sizes = [shown_size(source) for source in sources] if processor.cuts else sizes
        with _refusing():
            counts = [prepare.get_number_of_image_patches(height, width) for width, height in sizes]
        tokens = [count // merged for count in counts]
        return None, None, _ids_of_images(tokens, sizes, processor)
    pixel_values, grid = pixels.take() if isinstance(pixels, MadeAhead) else patches_of(sources, prepare, max_pixels)
    sizes = [shown_size(source) for source in sources] if processor.cuts else [None] * len(sources)
    return pixel_values, grid, _ids_of_images((grid.prod(-1) // merged).tolist(), sizes, processor)


def _ids_of_images(tokens: list[int], sizes: Sequence[tuple[int, int] | None], processor: Processor) -> list[list[int]]:
    return [processor.image_ids(count, size) for count, size in zip(tokens, sizes, strict=True)]


def tokens_of_images(image_ids: list[list[int]], processor: Processor) -> int:
    """How many of the ids that stand for images are tokens of theirs, and do not frame them."""
    return sum(ids.count(processor.image_token_id) for ids in image_ids if processor.image_token_id is not None)


def patches_of(sources: list[ImageSource], prepare: ImageProcessor, max_pixels: int) -> Patches:
    """Of images that are decoded now. Raises `RecordError`."""
    images = [load_image(source, max_pixels) for source in sources]
    with _refusing():
        patches = prepare(images=images, return_tensors="pt")
    return patches["pixel_values"], patches["image_grid_thw"]


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # such as an aspect ratio above 200; a broken processor may raise anything
        raise RecordError(f"an image is refused by the model's processor: {one_line(error)} (crop it)") from error


def _with_videos(
    sample: Sample,
    films: list[Film],
    plans: list[VideoPlan],
    reader: VideoReader,
    of_images: tuple[Tensor | None, Tensor | None],
    max_pixels: int,
    settings: VideoConfig,
) -> tuple[Tensor, Tensor]:
    """(pixel_values, image_grid_thw) of the images and the videos of a sample, in the order of the conversation."""
    pixel_values, image_grid = of_images
    grids = [] if image_grid is None else list(image_grid.split(1))
    patches = [] if image_grid is None else list(pixel_values.split(image_grid.prod(-1).tolist()))
    images, videos = iter(zip(patches, grids, strict=True)), iter(zip(films, plans, strict=True))
    found: list[tuple[Tensor, Tensor]] = []
    for one in sample.media:
        if not isinstance(one, VideoSource):
            found.append(next(images))
            continue
        film, plan = next(videos)
        frames = frames_of(one, film, list(dict.fromkeys(plan.indices)), settings, max_pixels)
        groups, rows, columns = plan.grid
        found.append((reader.patches(frames, plan), torch.tensor([[1, rows, columns]] * groups)))
    if len({pixels.dtype for pixels, _ in found}) > 1:
        raise TypeError("torch would join patches of several dtypes without a word")
    return torch.cat([pixels for pixels, _ in found]), torch.cat([grid for _, grid in found])


def seen(input_ids: Tensor, processor: Processor) -> Tensor:
    """Which tokens stand for patches, of images or of videos."""
    return torch.isin(input_ids, torch.tensor(processor.seen_ids, dtype=input_ids.dtype))


def check_length(tokens: int, of_images: int, max_length: int) -> None:
    """Raise `RecordError` for a sample of more than `max_length` tokens, `of_images` of them of images or videos."""
    if tokens > max_length:
        reason = f"over-long: {tokens} tokens, {of_images} of them of images or videos, beyond data.max_length"
        raise RecordError(f"{reason} {max_length} (shorten the record, or raise the limit)")


def filler(processor: Processor) -> Encoded:
    """A sample of one token without a label: it fills up the last batch, or replaces a bad record."""
    return Encoded(torch.tensor([processor.tokenizer.eos_token_id]), torch.tensor([NO_LOSS]), prompt=1, real=False)


def collate(
    encoded: list[Encoded], processor: Processor, side: Literal["right", "left"] = "right", packed: bool = False
) -> Batch:
    """A micro-batch of padded rows, one sample each; with `packed`, of one row without padding, in the same order.

    Its inputs are input_ids (R, S) int64; for a VL model that takes them mm_token_type_ids (R, S), 1 on image tokens,
    and, only if there is an image, what `Processor.image_inputs` and `Processor.tower_inputs` give. Padded rows have an
    attention_mask (R, S) and, if there is an image, the position_ids, (R, S) or (3, R, S), that transformers would make
    on the device, image by image. A packed row has position_ids, which begin anew with every sample, and what
    `sample_bounds` gives.
    Of bytes of images `Batch.to` makes floats.
    """
    pad_id = processor.tokenizer.pad_token_id
    ids = [one.input_ids.where(~seen(one.input_ids, processor), processor.image_token_id or 0) for one in encoded]
    inputs: dict[str, Any] = {"input_ids": lay_out(ids, pad_id, packed, side)}
    # `generate`, whose rows are padded on the left, makes positions and the tower's inputs by itself.
    made_here = side == "right" and any(one.pixel_values is not None for one in encoded)
    if packed or made_here:
        own = [processor.position_ids(one.input_ids, one.image_grid_thw).movedim(-1, 0) for one in encoded]
        positions = lay_out(own, 0, packed)
        inputs["position_ids"] = positions if positions.dim() == 2 else positions.movedim(-1, 0)[0 if packed else 1 :]
    if not packed:
        inputs["attention_mask"] = lay_out([torch.ones_like(one.input_ids) for one in encoded], 0, packed, side)
    pixels = [one.pixel_values for one in encoded if one.pixel_values is not None]
    if len({one.dtype for one in pixels}) > 1:  # images in bytes, and floats of videos
        pixels = [table_of(processor).floats(one) if one.dtype == torch.uint8 else one for one in pixels]
    if processor.image_processor is not None:
        if processor.takes_types:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).long()
        grids = [one.image_grid_thw for one in encoded if one.image_grid_thw is not None]
        if pixels:
            sizes = torch.cat(grids)
            inputs |= processor.image_inputs(torch.cat(pixels), sizes)
            if made_here:
                inputs |= processor.tower_inputs(sizes)
    labels = lay_out([one.labels for one in encoded], NO_LOSS, packed, side)
    real_B = torch.tensor([one.real for one in encoded])
    if packed:
        batch = Batch.of_packed(inputs, labels, [len(one.input_ids) for one in encoded], real_B)
    else:
        batch = Batch.of_rows(inputs, labels, real_B)
    if pixels and pixels[0].dtype == torch.uint8:
        batch.pixel_table = table_of(processor)
    return batch


def collate_prompts(encoded: list[Encoded], processor: Processor) -> Batch:
    """Each sample's prompt of its last answer, padded on the left, for `generate`."""
    prompts = [replace(one, input_ids=one.input_ids[: one.prompt], labels=one.labels[: one.prompt]) for one in encoded]
    return collate(prompts, processor, side="left")


def lay_out(
    values: Sequence[Tensor], fill: float, packed: bool = False, side: Literal["right", "left"] = "right"
) -> Tensor:
    """Values of each sample, (S, ...), in the rows of a micro-batch: (B, longest, ...) with `fill` on one side of the
    shorter ones, or (1, sum of all, ...) with `packed`."""
    if packed:
        return torch.cat(list(values)).unsqueeze(0)
    return pad_sequence(list(values), batch_first=True, padding_value=fill, padding_side=side)
