"""Thoughts and tools: rendered as the template renders them, labels on what the model writes and on nothing else."""

import time
from pathlib import Path

import pytest

from ds_moe.config.run import RunConfig
from ds_moe.data.chat import final_answer, parse_record
from ds_moe.data.chat_template import TokenRules, end_token
from ds_moe.data.encode import answer_text, encode
from ds_moe.data.images import RecordError
from ds_moe.data.stream import TrainStream
from ds_moe.errors import UserError
from ds_moe.models.processor import CHAT_TEMPLATE
from tests.data.templates import CHANNELS, HYBRID, LLAMA, MISTRAL, THINKING, answer, call, tool, user, with_template
from tests.records import labelled

TEMPLATES = {"hybrid": HYBRID, "thinking": THINKING, "instruct": CHAT_TEMPLATE}
FORMS = {  # the same thought and answer
    "in the content": answer("<think>\nIt is so.\n</think>\n\nyes"),
    "apart": answer("yes", reasoning_content="It is so."),
    "in an open thought": answer("It is so.\n</think>\n\nyes"),
    "none": answer("yes"),
}
ENDS = {("hybrid", "none"): "<think>\n\n</think>\n\nyes", ("thinking", "none"): "\n</think>\n\nyes"}
TOOLS = [{"type": "function", "function": {"name": "area", "description": "of a country", "parameters": {}}}]


def sample(messages, **columns):
    return parse_record({"messages": messages, **columns}, "test:1", Path("/"))


def encoded(messages, processor, train_on="all", **columns):
    rules = TokenRules(train_on=train_on)
    return encode(sample(messages, **columns), processor, 10**6, 10**6, rules)


def assert_as_rendered(one, processor, messages, tools=None):
    """The text is the template's own rendering, the prompt what it renders to be continued, and the ids the same."""
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, tools=tools)
    assert processor.tokenizer.decode(one.input_ids) == rendered
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    prompt = processor.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True, tools=tools)
    assert processor.tokenizer.decode(one.input_ids[: one.prompt]) == prompt
    whole = processor.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if "<think>\n\n</think>" not in rendered:  # there a prompt that opens a thought ends within a token
        assert one.input_ids.tolist() == whole


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thought_is_learned_as_the_template_renders_it(name, form):
    processor = with_template(TEMPLATES[name])
    messages = [user("Is it?"), FORMS[form]]
    if (name, form) == ("instruct", "apart"):
        with pytest.raises(RecordError, match="leaves out the 'reasoning_content' of message 2"):
            encoded(messages, processor)
        return
    one = encoded(messages, processor)
    assert_as_rendered(one, processor, messages)
    whole = {"hybrid": "<think>\nIt is so.\n</think>\n\nyes", "thinking": "It is so.\n</think>\n\nyes"}
    wanted = ENDS.get((name, form)) or whole.get(name) or FORMS[form]["content"]
    assert labelled(one, processor) == wanted + "<|im_end|>"
    assert answer_text(one, processor) == "yes" == sample(messages).answer
    assert processor.tokenizer.convert_ids_to_tokens(end_token(processor)) == "<|im_end|>"


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("name", ["hybrid", "thinking"])
def test_earlier_answers_are_learned_as_they_are_shown_or_not_at_all(name, first):
    processor = with_template(TEMPLATES[name])
    messages = [user("Is it?"), FORMS[first], user("Sure?"), answer("<think>\nI looked.\n</think>\n\nquite")]
    one = encoded(messages, processor)
    assert_as_rendered(one, processor, messages)
    last = "I looked.\n</think>\n\nquite<|im_end|>"
    last = last if name == "thinking" else "<think>\n" + last
    assert labelled(one, processor) == f"yes<|im_end|>|{last}"
    assert labelled(encoded(messages, processor, "last"), processor) == last


