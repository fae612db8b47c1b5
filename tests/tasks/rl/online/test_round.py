"""A round of rollouts by an engine that says what it is told: which completions are kept, exchanged and written."""

import json
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_moe.checkpoint import room
from ds_moe.checkpoint.files import sha256_of
from ds_moe.config.rollout import EngineConfig, RewardConfig
from ds_moe.data.record_kind import CHAT
from ds_moe.errors import UserError
from ds_moe.rollout.engine import Completion
from ds_moe.rollout.reward import RewardPool
from ds_moe.tasks.rl.online.prompts import Prompts
from ds_moe.tasks.rl.online.round import RoundMaker, RunEnded
from ds_moe.tasks.rl.online.round_file import finished_round, round_file
from ds_moe.tasks.rl.rollout_record import parse_rollout
from ds_moe.tasks.rl.write import images_of
from tests.records import chat

SETTINGS = {"kind": "local", "prompts": 4, "completions": 3, "max_new_tokens": 8}


class Told:
    """An engine whose completions of each prompt are those of `answers`: texts, or a change of a completion."""

    def __init__(self, processor, answers):
        self._processor, self._answers, self.asked = processor, answers, []

    def sample(self, prompts, sampling, deliver, pulse):
        pulse()
        self.asked.append((prompts, sampling))
        for number, prompt in reversed(list(enumerate(prompts))):  # in any order
            deliver(number, [self._completion(one) for one in self._answers(prompt, number)])

    def _completion(self, told):
        text, changes = told if isinstance(told, tuple) else (told, {})
        ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        made = {"routing": None, "routing_format": "record", "finish_reason": "stop", "version": "r:4"}
        return Completion(**{"token_ids": ids, "logprobs": [-0.5] * len(ids), **made, **changes})


@pytest.fixture
def maker(write_jsonl, run_config, processor, tmp_path):
    """maker(answers, settings) -> the maker, its engine, its config; with an output folder of its own unless given."""
    folders = (str(tmp_path / f"run_{number}") for number in count())

    def make(answers, records=8, stopping=lambda: False, reward="exact", output_dir=None, **settings):
        path = write_jsonl([chat(f"question {number}", "7") for number in range(records)])
        config = run_config(path, {"max_length": 64}, output_dir=output_dir or next(folders))
        engine = EngineConfig(**{**SETTINGS, **settings})
        config = config.model_copy(update={"task": "rl", "rl": config.rl.model_copy(update={"engine": engine})})
        told = Told(processor, answers)
        prompts, rewards = (
            Prompts(config, engine, processor, 0),
            RewardPool(RewardConfig(function=reward, processes=1), 8),
        )
        made = RoundMaker(config, engine, prompts, processor, told, rewards, "r", stopping)
        made.trained, made.version, made.step = {"r:4": 2}, "r:4", 4
        opened.append(rewards)
        return made, told, config

    opened: list[RewardPool] = []
    yield make
    for rewards in opened:
        rewards.close()


def written(config, number=2):
    return [json.loads(line) for line in round_file(config.train.output_dir, number).read_text().splitlines()]


def test_a_round_becomes_a_file_that_is_read_as_rollouts(maker, tmp_path):
    made, told, config = maker(lambda prompt, number: ["7", "8", ("9", {"finish_reason": "length"})])
    facts = made.round(2, begin=0)
    assert (facts.number, facts.begin, facts.end, facts.records, facts.step) == (2, 0, 4, 12, 4)
    assert facts.figures["round_reward"] == pytest.approx(1 / 3) and facts.figures["reward_exact"] == pytest.approx(
        1 / 3
    )
    assert facts.figures["truncated"] == pytest.approx(1 / 3) and facts.figures["dropped_completions"] == 0
    records = written(config)
    assert [record["reward"] for record in records] == [1.0, 0.0, 0.0] * 4
    parsed = [parse_rollout(record, "f:1", tmp_path) for record in records]
    assert len({one.group for one in parsed}) == 4 and all(sum(one.mask) == len(one.logprobs) for one in parsed)
    [(prompts, sampling)] = told.asked
    assert sampling.completions == 3 and parsed[0].tokens[: -sum(parsed[0].mask)] == prompts[0].token_ids
    assert finished_round(round_file(config.train.output_dir, 2)) == facts
    assert made.round(2, begin=0) == facts and len(told.asked) == 1  # it is there already


