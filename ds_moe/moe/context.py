"""What all MoE layers of a model must know of the micro-batch in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ForwardContext:
    """Facts of the micro-batch in flight, shared by all MoE layers of one model.

    The converter's hook on the decoder refreshes it at every forward, so that the layers, which only see
    hidden states, know what is padding and what is an image token.
    """

    token_V: Tensor | None = None  # int64 indices of the real tokens; None: every token is real
    real_B: Tensor | None = None  # bool, false for samples that only fill up the next forward's batch; used once
    image_T: Tensor | None = None  # bool, image tokens; None: there is none
    kind_B: Tensor | None = None  # int64 kind of each sample of the next forward's batch, -1 none; used once
    kind_T: Tensor | None = None  # int64, the same of each token; None: not known
    routing_BSLK: Tensor | None = None  # experts to replay in the next forward, -1 where the router decides; used once
    replayed_TLK: Tensor | None = None  # the same, of the forward in flight
    replay_moves_bias: bool = False  # whether replayed rows count for a loss-free bias
    aux_losses: list[Tensor] = field(default_factory=list)  # one scalar a layer and balancer, with grad

    def begin(self, mask_BS: Tensor | None, image_BS: Tensor | None) -> None:
        """Start a forward: `mask_BS` is non-zero at real tokens, `image_BS` is true at image tokens."""
        real_B, self.real_B = self.real_B, None
        if real_B is not None and mask_BS is not None:
            mask_BS = mask_BS.bool() & real_B.unsqueeze(1)
        real_T = None if mask_BS is None else mask_BS.reshape(-1).bool()
        self.token_V = None if real_T is None or bool(real_T.all()) else real_T.nonzero().squeeze(1)
        self.image_T = None if image_BS is None else image_BS.reshape(-1)
        kind_B, self.kind_B = self.kind_B, None
        known = kind_B is not None and mask_BS is not None
        self.kind_T = kind_B.unsqueeze(1).expand_as(mask_BS).reshape(-1) if known else None
        routing_BSLK, self.routing_BSLK = self.routing_BSLK, None
        self.replayed_TLK = None if routing_BSLK is None else routing_BSLK.flatten(0, 1)
        self.aux_losses = []