AGENT = [
    user("How large is France?"),
    answer("", reasoning_content="I look it up.", tool_calls=[call("area", of="France", note="<|im_end|>")]),
    tool("551,695 <|im_start|>assistant"),
    answer("And Spain?", tool_calls=[call("area", of="Spain"), call("area", of="Monaco")]),
    tool("505,990"),
    tool("2"),
    answer("<think>\nDone.\n</think>\n\n551,695 km2"),
]


def test_calls_are_learned_and_results_are_not():
    processor = with_template(HYBRID)
    one = encoded(AGENT, processor, tools=TOOLS)
    spans = labelled(one, processor).split("<|im_end|>|")
    assert spans == [
        '<think>\nI look it up.\n</think>\n\n<tool_call>\n{"name": "area", "arguments": {"of": "France", "note": '
        '"<|im_end|>"}}\n</tool_call>',
        'And Spain?\n<tool_call>\n{"name": "area", "arguments": {"of": "Spain"}}\n</tool_call>\n<tool_call>\n{"name": '
        '"area", "arguments": {"of": "Monaco"}}\n</tool_call>',
        "<think>\nDone.\n</think>\n\n551,695 km2<|im_end|>",
    ]
    text = processor.tokenizer.decode(one.input_ids)
    assert text == processor.apply_chat_template(AGENT, tokenize=False, tools=TOOLS)
    token = processor.tokenizer.convert_tokens_to_ids
    ids = one.input_ids.tolist()
    assert ids.count(token("<|im_end|>")) == 7 and text.count("<|im_end|>") == 8  # one is a text's
    assert labelled(encoded(AGENT, processor, "last", tools=TOOLS), processor) == spans[-1]


def test_an_answer_that_only_calls_is_evaluated_by_its_call():
    processor = with_template(HYBRID)
    one = encoded([user("How large?"), answer(None, tool_calls=[call("area", of="France")])], processor, tools=TOOLS)
    assert answer_text(one, processor) == '<tool_call>\n{"name": "area", "arguments": {"of": "France"}}\n</tool_call>'


def test_arguments_as_a_string_of_json_and_flat_calls_are_the_same_call():
    processor = with_template(HYBRID)
    forms = [
        [call("area", of="é")],
        [{"name": "area", "arguments": {"of": "é"}}],
        [{"type": "function", "id": "call_1", "function": {"name": "area", "arguments": '{"of": "\\u00e9"}'}}],
        '[{"name": "area", "arguments": {"of": "é"}}]',
    ]
    made = [encoded([user("?"), answer("", tool_calls=form)], processor, tools='[{"name": "area"}]') for form in forms]
    assert all(one.input_ids.tolist() == made[0].input_ids.tolist() for one in made)


def test_a_question_that_is_a_tool_s_result_is_followed():
    processor = with_template(HYBRID)
    messages = [
        user("?"),
        answer("<think>\na\n</think>\n\nb"),
        user("<tool_response>\n7\n</tool_response>"),
        answer("c"),
    ]
    one = encoded(messages, processor)
    assert labelled(one, processor) == "<think>\na\n</think>\n\nb<|im_end|>|<think>\n\n</think>\n\nc<|im_end|>"


def test_tool_results_may_hold_images(folder, processor):
    processor = with_template(HYBRID, "vl")
    messages = [user("Look."), answer("", tool_calls=[call("screen")]), tool([{"type": "image", "image": "a.png"}]),
                answer("red")]  # fmt: skip
    one = encode(parse_record({"messages": messages}, "test:1", folder), processor, 4096, 10**6)
    assert one.pixel_values is not None and labelled(one, processor).endswith("<think>\n\n</think>\n\nred<|im_end|>")


# --- other families


def test_a_llama_like_template_is_followed():
    processor = with_template(LLAMA)
    messages = [{"role": "system", "content": " Be brief. "}, user("Is it? "), answer(" yes"), user("Size?"),
                answer("", tool_calls=[call("area", of="it")]), tool("7"), answer("Seven.\n")]  # fmt: skip
    one = encoded(messages, processor)
    assert_as_rendered(one, processor, messages)
    wanted = 'yes<|eot|>|{"name": "area", "parameters": {"of": "it"}}<|eom|>|Seven.<|eot|>'
    assert labelled(one, processor) == wanted
    assert processor.tokenizer.convert_ids_to_tokens(end_token(processor)) == "<|eot|>"


