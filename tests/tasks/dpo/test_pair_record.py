"""The forms of a preference record, and what is refused."""

import itertools

import pytest
from PIL import Image

from ds_moe.data.chat import parse_record
from ds_moe.data.images import RecordError
from ds_moe.tasks.dpo.pair_record import parse_pair

ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Even?"), ("assistant", "yes"), ("assistant", "no"))
)
GPT = {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}
BEFORE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]

FORMS = {
    "explicit": {"messages": [ASK], "chosen": YES, "rejected": NO},
    "TRL, explicit": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "TRL, implicit": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "TRL, texts": {"prompt": "Even?", "chosen": "yes", "rejected": "no"},
    "TRL, the question again": {"prompt": "Even?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    "ms-swift": {"messages": [ASK, YES], "rejected_response": "no"},
    "ms-swift, a list": {"messages": [ASK, YES], "rejected_response": [NO]},
    "ms-swift, two conversations": {"messages": [ASK, YES], "rejected_messages": [ASK, NO]},
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Even?"}],
        "chosen": GPT[0],
        "rejected": GPT[1],
    },
    "of Arrow": {"messages": [{**ASK, "weight": None}], "chosen": YES, "rejected": NO, "prompt": None, "images": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form, tmp_path):
    pair = parse_pair({**FORMS[form], "kind": "parity"}, "file:1", tmp_path)
    for one, answer in ((pair, "yes"), (pair.rejected, "no")):
        record = {"messages": [ASK, {"role": "assistant", "content": answer}]}
        assert one.turns == parse_record(record, "file:1", tmp_path).turns
    assert pair.kind == "parity" and pair.answers == ("yes", "no")


def test_answers_of_the_prompt_are_not_learned(tmp_path):
    record = {"messages": [*BEFORE, ASK], "chosen": YES, "rejected": NO, "system": "Be brief."}
    for whole in (record, {"chosen": [*BEFORE, ASK, YES], "rejected": [*BEFORE, ASK, NO], "system": "Be brief."}):
        pair = parse_pair(whole, "file:1", tmp_path)
        for one in (pair, pair.rejected):
            weights = [turn.weight for turn in one.turns if turn.role == "assistant"]
            assert weights == [False, True] and one.turns[0].role == "system"


def test_both_answers_see_the_images_of_the_prompt(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    record = {"messages": [{"role": "user", "content": "<image>Even?"}], "chosen": YES, "rejected": NO}
    pair = parse_pair({**record, "images": ["a.png"]}, "file:1", tmp_path.resolve())
    assert [one.name for one in pair.images] == [one.name for one in pair.rejected.images] == ["a.png"]


def test_images_behind_the_prompt_must_be_the_same(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)

    def behind(image, answer):
        again = [{"type": "image", "image": image}, {"type": "text", "text": "And this?"}]
        return [YES, {"role": "user", "content": again if image else "And this?"}, answer]

    def parse(chosen, rejected):
        both = {"chosen": behind(chosen, YES), "rejected": behind(rejected, NO)}
        return parse_pair({"messages": [ASK], **both}, "file:1", tmp_path.resolve())

    pair = parse("a.png", "./a.png")
    assert [image.path for image in pair.images] == [image.path for image in pair.rejected.images]
    for rejected, named in (("b.png", "['b.png']"), (None, "none")):
        with pytest.raises(RecordError) as caught:
            parse("a.png", rejected)
        assert f"different images or videos: 'chosen' ['a.png'] and 'rejected' {named} (give" in str(caught.value)


def test_frames_of_a_video_behind_the_prompt_are_compared_by_their_files(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)

    def parse(*both):
        again = ([YES, {"role": "user", "content": [{"type": "video", "video": frames}]}] for frames in both)
        chosen, rejected = ([*turns, answer] for turns, answer in zip(again, (YES, NO), strict=True))
        return parse_pair({"messages": [ASK], "chosen": chosen, "rejected": rejected}, "file:1", tmp_path.resolve())

    assert parse(["a.png", "b.png"], ["./a.png", "./b.png"]).videos
    with pytest.raises(RecordError, match="different images or videos"):
        parse(["a.png", "b.png"], ["b.png", "a.png"])


def test_tool_calls_may_lie_behind_the_prompt(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]}
    result = {"role": "tool", "content": "7"}
    chosen, rejected = [ASK, call, result, YES], [ASK, call, result, NO]
    pair = parse_pair({"chosen": chosen, "rejected": rejected}, "file:1", tmp_path)
    assert [turn.weight for turn in pair.turns if turn.role == "assistant"] == [False, True]
    pair = parse_pair({"messages": chosen, "rejected_response": [NO]}, "file:1", tmp_path)
    assert len(pair.turns) == 4 and len(pair.rejected.turns) == 2
    assert pair.answers[1] == "no" and pair.answers[0].endswith("yes")


PROMPT = {"messages": [ASK]}
REFUSED = {
    "no object": ([], "not an object"),
    "no rejected": ({**PROMPT, "chosen": YES}, "no 'rejected'"),
    "no chosen": ({**PROMPT, "rejected": NO}, "no 'chosen'"),
    "no answer to swap": ({**PROMPT, "rejected_response": "no"}, "does not end with an answer"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "no 'prompt'"),
    "identical": ({**PROMPT, "chosen": YES, "rejected": "yes"}, "identical"),
    "identical conversations": ({"chosen": [ASK, YES], "rejected": [ASK, YES]}, "identical"),
    "different prompts": ({"chosen": [ASK, YES], "rejected": [BEFORE[0], NO]}, "differ in message 1, a user turn"),
    "another question later": ({"chosen": [*BEFORE, ASK, YES], "rejected": [*BEFORE, BEFORE[0], NO]},
        "differ in message 3"),
    "only a beginning": ({"chosen": [ASK, YES, ASK, NO], "rejected": [ASK, YES]}, "only the beginning"),
    "prompt of something else": ({"prompt": "Odd?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        "no turn of 'chosen'"),
    "two prompts": ({**PROMPT, "prompt": "Odd?", "chosen": YES, "rejected": NO}, "both 'prompt' and 'messages'"),
    "two rejected": ({**PROMPT, "chosen": YES, "rejected": NO, "rejected_response": "no"}, "both 'rejected' and"),
    "the prompt in the answer": ({**PROMPT, "chosen": [ASK, YES], "rejected": [ASK, NO]}, "begins with a user turn"),
    "answered already": ({"messages": [ASK, YES], "chosen": YES, "rejected": NO},
        "ends with an answer beside 'chosen'"),
    "no end": ({**PROMPT, "chosen": [YES, ASK], "rejected": NO}, "ends with a user turn"),
    "empty": ({**PROMPT, "chosen": [], "rejected": NO}, "'chosen' is empty"),
    "empty text": ({**PROMPT, "chosen": " ", "rejected": NO},
        "with 'chosen' as the answer: message 2 (assistant) is empty"),
    "an image in an answer": ({**PROMPT, "chosen": "<image>yes", "rejected": NO}, "an image in the assistant turn"),
    "an image without a place": ({**PROMPT, "chosen": YES, "rejected": NO, "images": ["a.png"]},
        "0 <image> placeholders for 1"),
    "other images": ({**PROMPT, "chosen": YES, "rejected": NO, "rejected_images": ["a.png"]},
        "'rejected_images' is not read"),
    "a number": ({**PROMPT, "chosen": 7, "rejected": NO}, "'chosen' is a number"),
    "an unknown role": ({**PROMPT, "chosen": {"role": "x", "content": "y"}, "rejected": NO}, "unknown role"),
    "a message of nothing": ({**PROMPT, "chosen": [None], "rejected": NO}, "message 2 is null"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name, tmp_path):
    record, words = REFUSED[name]
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(RecordError) as caught:
        parse_pair(record, "file:1", tmp_path.resolve())
    text = str(caught.value)
    assert words in text and text.endswith(")") and "\n" not in text


STRANGE = [
    None,
    "",
    "yes",
    7,
    True,
    [],
    [7],
    [[]],
    {},
    {"role": 7},
    {"role": []},
    {"role": "user"},
    ASK,
    YES,
    [ASK],
    [ASK, YES],
    [YES, ASK],
]


def test_nothing_strange_raises_anything_else(tmp_path):
    """Every value in every place ends in a pair, or in one line."""
    pairs = 0
    places = [("messages", "rejected_response"), ("messages", "rejected_messages"), ("chosen", "rejected")]
    places += [("prompt", "chosen", "rejected"), ("conversations", "chosen", "rejected")]
    for keys in places:
        for values in itertools.product(STRANGE, repeat=len(keys)):
            try:
                pair = parse_pair(dict(zip(keys, values, strict=True)), "file:1", tmp_path)
            except RecordError as error:
                assert str(error).endswith(")") and "\n" not in str(error)
                continue
            pairs += 1
            assert pair.turns != pair.rejected.turns and pair.answers[0] != pair.answers[1]
    assert pairs
