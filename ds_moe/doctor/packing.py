"""What packed rows a run would have: how many a step, how full, and how long ranks wait for the slowest one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ds_moe.doctor.case import Case, Finding

EMPTY = 0.7  # rows that are fuller need no remark


def check_packing(case: Case) -> Iterator[Finding]:
    """The rows of the run's first steps, from all records if a run has counted their tokens, else from some of them."""
    from ds_moe.data.chat import BadRecord
    from ds_moe.data.encoder import Encoder
    from ds_moe.data.packing import PackedRows
    from ds_moe.data.position import epoch_order_of
    from ds_moe.data.token_counts import kept_counts
    from ds_moe.monitor.flops import patch_cost

    config, records, processor = case.config, case.train, case.processor
    if not config.data.packing or records is None or processor is None:
        return
    encoder = Encoder(config, records, processor)
    counts = kept_counts(config, "train", records, encoder, processor)
    if counts is not None:
        tokens, patches, source = counts.tokens, counts.patches, "all records"
    else:
        some = np.linspace(0, len(records) - 1, min(case.samples, len(records))).astype(int)
        found = [one for one in map(encoder.measure, some.tolist()) if not isinstance(one, BadRecord)]
        if not found:
            return
        sizes = np.resize(np.array(found, dtype=np.int64), (len(records), 2))  # as if the others were like these
        tokens, patches, source = sizes[:, 0], sizes[:, 1], f"{len(found)} records"
    train, order = config.train, epoch_order_of(config, records, tokens)
    cost = patch_cost(case.outline) if case.outline is not None else 0.0
    rows_at_once = max(1, case.world_size // train.sequence_parallel)
    fill = PackedRows(order, tokens, patches, cost, config.tokens_per_row, rows_at_once).outlook()
    line = f"packing: {fill} (by the tokens of {source}; a patch counts as {cost:.2f} tokens)"
    if fill.share >= EMPTY:
        yield Finding("ok", line)
        return
    of_a_step = fill.tokens // fill.steps // rows_at_once
    fix = f"a rank has about {of_a_step:,} tokens a step: make train.global_batch_size larger"
    yield Finding("warning", f"{config.at('train.global_batch_size')}: {line}; {fix}, or rows shorter")