def test_a_mistral_like_template_is_followed():
    processor = with_template(MISTRAL)
    messages = [{"role": "system", "content": "Be brief."}, user("Is it?"), answer("yes"), user("Size?"),
                answer("", tool_calls=[call("area", of="it")]), tool("7"), answer("Seven.")]  # fmt: skip
    one = encoded(messages, processor)
    assert_as_rendered(one, processor, messages)
    assert labelled(one, processor) == ' yes</s>|[TOOL_CALLS]area[ARGS]{"of": "it"}</s>| Seven.</s>'


def test_calls_with_control_tokens_within_are_learned_to_their_own_end():
    processor = with_template(CHANNELS)
    calling = answer("", tool_calls=[call("area", of="it")])
    messages = [user("Is it?"), answer("yes"), user("Size?"), calling, tool("7"), calling, tool("7"),
                answer("Seven.", reasoning_content="So it is.")]  # fmt: skip
    one = encoded(messages, processor)
    assert_as_rendered(one, processor, messages)
    called = ' to=area<|channel|>json<|message|>{"of": "it"}<|call|>'
    last = "<|channel|>analysis<|message|>So it is.<|end|><|start|>assistant<|channel|>final<|message|>Seven.<|return|>"
    first = "<|channel|>final<|message|>yes<|end|>"
    assert labelled(one, processor) == "|".join([first, called, called, last])
    assert processor.tokenizer.convert_ids_to_tokens(end_token(processor)) == "<|return|>"


# --- weights


@pytest.mark.parametrize("key", ["weight", "loss", "training", "train"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_an_answer_of_weight_0_is_not_learned(key, value):
    processor = with_template(CHAT_TEMPLATE)
    messages = [
        {**user("One?"), key: value},
        answer("first", **{key: value}),
        user("Two?"),
        answer("second", **{key: 1}),
    ]
    assert labelled(encoded(messages, processor), processor) == "second<|im_end|>"
    plain = [user("One?"), answer("first"), user("Two?"), answer("second")]
    assert encoded(messages, processor).input_ids.tolist() == encoded(plain, processor).input_ids.tolist()


def test_the_last_answer_may_be_context_but_not_the_only_one_to_learn():
    processor = with_template(CHAT_TEMPLATE)
    messages = [user("One?"), answer("first"), user("Two?"), answer("second", weight=0)]
    one = encoded(messages, processor)
    assert labelled(one, processor) == "first<|im_end|>"
    assert processor.tokenizer.decode(one.input_ids[: one.prompt]).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(RecordError, match="the last answer has the weight 0, and data.train_on is 'last'"):
        encoded(messages, processor, "last")


def test_the_run_file_says_which_answers_are_learned(write_jsonl, run_config, processor):
    messages = [user("One?"), answer("first"), user("Two?"), answer("second")]
    file = write_jsonl([{"messages": messages}])
    for train_on, wanted in {"all": "first<|im_end|>second<|im_end|>", "last": "second<|im_end|>"}.items():
        config = run_config(file, {"train_on": train_on}, micro_batch_size=1, global_batch_size=1)
        [batch] = next(iter(TrainStream(config, processor, rank=0, world_size=1)))
        ids, labels = batch.inputs["input_ids"][0], batch.labels[0]
        assert processor.decode(ids[labels != -100]) == wanted


# --- what depends on a record's shape is an error of that record


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (LLAMA, [user("?"), answer("", tool_calls=[call("a"), call("b")])], "this conversation: one call a turn"),
        (LLAMA, [user("?"), answer("I look.", tool_calls=[call("a")])], r"leaves out message 2 \(assistant\)"),
        (CHAT_TEMPLATE, [user("?"), answer("x", tool_calls=[call("a")])], "leaves out the tool calls of message 2"),
    ],
)  # fmt: skip
def test_what_the_shape_of_a_record_breaks_is_that_record_s_error(template, messages, why):
    processor = with_template(template)
    with pytest.raises(RecordError, match=why):
        encoded(messages, processor)
    encoded([user("?"), answer("x")], processor)  # others go on


