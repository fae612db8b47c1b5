"""The text of a conversation with the frames of its videos in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from ds_moe.data.images import RecordError
from ds_moe.data.marks import Rendered
from ds_moe.data.processor import Processor
from ds_moe.data.rendering import THE_TEMPLATE
from ds_moe.data.videos import VideoPlan


def with_frames(
    whole: Rendered, videos: Sequence[VideoPlan], processor: Processor
) -> tuple[Rendered, Callable[[int], int]]:
    """A text with the frames of videos in place of their tokens, and where in it a position of the old text is.

    Each group of frames is its time and, between the tokens of a vision's start and end, the video's token. Those that
    a template writes around the video's are taken out: transformers 4.57 and vLLM do that, and the models know no
    other prompts, but transformers 5 leaves them in.
    """
    video, start, end = processor.video_tokens
    own = set(whole.special)
    places = [(first, last) for first, last in whole.special if whole.text[first:last] == video]
    if len(places) != len(videos):
        raise RecordError(f"{THE_TEMPLATE} shows {len(places)} of the record's {len(videos)} videos")
    parts: list[str] = []
    special: list[tuple[int, int]] = []
    replaced: list[tuple[int, int]] = []  # of the old text
    moved = [(0, 0)]  # (from where on in the old text, by how much)
    length = taken = 0
    for (first, last), plan in zip(places, videos, strict=True):
        edges = (first - len(start), first), (last, last + len(end))
        if {*edges} <= own and [whole.text[a:b] for a, b in edges] == [start, end]:
            first, last = edges[0][0], edges[1][1]
        replaced.append((first, last))
        parts.append(whole.text[taken:first])
        length += first - taken
        for time in plan.times:
            parts += [time, start, video, end]
            length += len(time)
            for token in (start, video, end):
                special.append((length, length + len(token)))
                length += len(token)
        taken = last
        moved.append((last, length - last))
    starts = [old for old, _ in moved]

    def now(position: int) -> int:
        return position + moved[bisect_right(starts, position) - 1][1]

    for first, last in whole.special:
        if not any(begins <= first < ends for begins, ends in replaced):
            special.append((now(first), now(last)))
    text = "".join([*parts, whole.text[taken:]])
    return Rendered(text, {number: now(at) for number, at in whole.at.items()}, sorted(special)), now
