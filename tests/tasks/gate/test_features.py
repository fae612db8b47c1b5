"""Features of the gate: what may change them (the request, the screen) and what must not (padding, images, answers)."""

import pytest
import torch
from PIL import Image

from ds_moe.data.encode import lay_out
from ds_moe.models.presets import build_preset
from ds_moe.models.processor import special_token_ids, tiny_processor
from ds_moe.tasks.gate import features as gate
from ds_moe.tasks.gate.features import first_text, last_text, mean_text, mean_vision, prompt_mask

PAD, IMAGE, VIDEO, START, END = 0, 1, 2, 3, 4  # of the hand-made batches
NOT_TEXT = {IMAGE, VIDEO, START, END}
D = 7
IDS = special_token_ids(tiny_processor("vl"))  # of the tiny model
POOLS = [mean_text, last_text, first_text]
# (prompt, answer): two images, one, none.
ROWS = [
    ([20, START, IMAGE, IMAGE, END, 31, START, IMAGE, END, 22], [33, 34]),
    ([20, START, IMAGE, IMAGE, IMAGE, END, 25], [36]),
    ([20, 28, 29], [30, 31, 32]),
]


def batch(rows=ROWS, side="right"):
    """(input_ids, attention_mask, labels), each (B, S)."""
    columns = [
        ([prompt + answer for prompt, answer in rows], PAD),
        ([[1] * len(prompt + answer) for prompt, answer in rows], 0),
        ([[-100] * len(prompt) + answer for prompt, answer in rows], -100),
    ]
    return [lay_out([torch.tensor(row) for row in column], fill, side=side) for column, fill in columns]


def embed(input_ids):
    return torch.randn(40, D, generator=torch.Generator().manual_seed(1))[input_ids]


@pytest.fixture(scope="module")
def model():
    return build_preset("tiny-vl-dense").eval()


def real_batch(questions, side="right"):
    """(model inputs, text mask) of prompts of the tiny model, each <image> a new 16x16 or 32x16 one, in turns."""
    processor = tiny_processor("vl")
    marked = [question.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>") for question in questions]
    texts = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in marked]
    count = "".join(questions).count("<image>")
    images = [Image.new("RGB", (16 + 16 * (index % 2), 16), (250, 10, 90)) for index in range(count)]
    made = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
    not_text = {IDS[f"{name}_token_id"] for name in ("image", "video", "vision_start", "vision_end")}
    return made, prompt_mask(made["input_ids"], made["attention_mask"], None, not_text)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mask_keeps_exactly_the_text_of_the_prompt(side):
    input_ids, attention, labels = batch(side=side)
    mask = prompt_mask(input_ids, attention, labels, NOT_TEXT)
    assert mask.dtype == torch.bool
    for row, (prompt, _) in enumerate(ROWS):
        assert input_ids[row][mask[row]].tolist() == [token for token in prompt if token not in NOT_TEXT]


def test_the_mask_stops_at_the_first_answer_of_several_and_takes_what_is_given():
    input_ids = torch.tensor([[20, 21, 30, 22, 23, 31]])
    labels = torch.tensor([[-100, -100, 30, -100, -100, 31]])
    assert prompt_mask(input_ids, None, labels, []).tolist() == [[True, True, False, False, False, False]]
    attention = torch.tensor([[False, True, True, True, True, True]])
    assert prompt_mask(input_ids, attention, None, [23]).tolist() == [[False, True, True, True, False, True]]
    assert attention.tolist() == [[False, True, True, True, True, True]]
    assert not prompt_mask(input_ids, attention, input_ids, []).any()


@pytest.mark.parametrize("pool", POOLS)
def test_padding_side_does_not_matter(pool):
    made = {}
    for side in ("left", "right"):
        input_ids, attention, labels = batch(side=side)
        made[side] = pool(embed(input_ids), prompt_mask(input_ids, attention, labels, NOT_TEXT))
    texts = [embed(torch.tensor([token for token in prompt if token not in NOT_TEXT])) for prompt, _ in ROWS]
    oracle = {mean_text: lambda rows: rows.mean(0), last_text: lambda rows: rows[-1], first_text: lambda rows: rows[0]}
    for features in made.values():
        torch.testing.assert_close(features, torch.stack([oracle[pool](rows) for rows in texts]))


@pytest.mark.parametrize("pool", POOLS)
def test_images_padding_and_answers_do_not_touch_text_features(pool):
    input_ids, attention, labels = batch()
    mask, hidden = prompt_mask(input_ids, attention, labels, NOT_TEXT), embed(input_ids)
    perturbed = torch.where(mask.unsqueeze(-1), hidden, torch.full_like(hidden, float("nan")))
    assert pool(perturbed, mask).equal(pool(hidden, mask))
    assert not pool(hidden + 1, mask).equal(pool(hidden, mask))


