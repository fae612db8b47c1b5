"""The conversations of data.train as prompts of an engine, in an order that is a function of seed and position."""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from ds_moe.config.rollout import EngineConfig
from ds_moe.config.run import RunConfig
from ds_moe.data.bad_records import BadRecordLog
from ds_moe.data.chat import BadRecord, Sample
from ds_moe.data.chat_template import TokenRules
from ds_moe.data.encode import Encoded, answer_text, encode
from ds_moe.data.images import RecordError, load_image
from ds_moe.data.marks import plain_message
from ds_moe.data.position import epoch_order_of
from ds_moe.data.processor import Processor
from ds_moe.data.records import records_of
from ds_moe.data.special_tokens import content_tokens_of
from ds_moe.errors import UserError
from ds_moe.rollout.engine import Prompt
from ds_moe.tasks.rl.rollout_record import without_videos


@dataclass(frozen=True)
class Asked:
    """A prompt, and what a reward is told of the record behind it."""

    position: int  # counts prompts from the first one of the run
    prompt: Prompt
    sample: Sample
    answer: str  # the reference
    encoded: Encoded  # prompt and reference


class Prompts:
    """The prompts of a run, by position, in the order that the records of an epoch have.

    Raises `UserError` for data that cannot be read, as a `TrainStream`.
    """

    def __init__(self, config: RunConfig, engine: EngineConfig, processor: Processor, rank: int) -> None:
        self._data, self._engine, self._processor = config.data, engine, processor
        self.records = records_of(config, "train")
        self._order = epoch_order_of(config, self.records)
        self._rules = TokenRules("last", content_tokens_of(config, processor))
        self.log = BadRecordLog(config, list(self.records.bad), rank)

    def __len__(self) -> int:
        """Of an epoch."""
        return self._order.records_per_epoch

    def index(self, position: int) -> int:
        """The record behind the prompt of a position."""
        epoch, place = divmod(position, self._order.records_per_epoch)
        return int(self._order.epoch(epoch)[place])

    def ahead(self, position: int) -> Iterator[Asked | BadRecord]:
        """The prompts from a position on, endless."""
        while True:
            yield self._at(position)
            position += 1

    def take(self, position: int, count: int) -> tuple[list[Asked], int]:
        """The next `count` prompts that can be asked, and the position behind them.

        Raises `UserError` for a bad record under data.on_bad_record stop, or where all are bad.
        """
        found: list[Asked] = []
        unusable = 0
        for one in self.ahead(position):
            position += 1
            if isinstance(one, Asked):
                found.append(one)
                unusable = 0
            else:
                self.log.note([one])
                unusable += 1
            if unusable >= len(self.records):
                raise UserError(f"data.train: not one of its {len(self.records)} records is a prompt; the last: {one}")
            if len(found) == count:
                return found, position
        raise AssertionError("prompts are endless")

    def _at(self, position: int) -> Asked | BadRecord:
        index = self.index(position)
        try:
            sample = self.records.sample(index)
            return self.asked(sample, position)
        except RecordError as error:
            return BadRecord(self.records.where(index), str(error))

    def asked(self, sample: Sample, position: int = 0) -> Asked:
        """Raises `RecordError` for a conversation that cannot be asked about."""
        data = self._data
        encoded = encode(without_videos(sample), self._processor, data.max_length, data.max_pixels, self._rules)
        longest = data.max_length - self._engine.max_new_tokens
        if encoded.prompt > longest:
            reason = f"over-long: a prompt of {encoded.prompt} tokens and rl.engine.max_new_tokens"
            fix = "shorten the record, or raise the limit"
            raise RecordError(
                f"{reason} {self._engine.max_new_tokens} are beyond data.max_length {data.max_length} ({fix})"
            )
        turns = sample.turns[:-1]
        prompt = Prompt(
            token_ids=encoded.input_ids[: encoded.prompt].tolist(),
            messages=[dict(plain_message(turn)) for turn in turns],
            images=self._images(sample, encoded),
            tools=[dict(tool) for tool in sample.tools] or None,
            where=sample.where,
        )
        answer = answer_text(encoded, self._processor, data.content_tokens)
        return Asked(position, prompt, sample, answer, encoded)

    def _images(self, sample: Sample, encoded: Encoded) -> list[Image.Image]:
        """At the size that the processor gives them, by the filter that it takes: then it leaves them as they are."""
        prepare = self._processor.image_processor
        if prepare is None or encoded.image_grid_thw is None:
            return []
        if not self._processor.resizes:
            raise UserError(
                f"rl.engine cannot be given this model's images, because {type(self._processor).__name__} does more "
                "than resize them; take records without images, or rollouts from files (rl.rollouts)"
            )
        images = []
        for source, (_, rows, columns) in zip(sample.images, encoded.image_grid_thw.tolist(), strict=True):
            image, size = (
                load_image(source, self._data.max_pixels),
                (columns * prepare.patch_size, rows * prepare.patch_size),
            )
            images.append(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
        return images