@pytest.mark.parametrize("named", ["{folder}/my_rewards.py:score", "my_rewards:score"])
def test_a_round_that_another_function_has_judged_is_sampled_anew(maker, tmp_path, monkeypatch, named):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # two edits within a second would be one to Python's cache
    rewards, facts = tmp_path / "my_rewards.py", []
    judged = {"reward": named.format(folder=tmp_path), "output_dir": str(tmp_path / "run")}
    for value, asked in ((1, 1), (1, 0), (2, 1)):
        rewards.write_text(f"def score(completion, answer, record):\n    return {value} * float(completion)\n")
        made, told, config = maker(lambda prompt, number: ["7", "8", "9"], **judged)
        facts.append(made.round(2, begin=0))
        again = made.round(2, begin=0)
        assert again == facts[-1] and len(told.asked) == asked
    assert facts[0].run == facts[1].run != facts[2].run and facts[0].run.startswith("r ")
    assert [record["reward"] for record in written(config)][:3] == [14.0, 16.0, 18.0]


def test_a_round_that_has_no_room_is_not_sampled(maker, monkeypatch):
    """It is taken to be as large as the largest one that is there, with its images."""
    made, told, config = maker(lambda prompt, number: ["7", "8"])
    made.round(2, begin=0)
    file = round_file(config.train.output_dir, 2)
    images_of(file).mkdir()
    (images_of(file) / f"{0:016x}.png").write_bytes(bytes(5000))
    free = [5000 + file.stat().st_size - 1]
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    text = "^round 3 of rollouts: .*train.output_dir .*rollouts: a round of rollouts takes .* are free; free some, or"
    with pytest.raises(UserError, match=text) as caught:
        made.round(3, begin=4)
    assert "\n" not in str(caught.value) and len(told.asked) == 1
    free[0] += 1
    made.trained["r:4"] = 3
    assert made.round(3, begin=4).number == 3


def test_a_round_of_other_weights_prompts_or_content_is_sampled_anew(maker):
    made, told, config = maker(lambda prompt, number: ["7", "8"])
    file = round_file(config.train.output_dir, 2)
    made.round(2, begin=0)
    made.round(2, begin=4)
    assert len(told.asked) == 2
    made.step = 6
    made.round(2, begin=4)
    assert len(told.asked) == 3
    file.write_text(file.read_text() + "\n")
    assert finished_round(file) is None
    made.round(2, begin=4)
    assert len(told.asked) == 4 and finished_round(file).sha256 == sha256_of(file)


@pytest.mark.parametrize("lag, asked", [(0, 2), (1, 1)])
def test_a_round_of_older_weights_is_taken_where_sampling_may_be_ahead(maker, lag, asked):
    made, told, _ = maker(lambda prompt, number: ["7", "8"], lag=lag)
    made.round(2, begin=0)
    made.step = 6
    made.round(2, begin=0)
    assert len(told.asked) == asked
    made.step = 2  # weights from before those that have sampled it: a run that went back to an older checkpoint
    made.round(2, begin=0)
    assert len(told.asked) == asked + 1


def test_rounds_after_one_that_is_sampled_anew_are_sampled_anew_too(maker):
    """A killed process made them, by weights that followed from another file of that round."""
    process = ["8"]
    made, told, config = maker(lambda prompt, number: ["7", process[0]], records=20)

    def rounds(first):
        for number in range(first, 4):
            made.step = 2 * number
            made.trained["r:4"] = number
            made.round(number, begin=4 * number)
        return [written(config, number)[1]["completion"] for number in range(4)]

    assert rounds(0) == ["8", "8", "8", "8"]
    process[0] = "9"
    assert rounds(1) == ["8", "8", "8", "8"] and len(told.asked) == 4  # all of them are there
    round_file(config.train.output_dir, 1).unlink()
    assert rounds(1) == ["8", "9", "9", "9"]


def test_a_log_prob_that_rounding_put_above_0_is_0_in_the_file(maker):
    made, _, config = maker(lambda prompt, number: [("7", {"logprobs": [1e-7]}), "8"])
    made.round(2, begin=0)
    assert [record["logprobs"] for record in written(config)][:2] == [[0.0], [-0.5]]


