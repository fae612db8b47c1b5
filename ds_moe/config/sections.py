"""The keys that every run has, with their defaults: `model`, `data`, `train`, `lora`, `monitor`, `checkpoint`.

The comment of a key says what it means and in which unit. `run_file.py` reads YAML and dotted overrides into these
classes; `check.py` refuses keys that a run would not use.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator


class Section(BaseModel):
    """A section of a run file. Unknown keys are errors, and values are checked but never converted ("8" is not 8)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False, protected_namespaces=()
    )


class Located(Section):
    """The root of a file, which remembers where each of its keys was written."""

    _file: str = PrivateAttr("run file")
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def remember_origins(self, file: str, origins: dict[str, str]) -> None:
        """Keep where each dotted key was written ("run.yaml:12", "override train.lr=1"), for error messages."""
        self._file, self._origins = file, origins

    def at(self, key: str) -> str:
        """Where `key`, or else the closest section around it, was written; the file itself where neither was."""
        return origin_of(key, self._origins, self._file)


class ModelConfig(Section):
    path: str | None = None  # local folder or hub id of a checkpoint, of a family that docs/models.md lists
    preset: str | None = None  # or a tiny random model, one of ds_moe/models/presets.py
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    freeze: list[str] = []  # "vision", "router", "experts", "embeddings" or a regex that parameter names match

    @field_validator("freeze")
    @classmethod
    def _freeze_is_regex(cls, freeze: list[str]) -> list[str]:
        for entry in freeze:
            try:
                re.compile(entry)
            except re.error as error:
                raise ValueError(f"{entry!r} is no regular expression ({error})") from error
        return freeze


ContentToken = Annotated[str, Field(min_length=1)]
DIGITS = "digits"  # the path of the bundled scans
# Keys that records of any task have; `columns` gives them columns of other names.
RecordKey = Literal[
    "messages", "system", "images", "videos", "tools", "objects", "literal", "kind", "adapter", "prompt", "chosen",
    "rejected",
]  # fmt: skip


class SourceConfig(Section):
    """Where records come from, if a path alone does not say all of it."""

    path: str = Field(min_length=1)  # JSONL (.gz, .zst), Parquet or tar files, a folder, a glob, hub:OWNER/NAME, digits
    name: str | None = Field(
        default=None, min_length=1
    )  # label of its records; of several sources the path's last part
    columns: dict[RecordKey, str] = {}  # key of a record: the column of the source that holds it
    root: str | None = None  # as data.root; of a hub dataset a folder within it
    split: str | None = Field(default=None, min_length=1)  # of a hub dataset (default train), or of a saved DatasetDict
    subset: str | None = Field(default=None, min_length=1)  # of a hub dataset that has several
    revision: str | None = Field(default=None, min_length=1)  # of a hub dataset: a commit, tag or branch


class TrainSource(SourceConfig):
    weight: float | None = Field(default=None, gt=0)  # share of the records, in that of the other sources
    epochs: float | None = Field(default=None, gt=0)  # passes over this source in an epoch of the run


# The forms of data.train and data.eval. pydantic puts the name of the form into the location of an error; no key may be
# called like one, see `complaints.py`.
TEXT, SECTION, LIST = FORMS = ("(text)", "(section)", "(list)")


def _form(value: object) -> str:
    return LIST if isinstance(value, list) else _form_of_one(value)


def _form_of_one(value: object) -> str:
    return SECTION if isinstance(value, dict | SourceConfig) else TEXT


AsText = Annotated[str, Field(min_length=1), Tag(TEXT)]
OneToTrain = Annotated[AsText | Annotated[TrainSource, Tag(SECTION)], Discriminator(_form_of_one)]
OneToEvaluate = Annotated[AsText | Annotated[SourceConfig, Tag(SECTION)], Discriminator(_form_of_one)]
ToTrain = Annotated[
    AsText | Annotated[TrainSource, Tag(SECTION)] | Annotated[list[OneToTrain], Field(min_length=1), Tag(LIST)],
    Discriminator(_form),
]
ToEvaluate = Annotated[
    AsText | Annotated[SourceConfig, Tag(SECTION)] | Annotated[list[OneToEvaluate], Field(min_length=1), Tag(LIST)],
    Discriminator(_form),
]
Sources = str | SourceConfig | list[str | TrainSource] | list[str | SourceConfig]


def sources_of(given: Sources | None) -> list[TrainSource]:
    """The sources of data.train or data.eval, in their order, each as a section; those of data.eval have no share."""
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return [TrainSource(path=one) if isinstance(one, str) else TrainSource(**dict(one)) for one in listed]


def has_digits(given: Sources | None) -> bool:
    """Whether the bundled scans are among the sources."""
    return any(source.path == DIGITS for source in sources_of(given))


def sources_named(given: Sources | None) -> str:
    """The sources in a line for people: their paths."""
    return ", ".join(source.path for source in sources_of(given))


class MixtureConfig(Section):
    """How often the records of several sources are drawn; what no key says is once an epoch, each record."""

    temperature: float | None = Field(default=None, ge=1)  # shares by size^(1 / temperature): 1 as large as they are
    epoch: Literal["all", "shortest", "longest"] = "all"  # how many records one has, with weights or a temperature


