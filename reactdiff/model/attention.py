"""The attention unit: one stream asks, another (or itself) answers."""

from torch import Tensor, nn


class AttentionUnit(nn.Module):
    """A(q, kv) = LayerNorm(attention(q, k, v) + q): no feed-forward, no position, no dropout.

    q, k and v are first projected to the hidden width, each only where its stream is not that wide already. Projections of
    one stream are one matrix product.

    Args:
        asking: width of the stream that asks.
        attended: width of the stream that is attended to; None where the asking stream attends to itself.
        hidden: width of the unit.
        heads: attention heads.
    """

    def __init__(self, asking: int, attended: int | None, hidden: int, heads: int):
        super().__init__()
        if attended is None:
            self.qkv = _projection(asking, hidden, 3)
        else:
            self.q = _projection(asking, hidden, 1)
            self.kv = _projection(attended, hidden, 2)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, asking: Tensor, attended: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(batch, frames, asking) and, unless it attends to itself, (batch, frames, attended) -> (batch, frames, hidden).

        Of `hidden` (frames, frames), true is what a frame must not see.
        """
        if attended is None:
            q, k, v = _split(self.qkv, asking, 3)
        else:
            (q,), (k, v) = _split(self.q, asking, 1), _split(self.kv, attended, 2)
        return self.norm(self.attention(q, k, v, attn_mask=hidden, need_weights=False)[0] + q)


def _projection(width: int, hidden: int, parts: int) -> nn.Linear | None:
    return nn.Linear(width, parts * hidden) if width != hidden else None


def _split(projection: nn.Linear | None, stream: Tensor, parts: int) -> tuple[Tensor, ...]:
    return (stream,) * parts if projection is None else projection(stream).chunk(parts, dim=-1)