def test_ids_beyond_the_tokenizer_are_lost(maker, processor):
    """Embeddings are padded, and an engine samples from all of them; no record may hold such an id."""
    beyond = {"token_ids": [len(processor.tokenizer)], "logprobs": [-0.5]}
    made, _, config = maker(lambda prompt, number: ["7", "8", ("9", beyond)])
    facts = made.round(2, begin=0)
    assert facts.records == 8 and facts.figures["dropped_completions"] == 4


def test_what_is_too_old_lost_or_unknown_is_dropped_and_counted(maker):
    def answers(prompt, number):
        return {
            0: ["7", "8", ("9", {"version": "r:2"})],  # two rounds old
            1: ["7", ("8", {"finish_reason": "abort"})],  # one left: nothing to compare it with
            2: [("7", {"version": "other:4"}), ("8", {"version": ""}), "9"],
            3: ["7", "8", "9"],
        }[number]

    made, _, config = maker(answers)
    made.trained["r:2"] = 1
    facts = made.round(2, begin=0)
    assert facts.records == 5 and facts.figures["too_old"] == 3
    assert facts.figures["dropped_completions"] == 3 + 1 + 1  # of those that were sampled, and one was never delivered
    assert facts.figures["lag"] == 0
    made, _, config = maker(answers, lag=1)
    made.trained["r:2"] = 1
    facts = made.round(2, begin=0)
    assert facts.records == 6 and facts.figures["too_old"] == 2 and facts.figures["lag"] == pytest.approx(1 / 6)


def test_groups_of_equal_rewards_are_exchanged_as_often_as_asked(maker):
    turns = count()

    def answers(prompt, number):
        return ["7", "7", "8"] if next(turns) in (0, 5) else ["8", "8", "9"]

    made, told, config = maker(answers, resample=2)
    facts = made.round(2, begin=0)
    assert [len(prompts) for prompts, _ in told.asked] == [4, 3, 2]
    assert facts.end == 9 and len({sampling.seed for _, sampling in told.asked}) == 3
    rewards = [record["reward"] for record in written(config)]
    assert len(rewards) == 12 and sum(rewards) == 4  # the two that differ, and two that nothing better was found for
    assert facts.figures["exchanged_prompts"] == 9 - 4
    made, told, _ = maker(lambda prompt, number: ["8", "8"])  # without resample they stay
    assert made.round(2, begin=0).end == 4 and len(told.asked) == 1


