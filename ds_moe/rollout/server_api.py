"""What the client needs of a server, whoever made it, and what it reads in the answers of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ds_moe.errors import UserError
from ds_moe.replay.traces import decode
from ds_moe.rollout.engine import Completion, Prompt, Sampling
from ds_moe.rollout.http import Http, Malformed, finite

CONTROL_S = 30.0  # seconds for an answer that needs no computation
SMALL = 2**24  # bytes of such an answer at most
MOST_ID = 2**31  # of a token: tokenizers and rollout files take no larger ones
LARGEST = 1e-3  # by which rounding may put a log-prob above 0
NAMES = {"fp32": "float32", "bf16": "bfloat16"}  # of a dtype, as servers have it
REASONS: dict[object, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Wanted:
    """What a run asks of its servers.

    Attributes:
        routing: whether completions must come with the experts that were used.
        longest: tokens of a prompt and its completion together.
        model: the name that the servers give the model; None: they serve one alone.
        dtype: of the weights that they are given, "fp32" or "bf16"; None: any.
    """

    routing: bool
    longest: int
    model: str | None = None
    dtype: str | None = None

    def wrong_dtype(self, found: object) -> str | None:
        """What is wrong with a server that computes in `found`, such as bfloat16: log-probs of fp32 weights would be
        further from the trainer's than those of other weights."""
        wanted = None if self.dtype is None else NAMES[self.dtype]
        if wanted is None or found == wanted:
            return None
        fix = f"start it with --dtype {wanted}, or set rl.engine.weights_dtype"
        return f"its dtype is {found}, but it is given weights in {self.dtype} ({fix})"


class OtherPrompt(UserError):
    """A server has read other ids than the trainer's."""


class ServerApi(Protocol):
    """The endpoints of one kind of server. Every method may raise what `Http.post` raises."""

    def check(self, http: Http) -> str:
        """What the server is, on one line. Raises `UserError` with a line for each setting that is wrong."""
        ...

    def sample(self, http: Http, prompt: Prompt, sampling: Sampling, seed: int, timeout_s: float) -> list[Completion]:
        """`sampling.completions` of them, their `version` empty."""
        ...

    def version(self, http: Http) -> str: ...

    def pause(self, http: Http, timeout_s: float) -> None: ...

    def load(self, http: Http, folder: Path, version: str, timeout_s: float) -> None:
        """Load the weights of a folder, and call them `version`; everything cached of others is forgotten."""
        ...

    def resume(self, http: Http) -> None: ...


def entries(value: object, key: str, where: str) -> list[dict[str, object]]:
    """The list of objects under `key` of an answer."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise Malformed(f"{where}: the answer has no {key!r} (is another program behind the url?)")
    return found


def token_ids(value: object, what: str, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(one) is int and 0 <= one < MOST_ID for one in value):
        raise Malformed(f"{where}: {what} are no token ids (is the server older than the client is written for?)")
    return value


def check_prompt(found: object, prompt: Prompt, where: str) -> None:
    """Raise `OtherPrompt` where a server has read other ids than the trainer's."""
    ids = token_ids(found, "the ids of the prompt", where)
    if ids == prompt.token_ids:
        return
    pairs = enumerate(zip(ids, prompt.token_ids, strict=False))
    first = next((place for place, (theirs, ours) in pairs if theirs != ours), min(len(ids), len(prompt.token_ids)))
    numbers = f"{len(ids)} token ids, where the trainer has {len(prompt.token_ids)}; the first to differ is {first}"
    fix = "serve the folder that the trainer reads, with its chat template and processor"
    raise OtherPrompt(f"{where}: {prompt.where or 'a prompt'} becomes {numbers} ({fix})")


def check_logprobs(values: object, tokens: Sequence[int], where: str, fix: str) -> list[float]:
    """Log-probs of a completion, as many as it has tokens."""
    if not isinstance(values, list) or len(values) != len(tokens):
        count = len(values) if isinstance(values, list) else "no"
        raise Malformed(f"{where}: {count} log-probs of {len(tokens)} tokens ({fix})")
    wrong = [value for value in values if not finite(value) or value > LARGEST]
    if wrong:
        raise Malformed(f"{where}: {wrong[0]} is no log-prob (the server computes wrong numbers: try another --dtype)")
    return [float(value) for value in values]


def check_routing(value: object, form: str, rows: int, where: str, flag: str) -> object | None:
    """The experts of a completion, unchanged, where they are as many rows as there are routed tokens.

    sglang's bytes do not tell their shape: they must be a whole number of int32 a row.
    """
    if value is None:
        raise Malformed(f"{where}: no routed experts (start the server with {flag})")
    try:
        if form == "sglang":
            found, rest = divmod(decode(value, kind=form, layers=1, top_k=1).ids.size, rows) if rows else (0, 0)
            if rest or (rows and not found):
                raise Malformed(f"{where}: routed experts of no whole {rows} rows (an answer that was cut off?)")
        elif (found := len(decode(value, kind=form).ids)) != rows:
            raise Malformed(f"{where}: routed experts of {found} tokens, where {rows} were routed (a cut-off answer?)")
    except UserError as error:
        raise Malformed(f"{where}: {error}") from error
    return value


def finished(reason: object, where: str) -> Literal["stop", "length"]:
    if not isinstance(reason, str) or reason not in REASONS:
        raise Malformed(f"{where}: a completion ended by {reason!r} (is somebody else pausing the server?)")
    return REASONS[reason]
