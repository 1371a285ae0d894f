"""Rows of unequal length, laid end to end: how tokens find their rows for attention, and lie together for all the rest.

Ragged is the plain form: rows, each padded to the longest. Forks is for sequences that begin with the same tokens.
"""

import torch


class Take(torch.autograd.Function):
    """x[index] for tokens that are moved, never added up: backward moves their gradients back, and zeroes `empty`."""

    @staticmethod
    def forward(ctx, x, index, back, empty):
        ctx.back, ctx.empty = back, empty
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.back)
        return (grad if ctx.empty is None else grad.index_fill_(0, ctx.empty, 0)), None, None, None


class Ragged:
    """N tokens that make R rows of unequal length, laid end to end so that no weight is ever multiplied with padding.

    Rows of 2 and 3 tokens: spread() turns (1, N, ...), a a b b b, into (R, T, ...), [[a a .], [b b b]], for what needs
    a row at a time; join() turns it back. T is rounded up to `multiple`. A padding slot holds its row's first token and
    passes no gradient on.
    """

    def __init__(self, lengths: list[int], device, multiple: int = 8):
        R, T = len(lengths), -(-max(lengths) // multiple) * multiple
        length = torch.tensor(lengths)[:, None]
        start = (length.cumsum(0) - length).clamp(max=sum(lengths) - 1)  # (R, 1); a row may be empty
        t = torch.arange(T)
        real = t < length  # (R, T)
        self.shape, self.even = (R, T), min(lengths) == T  # even: nothing needs to be moved
        self.token = torch.where(real, start + t, start).flatten().to(device)  # (R*T) which token is in each slot
        self.slot = real.flatten().nonzero()[:, 0].to(device)  # (N) which slot each token is in
        self.empty = (~real).flatten().nonzero()[:, 0].to(device)

    def spread(self, x):
        if self.even:
            return x.flatten(0, 1).unflatten(0, self.shape)
        return Take.apply(x.flatten(0, 1), self.token, self.slot, None).unflatten(0, self.shape)

    def join(self, x):
        if self.even:
            return x.flatten(0, 1)[None]
        return Take.apply(x.flatten(0, 1), self.slot, self.token, self.empty)[None]


class Forks:
    """R rows, each of which forks: a head, and the sequences that go on from it. They see the head and themselves.

    One row with a head of 1 token and tails of 2 and 3, a b b c c c: spread() turns (1, N, ...) into the heads (R, T1, ...),
    [[a]], and the S tails of all rows (S, T2, ...), [[b b .], [c c c]]; join() turns both back. As one row of 6 tokens, most
    of what attention computes would be masked out. Padding is as in Ragged.

    `masks` says who looks at whom: heads at themselves (R, T1, T1), tails at their head and themselves (S, T2, T1 + T2).
    """

    @staticmethod
    def sizes(rows: list[tuple], multiple: int = 8) -> tuple[int, int]:
        """T1 and T2: T2 is the next multiple of `multiple`, T1 + T2 the next one of 4 * multiple. (In bfloat16, a softmax
        over 128 scores takes half as long as over 120.)"""
        T2 = -(-max(n for row in rows for n in row[1:]) // multiple) * multiple
        T1 = max(row[0] for row in rows)
        return T1 + -(T1 + T2) % (4 * multiple), T2

    def __init__(self, rows: list[tuple], device, multiple: int = 8):
        """rows: for each, (tokens of its head, tokens of its first tail, ...)."""
        length = torch.tensor([n for row in rows for n in row])  # of each piece, as they lie
        is_head = torch.tensor([i == 0 for row in rows for i in range(len(row))])
        start = (length.cumsum(0) - length).clamp(max=int(length.sum()) - 1)
        T1, T2 = self.sizes(rows, multiple)
        self.shapes, token, real = [], [], []
        for mine, T in ((is_head, T1), (~is_head, T2)):
            t, n = torch.arange(T), length[mine][:, None]
            self.shapes.append((len(n), T))
            real.append((t < n).flatten())
            token.append((start[mine][:, None] + t.where(t < n, 0)).flatten())
        token, real = torch.cat(token), torch.cat(real)
        slot = real.nonzero()[:, 0]
        self.token = token.to(device)  # which token is in each slot, heads first
        self.slot = slot[token[slot].argsort()].to(device)  # (N) which slot each token is in
        self.empty = (~real).nonzero()[:, 0].to(device)
        self.tails = [len(row) - 1 for row in rows]  # of each head
        seen = (torch.arange(T1) < length[is_head][:, None]).repeat_interleave(torch.tensor(self.tails), dim=0).to(device)
        own = torch.ones(T2, T2, dtype=torch.bool, device=device).tril().expand(len(seen), -1, -1)
        tails = torch.cat([seen[:, None].expand(-1, T2, -1), own], dim=2)  # (S, T2, T1 + T2)
        self.masks = torch.ones(len(rows), T1, T1, dtype=torch.bool, device=device).tril(), tails

    def spread(self, x) -> tuple:
        pieces = Take.apply(x.flatten(0, 1), self.token, self.slot, None).split([n * T for n, T in self.shapes])
        return tuple(piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes))

    def after(self, heads, tails):
        """heads (R, T1, ...), tails (S, T2, ...) -> (S, T1 + T2, ...), each tail after its head."""
        repeated = [head.expand(n, *head.shape[1:]) for head, n in zip(heads.split(1), self.tails)]
        return torch.cat([torch.cat(repeated), tails], dim=1)

    def join(self, heads, tails):
        x = torch.cat([heads.flatten(0, 1), tails.flatten(0, 1)])
        return Take.apply(x, self.slot, self.token, self.empty)[None]
