"""Special tokens that texts write on purpose stay whole where the run file says so; the others never become tokens."""

from pathlib import Path

import pytest

from ds_moe.data.chat import parse_record
from ds_moe.data.chat_template import TokenRules
from ds_moe.data.encode import encode
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.special_tokens import text_of
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.models.processor import CHAT_TEMPLATE
from tests.data.templates import HYBRID, answer, call, user, with_template

TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|action_7|>")
TEXT = "<|object_ref_start|>ab<|object_ref_end|><|box_start|>(1,2)<|box_end|><|action_7|>"


def encoded(messages, processor, content=()):
    sample = parse_record({"messages": messages}, "test:1", Path("/"))
    return encode(sample, processor, 4096, 10**6, TokenRules(content_tokens=content))


def test_named_tokens_are_one_id_each_and_others_are_split():
    processor = with_template(CHAT_TEMPLATE, special=TOKENS)
    messages = [user(f"{TEXT} <|im_end|>"), answer(TEXT + "<|im_start|>")]
    split, whole = encoded(messages, processor), encoded(messages, processor, TOKENS)
    tokenizer = processor.tokenizer
    names = tokenizer.convert_ids_to_tokens(whole.input_ids.tolist())
    assert [names.count(token) for token in TOKENS] == [2] * 5
    assert not set(TOKENS) & set(tokenizer.convert_ids_to_tokens(split.input_ids.tolist()))
    assert len(split.input_ids) > len(whole.input_ids)
    assert tokenizer.decode(whole.input_ids) == tokenizer.decode(split.input_ids)
    assert names.count("<|im_end|>") == names.count("<|im_start|>") == 2  # the template's
    labels = tokenizer.decode(whole.labels[whole.labels != -100])
    assert labels == TEXT + "<|im_start|>" + "<|im_end|>"
    one = encoded(messages, processor, ("<|action_7|>",))
    assert tokenizer.convert_ids_to_tokens(one.input_ids.tolist()).count("<|action_7|>") == 2


def test_named_tokens_are_whole_in_thoughts_and_calls_and_end_no_answer():
    processor = with_template(HYBRID, special=TOKENS)
    calling = answer(TEXT, reasoning_content=TEXT, tool_calls=[call("touch", where=TEXT)])
    one = encoded([user("?"), calling], processor, TOKENS)
    names = processor.tokenizer.convert_ids_to_tokens(one.input_ids.tolist())
    assert [names.count(token) for token in TOKENS] == [3] * 5
    assert processor.decode(one.labels[one.labels != -100]).endswith("</tool_call><|im_end|>")


def test_named_tokens_count_where_answers_are_compared(write_jsonl, run_config):
    """Negative control in one: without the name all answers of one such token would read alike, as nothing."""
    processor = with_template(CHAT_TEMPLATE, "vl", special=TOKENS)
    file = write_jsonl([{"messages": [user("?"), answer(token)]} for token in TOKENS[:2]])
    config = run_config(file, {"content_tokens": list(TOKENS), "eval": str(file)}, micro_batch_size=2)
    [batch] = EvalSet(config, processor, rank=0, world_size=1).batches()
    assert batch.answers == list(TOKENS[:2])
    ids = processor.tokenizer.convert_tokens_to_ids(["<|action_7|>", "<|im_end|>"])
    assert text_of(ids, processor, TOKENS) == "<|action_7|>" and text_of(ids, processor) == ""


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("<|im_end|>", "is a control token of the chat template"),
        ("<|im_start|>", "is a control token of the chat template"),
        ("<|image_pad|>", "is a placeholder of images or videos"),
        ("<|video_pad|>", "is a placeholder of images or videos"),
        ("<|vision_end|>", "is a placeholder of images or videos"),
        ("<|endoftext|>", "is the tokenizer's pad_token"),
        ("<|action_8|>", "is no added token of the model's tokenizer"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_content_is_refused_by_name(write_jsonl, run_config, processor, token, why, workers):
    config = run_config(write_jsonl([{"messages": [user("?"), answer("x")]}]), {"content_tokens": [token]})
    config.data.num_workers = workers
    with pytest.raises(UserError, match=r"data\.content_tokens: ") as error:
        TrainStream(config, processor, rank=0, world_size=1)
    assert f"{token!r} {why}" in str(error.value)


def test_the_run_file_s_tokens_reach_the_stream(write_jsonl, run_config):
    processor = with_template(CHAT_TEMPLATE, "vl", special=TOKENS)
    file = write_jsonl([{"messages": [user("?"), answer(TEXT)]}])
    counts = []
    for tokens in ([], list(TOKENS)):
        config = run_config(file, {"content_tokens": tokens}, micro_batch_size=1, global_batch_size=1)
        [batch] = next(iter(TrainStream(config, processor, rank=0, world_size=1)))
        names = processor.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0].tolist())
        counts.append(sum(names.count(token) for token in TOKENS))
    assert counts == [0, 5]