def changed_answer(pool, labels_given):
    """Whether other answers, of the same length, change the features."""
    features = []
    for answers in ([33, 34], [36], [30, 31, 32]), ([23, 24], [26], [20, 21, 22]):
        rows = [(prompt, answer) for (prompt, _), answer in zip(ROWS, answers, strict=True)]
        input_ids, attention, labels = batch(rows)
        mask = prompt_mask(input_ids, attention, labels if labels_given else None, NOT_TEXT)
        features.append(pool(embed(input_ids), mask))
    return (features[0] != features[1]).any(1).tolist()


def test_answers_do_not_leak():
    assert [changed_answer(pool, labels_given=True) for pool in POOLS] == [[False] * 3] * 3


def test_leaked_answer_is_noticed():
    """The negative control: a mask that is not told the labels lets the answer in, and this very check sees it."""
    assert [changed_answer(pool, labels_given=False) for pool in (mean_text, last_text)] == [[True] * 3] * 2


@pytest.mark.parametrize("pool", POOLS)
def test_rows_without_text_give_zeros_and_finite_gradients(pool):
    hidden = torch.randn(3, 5, D, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    features = pool(hidden, mask)
    assert features.dtype == torch.float32 and (features[1] == 0).all() and features[[0, 2]].abs().min() > 0
    features.square().sum().backward()
    touched = hidden.grad.abs().sum(-1) > 0  # false at NaN as well
    assert hidden.grad.isfinite().all() and not (touched & ~mask).any() and touched.any(1).equal(mask.any(1))


def test_a_bf16_mean_is_summed_in_fp32():
    hidden = (torch.arange(3001) % 2 + 1.0).bfloat16().view(1, -1, 1)  # the sum, 4501, is no bf16 number
    mean = torch.tensor([[4501 / 3001]])
    assert mean_text(hidden, hidden[..., 0] > 0).equal(mean)
    assert mean_vision([hidden[0]], torch.tensor([1]), 1)[0].equal(mean)


def test_first_text_is_the_same_for_every_prompt_and_the_others_are_not(model):
    questions = ["Which digit is this?", "Close the window", "Open it, please, and tell me what you see", "<image>Hi"]
    made = {}
    for side in ("right", "left"):
        inputs, mask = real_batch(questions, side)
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        for pool in POOLS:
            made[pool, side] = pool(hidden, mask)
            distances = torch.pdist(made[pool, side]) / made[pool, side].norm(dim=1).mean()
            assert distances.max() < 1e-5 if pool is first_text else distances.min() > 1e-2
    for (pool, _), features in made.items():
        torch.testing.assert_close(features, made[pool, "right"], atol=1e-4, rtol=1e-4)


def test_real_images_are_counted_and_averaged_by_sample(model):
    made, _ = real_batch(["<image> or <image>?", "Hi", "<image>Which?"])
    counts = gate.image_counts(made["input_ids"], IDS["image_token_id"], IDS["vision_start_token_id"])
    pooled = model.model.get_image_features(made["pixel_values"], made["image_grid_thw"]).pooler_output
    features, present = mean_vision(pooled, counts, 64)
    assert counts.tolist() == [2, 0, 1] and present.tolist() == [True, False, True]
    assert [len(image) for image in pooled] == [4, 8, 4] and features.shape == (3, 64)
    torch.testing.assert_close(features[[0, 2]], torch.stack([torch.cat(pooled[:2]).mean(0), pooled[2].mean(0)]))


def test_images_are_counted_where_a_vision_start_precedes_them():
    counts = gate.image_counts(batch()[0], IMAGE, START)
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 1, 0]
    tricky = torch.tensor([[START, VIDEO, END, START, IMAGE, IMAGE], [IMAGE, START, END, IMAGE, 20, START]])
    assert gate.image_counts(tricky, IMAGE, START).tolist() == [1, 0]  # a video, a start that ends the row


@pytest.mark.parametrize("counts", [[1, 0, 3, 0], [0, 0, 4, 0], [2, 2, 0, 0], [0, 1, 1, 2]])
def test_vision_means_against_a_loop(counts):
    pooled = [torch.randn(size, D, requires_grad=True) for size in (3, 9, 1, 4)]
    features, present = mean_vision(pooled, torch.tensor(counts), D)
    assert features.dtype == torch.float32 and present.tolist() == [count > 0 for count in counts]
    first = 0
    for row, count in enumerate(counts):
        own = pooled[first : first + count]
        torch.testing.assert_close(features[row], torch.cat(own).mean(0) if own else torch.zeros(D))
        first += count
    features.sum().backward()
    assert all(image.grad.abs().min() > 0 for image in pooled)
    broken, _ = mean_vision([*pooled[:3], pooled[3] * float("nan")], torch.tensor(counts), D)
    assert broken.isnan().any(1).sum() == 1  # and stays in its sample


def test_no_image_at_all_and_counts_that_disagree():
    features, present = mean_vision([], torch.tensor([0, 0]), D)
    assert features.equal(torch.zeros(2, D)) and not present.any() and present.dtype == torch.bool
    with pytest.raises(ValueError, match="2 images, but the vision tower gave features of 1"):
        mean_vision([torch.randn(3, D)], torch.tensor([1, 1]), D)