def test_records_stand_in_the_order_of_their_prompts_whatever_was_taken_back(maker):
    turns = count()

    def answers(prompt, number):
        turn = next(turns)  # the last prompt is answered first
        return [] if turn >= 4 else ["7", "8"] if turn == 0 else ["8", "8"]

    made, _, config = maker(answers, resample=1)
    made.round(2, begin=0)
    assert [record["group"].split()[0] for record in written(config)] == [str(place // 2) for place in range(8)]


def test_a_round_that_is_mostly_lost_asks_on_and_one_without_any_says_so(maker):
    turns = count()
    made, told, _ = maker(lambda prompt, number: ["7", "8"] if next(turns) >= 3 else [])
    facts = made.round(2, begin=0)
    assert [len(prompts) for prompts, _ in told.asked] == [4, 3] and facts.records == 8
    made, told, _ = maker(lambda prompt, number: [])
    with pytest.raises(UserError, match="round 2 of rollouts: not one prompt has 2 completions to compare"):
        made.round(2, begin=0)
    assert len(told.asked) == 4


def test_a_round_is_abandoned_when_the_run_ends(maker):
    made, _, config = maker(lambda prompt, number: ["7", "8"], stopping=lambda: True)
    with pytest.raises(RunEnded):
        made.round(2, begin=0)
    assert not round_file(config.train.output_dir, 2).exists()


def test_prompts_are_a_function_of_seed_and_position(write_jsonl, run_config, processor):
    path = write_jsonl([chat(f"question {number}") for number in range(5)])

    def indices(seed, start, **data):
        config = run_config(path, {"max_length": 64, **data}, seed=seed)
        prompts = Prompts(config, EngineConfig(**SETTINGS), processor, 0)
        return [prompts.index(one.position) for one in islice(prompts.ahead(start), 10 - start)]

    assert sorted(indices(0, 0)[:5]) == sorted(indices(0, 0)[5:]) == list(range(5))
    assert indices(0, 3) == indices(0, 0)[3:] != indices(1, 3)
    assert indices(0, 0, shuffle=False) == [0, 1, 2, 3, 4] * 2


def test_a_prompt_without_room_for_its_completion_is_a_bad_record(write_jsonl, run_config, processor):
    path = write_jsonl([chat("question"), chat("a longer question " * 2)])
    config = run_config(path, {"max_length": 64, "shuffle": False})
    with pytest.raises(
        UserError, match=r"train.jsonl:2: over-long: a prompt of \d+ tokens and rl.engine.max_new_tokens"
    ):
        Prompts(config, EngineConfig(**{**SETTINGS, "max_new_tokens": 36}), processor, 0).take(0, 2)
    skipping = run_config(path, {"max_length": 64, "shuffle": False, "on_bad_record": "skip"})
    asked, end = Prompts(skipping, EngineConfig(**{**SETTINGS, "max_new_tokens": 36}), processor, 0).take(0, 2)
    assert [one.position for one in asked] == [0, 2] and end == 3


def test_images_have_the_size_that_the_processor_leaves_alone(write_jsonl, run_config, processor, folder):
    from PIL import Image

    from ds_moe.data.encode import encode_images
    from ds_moe.data.images import ImageSource

    Image.effect_noise((37, 21), 80).convert("RGB").save(folder / "noise.png")
    question = [{"type": "image", "image": "noise.png"}, {"type": "text", "text": "what?"}]
    path = write_jsonl([{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "7"}]}])
    config = run_config(path, {"max_length": 128})
    [asked], _ = Prompts(config, EngineConfig(**SETTINGS), processor, 0).take(0, 1)
    [image] = asked.prompt.images
    assert image.size != (37, 21)
    image.save(folder / "sent.png")
    sent, grid, _ = encode_images([ImageSource("sent", path=folder / "sent.png")], processor, 10**9)
    assert sent.equal(asked.encoded.pixel_values) and grid.equal(asked.encoded.image_grid_thw)
    assert asked.prompt.messages[0]["content"][0] == {"type": "image"}
    assert asked.prompt.token_ids == asked.encoded.input_ids[: asked.encoded.prompt].tolist()
    assert CHAT is Prompts(config, EngineConfig(**SETTINGS), processor, 0).records.record_kind


@pytest.mark.parametrize("lag, left", [(0, [4, 5]), (1, [3, 4, 5])])
def test_files_of_older_rounds_are_removed_where_a_run_says_so(maker, lag, left):
    made, _, config = maker(lambda prompt, number: ["7", "8", "9"], lag=lag, keep_rounds=1)
    folder = round_file(config.train.output_dir, 0).parent
    for number in range(6):
        made.trained["r:4"] = number
        made.round(number, begin=4 * number)
        (folder / f"round_{number:06d}_images").mkdir()
    (folder / "round_mine.jsonl").touch()
    (folder / "round_000000_images").mkdir(exist_ok=True)
    (folder / "round_000000_images/mine.txt").touch()
    names = sorted(file.name for file in folder.iterdir())
    rounds = [f"round_{number:06d}{end}" for number in left for end in (".json", ".jsonl", "_images")]
    assert names == sorted([*rounds, "round_000000_images", "round_mine.jsonl"])


def test_a_round_that_a_checkpoint_needs_stays(maker):
    """Without its file a run cannot go on in the middle of it, and those after it would be sampled by other weights."""
    made, _, config = maker(lambda prompt, number: ["7", "8", "9"], keep_rounds=1)
    for step, (number, inside) in {2: (0, 0), 4: (1, 3), 6: (3, 0)}.items():
        folder = Path(config.train.output_dir, f"checkpoints/step_{step:08d}")
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"data": {"round": number, "step": inside}}))
    Path(config.train.output_dir, "checkpoints/step_00000001").mkdir()
    for number in range(8):
        made.trained["r:4"] = number
        made.round(number, begin=4 * number)
    left = [int(file.stem[-6:]) for file in round_file(config.train.output_dir, 0).parent.glob("*.jsonl")]
    assert sorted(left) == [1, 3, 4, 5, 6, 7]