def test_tools_that_the_template_does_not_show_are_refused():
    with pytest.raises(RecordError, match="leaves out 'tools'"):
        encoded([user("?"), answer("x")], with_template(CHAT_TEMPLATE), tools=TOOLS)


def test_bad_shapes_are_skipped_and_the_run_goes_on(write_jsonl, run_config):
    processor = with_template(THINKING)
    good = {"messages": [user("?"), FORMS["in the content"], user("??"), FORMS["none"]]}
    bad = {"messages": [user("?"), answer("<think>a</think>b</think>c")]}
    file = write_jsonl([good, bad])
    data = {"on_bad_record": "skip", "shuffle": False, "length_grouping": False}
    config = run_config(file, data, micro_batch_size=1, global_batch_size=2)
    stream = TrainStream(config, processor, rank=0, world_size=1)
    assert [batch.real_B.tolist() for batch in next(iter(stream))] == [[True], [False]]
    assert [(bad.where[-2:], "leaves out the thought of message 2" in bad.reason) for bad in stream.skipped] == [
        (":2", True)
    ]


def test_a_template_that_drops_the_last_thought_is_refused():
    dropping = CHAT_TEMPLATE.replace("{{- message.content -}}", "{{- message.content.split('</think>')[-1] -}}")
    processor = with_template(dropping)
    with pytest.raises(RecordError, match="leaves out the thought of message 2"):
        encoded([user("?"), FORMS["in the content"]], processor)


def test_an_open_prompt_wants_a_thought():
    opening = CHAT_TEMPLATE.replace("assistant\\n' -}}\n{%- endif", "assistant\\n<think>\\n' -}}\n{%- endif")
    assert opening != CHAT_TEMPLATE
    processor = with_template(opening)
    assert labelled(encoded([user("?"), FORMS["in the content"]], processor), processor).startswith(
        "It is so.\n</think>"
    )
    with pytest.raises(RecordError, match="writes none before this record's last one"):
        encoded([user("?"), answer("x")], processor)
    other = opening.replace("assistant\\n<think>", "model\\n<think>")
    with pytest.raises(UserError, match="model: its chat template renders the turns before answer 1 differently"):
        encoded([user("?"), FORMS["in the content"]], with_template(other))


def test_a_thought_is_taken_off_answers():
    assert final_answer("<think>\na\n</think>\n\nb ") == "b" and final_answer("<think> b ") == "<think> b "


def test_long_conversations_take_time_linear_in_their_turns(show):
    """Rendered five times at most, whatever the number of turns; the figures are for people."""
    processor = with_template(HYBRID)
    renderings = 0
    rendered = processor.apply_chat_template

    def counted(*args, **kwargs):
        nonlocal renderings
        renderings += 1
        return rendered(*args, **kwargs)

    processor.apply_chat_template = counted
    encoded([user("?"), answer("x")], processor)
    lines = ["answers  seconds"]
    for count in (100, 200, 400):
        turns = [(user(f"Question {n}?"), answer(f"<think>\nIt is {n}.\n</think>\n\n{n}")) for n in range(count)]
        conversation = sample([message for pair in turns for message in pair])
        renderings, began = 0, time.perf_counter()
        one = encode(conversation, processor, 10**6, 10**6)
        lines.append(f"{count:>7}  {time.perf_counter() - began:.2f}")
        assert renderings <= 5 and len(labelled(one, processor).split("|>|")) == count
    show("\n".join(lines))


def test_run_files_name_what_is_learned():
    values = {"model": {"preset": "tiny-vl-moe"}, "deepspeed": "x"}
    with pytest.raises(ValueError, match="train_on"):
        RunConfig(data={"train": "x", "train_on": "first"}, **values)
