"""The forward context: what all MoE layers of a model must know about the micro-batch that runs through it."""

from dataclasses import dataclass, field

from torch import Tensor

from ds_moe.distributed import SequenceGroup
from ds_moe.moe.balance import Occupancy


@dataclass
class ForwardContext:
    """Facts about the micro-batch that runs through the model, shared by all of its MoE layers.

    The layers see hidden states only. A hook that the converter puts on the decoder calls `begin` at every forward, so
    that they know which tokens are padding and which belong to an image. The fields "of the next forward" are set by
    the trainer and used once.
    """

    token_V: Tensor | None = None  # int64 indices of the real tokens; None: every token is real
    real_BS: Tensor | None = None  # of the next forward: bool, false for padding and samples that only fill up
    sequence_BS: Tensor | None = None  # of the next forward: int64 sequence of each token, any value at padding
    sequences: int = 0  # of the next forward and then of the one that runs: how many there are; used with sequence_T
    sequence_T: Tensor | None = None  # int64 sequence of each token; None: each row is one
    occupancy: Occupancy | None = None  # of the optimizer step that runs; None: each micro-batch is a step
    row_group: SequenceGroup | None = None  # the ranks that share each row in training; None: each has its own
    rows: int = 1  # of the batch that runs, padding included; for layers that see a flat list of tokens
    image_T: Tensor | None = None  # bool, true at image tokens; None: there is none
    kind_BS: Tensor | None = None  # of the next forward: int64 kind of record of each token, -1 none
    kind_T: Tensor | None = None  # int64 kind of record of each token; None: not known
    routing_BSLK: Tensor | None = None  # of the next forward: experts to replay, -1 where the router decides
    replayed_TLK: Tensor | None = None  # the same for the forward that runs; None: the router decides everywhere
    replay_moves_bias: bool = False  # whether replayed assignments count for a loss-free bias
    aux_losses: list[Tensor] = field(default_factory=list)  # one scalar for each layer and balancer, with grad

    def begin(self, mask_BS: Tensor | None, image_BS: Tensor | None, rows: int = 1) -> None:
        """Start a forward: `mask_BS` is non-zero at real tokens, `image_BS` is true at image tokens."""
        self.rows = rows
        real_BS, self.real_BS = self.real_BS, None
        if real_BS is not None:
            mask_BS = real_BS if mask_BS is None else mask_BS.bool() & real_BS
        real_T = None if mask_BS is None else mask_BS.reshape(-1).bool()
        self.token_V = None if real_T is None or bool(real_T.all()) else real_T.nonzero().squeeze(1)
        self.image_T = None if image_BS is None else image_BS.reshape(-1)
        kind_BS, self.kind_BS = self.kind_BS, None
        self.kind_T = None if kind_BS is None else kind_BS.reshape(-1)
        sequence_BS, self.sequence_BS = self.sequence_BS, None
        self.sequence_T = None if sequence_BS is None else sequence_BS.reshape(-1)
        routing_BSLK, self.routing_BSLK = self.routing_BSLK, None
        self.replayed_TLK = None if routing_BSLK is None else routing_BSLK.flatten(0, 1)
        self.aux_losses = []