class VideoConfig(Section):
    """Which frames of a video are taken and how large they become, where not as the model's folder says; and limits."""

    fps: float | None = Field(default=None, gt=0)  # frames taken a second, within min_frames and max_frames
    min_frames: int | None = Field(default=None, gt=0)  # of a video that has so many
    max_frames: int | None = Field(default=None, gt=0)
    min_pixels: int | None = Field(default=None, gt=0)  # of all frames of a video together, resized
    max_pixels: int | None = Field(default=None, gt=0)  # the same
    max_seconds: float = Field(default=600.0, gt=0)  # a longer video is a bad record; so is one of
    max_gb: float = Field(default=2.0, gt=0)  # more GiB as stored
    timeout_s: float = Field(default=120.0, gt=0)  # for the decoding of one video
    memory_gb: float = Field(default=2.0, gt=0)  # GiB of the process that decodes


class DataConfig(Section):
    train: ToTrain  # a source of records, or a list; "digits": bundled scans; in task rl without engine rollouts
    eval: ToEvaluate | None = None  # as train; here "digits" is the held-out split
    mixture: MixtureConfig = MixtureConfig()  # of several sources
    root: str | None = None  # folder that images must lie in; default: that of the data file
    max_length: int = Field(default=2048, gt=0)  # tokens a sample, image tokens included
    max_pixels: int = Field(default=16_777_216, gt=0)  # of one image as stored; a larger one is a bad record
    train_on: Literal["last", "all"] = "all"  # which answers of a conversation are learned
    content_tokens: list[ContentToken] = []  # special tokens that texts may write, such as "<|box_start|>"
    on_bad_record: Literal["stop", "skip"] = "stop"
    shuffle: bool = True
    streaming: bool = False  # no index of records, no pass over them before the first step; for files of any size
    shuffle_window_mb: int = Field(default=32, gt=0)  # MiB of streamed records that are shuffled together, and held
    length_grouping: bool = True  # samples of similar length share a micro-batch
    video: VideoConfig = VideoConfig()
    packing: bool = False  # samples of any length fill rows without padding, see train.tokens_per_micro_batch
    num_workers: int = Field(default=0, ge=0)  # processes a rank
    prefetch_factor: int | None = Field(default=None, gt=0)  # steps a worker prepares ahead (default 2)
    prepared: str | None = None  # folder of `ds-moe data prepare`; default: data_cache/prepared in train.output_dir


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    output_dir: str = Field(default="runs/default", min_length=1)
    stage: Literal["all", "router_only"] = "all"  # router_only: everything but the routers is frozen
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["fp32", "bf16"] | None = None  # default: bf16 on an accelerator, fp32 on CPU
    steps: int | None = Field(default=None, gt=0)  # optimizer steps; or
    epochs: int | None = Field(default=None, gt=0)  # passes over the data
    micro_batch_size: int = Field(default=1, gt=0)  # samples of one rank in one forward; with data.packing instead
    tokens_per_micro_batch: int | None = Field(default=None, gt=0)  # at most so many tokens; default data.max_length
    global_batch_size: int = Field(default=8, gt=0)  # samples of an optimizer step; determines the accumulation
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices of hidden layers, AdamW for the rest
    sequence_parallel: int = Field(default=1, gt=0)  # consecutive ranks that share each packed row, a part each
    lr: float = Field(default=1e-5, gt=0)
    muon_lr: float | None = Field(default=None, gt=0)  # of Muon's matrices, which AdamW's would suit; default lr
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)  # where the cosine ends, as a share of lr
    weight_decay: float = Field(default=0.0, ge=0)  # matrices only; norms and biases never decay
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: no clipping
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # what checkpointed layers keep waits in host memory for the backward pass
    resume: str = Field(default="auto", min_length=1)  # auto: the newest complete one of output_dir; never; a folder
    eval_every: int | None = Field(default=None, gt=0)  # steps; with data.eval the end is evaluated in any case
    eval_batch_size: int | None = Field(default=None, gt=0)  # samples of one rank; default micro_batch_size, packed 8
    eval_samples: int | None = Field(default=None, gt=0)  # that periodic evaluations take of data.eval; default all
    eval_generate: bool = True  # also generate answers and count exact matches
    max_new_tokens: int | None = Field(default=None, gt=0)  # of a generated answer (default 16)
    patience: int | None = Field(default=None, gt=0)  # the run ends after so many evaluations without a better loss
    max_skipped: int = Field(default=3, ge=0)  # steps in a row skipped for a NaN or infinity; one more ends the run
    watchdog_s: float = Field(default=600.0, gt=0)  # a rank without progress for so many seconds ends the job
    stop_within_s: float = Field(default=120.0, gt=0)  # seconds that a signal leaves for the step and a checkpoint


class LoRAConfig(Section):
    """Freezes the model and trains low-rank updates of its matrices."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)  # updates are scaled by alpha / rank
    rslora: bool = False  # they are scaled by alpha / sqrt(rank) instead
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the inputs of updates, in training
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]  # linear layers, by the last part of their names
    experts: bool = False  # also update gate_up and down of every expert
    train_router: bool = False  # also train the routers' weights, in full


class MonitorConfig(Section):
    tensorboard: bool = True
    log_every: int = Field(default=10, gt=0)  # steps
    heatmap_every: int = Field(default=50, gt=0)  # steps between layer x expert load images
    sample_images: int = Field(default=4, ge=0)  # evaluated samples shown as images
    dead_alarm_steps: int = Field(default=100, gt=0)  # report an expert that got no token for so many steps


class CheckpointConfig(Section):
    every: int | None = Field(default=None, gt=0)  # steps; default: only at the end
    keep: int = Field(default=2, gt=0)
    background: bool = False  # training continues while a copy in host memory is written


def origin_of(key: str, origins: dict[str, str], file: str) -> str:
    """Where a dotted key or else its nearest parent was written, by `origins`; `file` where neither was."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return file
