"""Sequences of unequal length, so that little is padded: which share a row, and how attention sees
the rows.

    Example                 one training sequence: token ids, and which of them the loss counts
    arrange(), make_row()   sequences -> rows; a prompt that they begin with is laid down once
    Ragged                  rows of unequal length, end to end <-> side by side
    Packed, SharedPrefix    the `attend` of such rows (model.py says what that is)

Everything but attention runs on tokens laid end to end, (1, N, ...), so no weight is ever
multiplied with padding. Letters as in model.py.
"""

import itertools
import math
import os.path
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from model import Transformer, additive, causal_mask

# -----------------------------------------------------------------------------
# examples and rows


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and for each token whether the loss counts it (the first is
    never predicted)."""

    ids: tuple
    counts: tuple  # bool per token
    weight: float = 1.0  # of its tokens in the loss: 1 to imitate it; may be negative
    # What a teacher expects in place of the L tokens that are predicted (those that count, but the
    # first of all): ids (L, K) and their shares (L, K), which sum to 1; None: the tokens. Left out
    # of repr(), by which a log knows an example again: other expectations need another log.
    soft: tuple | None = field(default=None, repr=False, compare=False)

    @classmethod
    def reply(cls, prompt: list[int], reply: list[int], weight: float = 1.0) -> "Example":
        """A prompt, which is not counted, and a reply, every token of which is."""
        return cls((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply), weight)


def pack(lengths: list[int], row_len: int) -> list[list[int]]:
    """Put sequences of the given lengths into rows of at most `row_len` tokens, as evenly filled as
    possible. Indices per row, fullest row first.

    pack([60, 50, 30, 70], 128) -> [[0, 1], [3, 2]], 110 and 100 tokens. A sequence longer than that
    has a row of its own; row_len 0 puts each sequence in a row of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    own = [[i] for i in order if not row_len or lengths[i] >= row_len]
    rest = order[len(own) :]
    if not rest:
        return own
    for n in range(math.ceil(sum(lengths[i] for i in rest) / row_len), len(rest) + 1):
        rows, filled = [[] for _ in range(n)], [0] * n
        for i in rest:  # the longest first, each to the emptiest row
            r = filled.index(min(filled))
            rows[r].append(i)
            filled[r] += lengths[i]
        if max(filled) <= row_len:  # at the latest with a row for each
            return own + sorted(rows, key=lambda row: -sum(lengths[i] for i in row))


def shared_prefix(examples: list[Example]) -> int:
    """How many first tokens all examples share, none of them counted or an example's last. 0 for
    fewer than two examples.

    Chats that ask "Who cast it?" and "Who rang it?" share all up to "Who".
    """
    if len(examples) < 2:
        return 0
    shared = os.path.commonprefix([(*zip(e.ids, e.counts),) for e in examples])
    counted = [i for i, (_, counts) in enumerate(shared) if counts]
    return min([len(shared), *counted, *(len(e.ids) - 1 for e in examples)])


def arrange(examples: list[Example], row_len: int) -> list[tuple[list[int], int]]:
    """Which examples share a row, and how many first tokens they share in it; the row with the most
    tokens first.

    Those that begin with a prompt, which the loss does not count, share rows among themselves, and
    the prompt's common beginning is read once for all: notes that are questions share half of their
    tokens. Prompts of several kinds are packed a kind at a time if that takes fewer tokens.
    """
    plain = [i for i, e in enumerate(examples) if e.counts[0]]
    prompted = [i for i, e in enumerate(examples) if not e.counts[0]]
    ways = []
    for kinds in ([prompted], alike(examples, prompted)):
        rows = []
        for kind in (plain, *kinds):
            prefix = shared_prefix([examples[i] for i in kind]) if row_len else 0
            packed = pack([len(examples[i].ids) - prefix for i in kind], max(0, row_len - prefix))
            rows += [(list(map(kind.__getitem__, row)), prefix) for row in packed]
        ways.append(rows)
    tokens = partial(row_tokens, examples)
    fewest = min(ways, key=lambda rows: sum(itertools.starmap(tokens, rows)))
    return sorted(fewest, key=lambda row: -tokens(*row))


def alike(examples: list[Example], some: list[int]) -> list[list[int]]:
    """The given examples, in groups: neighbours in alphabetical order that share a quarter of the
    longer one are in the same."""
    order, groups = sorted(some, key=lambda i: examples[i].ids), []
    for before, i in zip([None, *order], order):
        shared = shared_prefix([examples[i], examples[before]]) if groups else 0
        if not groups or 4 * shared < max(len(examples[i].ids), len(examples[before].ids)):
            groups.append([])
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def row_tokens(examples: list[Example], row: list[int], prefix: int) -> int:
    """How many tokens a row of arrange() has."""
    return prefix + sum(len(examples[i].ids) - prefix for i in row)


@dataclass(frozen=True)
class Row:
    """Packed sequences as tensors: T tokens, L of which are predicted from the one before."""

    ids: torch.Tensor  # (T)
    pos: torch.Tensor  # (T) position within its own sequence
    lengths: tuple  # tokens of the prefix that all sequences begin with, and of each after it
    at: torch.Tensor  # (L) index of the token that predicts
    target: torch.Tensor  # (L, K) ids that it should predict, K = 1 without a teacher
    share: torch.Tensor  # (L, K) their probabilities
    weight: torch.Tensor  # (L)
    before: torch.Tensor | None = None  # (L, 2) log-probabilities, for lm/outer.py
    x: torch.Tensor | None = None  # (T, C) what the frozen lower layers make of the tokens

    @property
    def key(self) -> tuple:
        """Rows with the same key have the same states."""
        return tuple(self.ids.tolist()), self.lengths


def n_tokens(rows: list[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def make_row(examples: list[Example], prefix: int = 0) -> Row:
    """Lay examples end to end. ids [5 6 7] all counted, then [8 9]: at = [0 1 3], target = [[6] [7]
    [9]].

    The first `prefix` tokens, the same in all examples and never counted, are laid down once and
    looked at by all. Ids [5 6 7] and [5 6 8 9] with prefix 2 are laid as 5 6 7 8 9, at positions 0
    1 2 2 3; lengths are then (2, 1, 2).
    """
    ids, pos, lengths = list(examples[0].ids[:prefix]), list(range(prefix)), [prefix]
    at, weight, targets, shares = [], [], [], []
    for e in examples:
        # Where in the row each token stands.
        index = [*range(prefix), *range(len(ids), len(ids) + len(e.ids) - prefix)]
        predicted = [t for t in range(1, len(e.ids)) if e.counts[t]]
        at += [index[t - 1] for t in predicted]
        target = torch.tensor([e.ids[t] for t in predicted], dtype=torch.long)[:, None]
        target, share = e.soft or (target, torch.ones(target.shape))
        targets.append(target.long()), shares.append(share.float())
        weight += [e.weight] * len(predicted)
        ids += e.ids[prefix:]
        pos += range(prefix, len(e.ids))
        lengths.append(len(e.ids) - prefix)
    ids, pos, at = (torch.tensor(v, dtype=torch.long) for v in (ids, pos, at))
    target, share = side_by_side(targets), side_by_side(shares)
    return Row(ids, pos, tuple(lengths), at, target, share, torch.tensor(weight).float())


def side_by_side(columns: list) -> torch.Tensor:
    """Tensors (L, K) of several K, end to end, as wide as the widest: zeros beside the others."""
    K = max(m.size(1) for m in columns)
    return torch.cat([F.pad(m, (0, K - m.size(1))) for m in columns])


# -----------------------------------------------------------------------------
# end to end <-> side by side


class Take(torch.autograd.Function):
    """x[index] for tokens that are moved, never added up: backward moves their gradients back, and
    zeroes `empty`."""

    @staticmethod
    def forward(ctx, x, index, back, empty):
        ctx.back, ctx.empty = back, empty
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.back)
        return (grad if ctx.empty is None else grad.index_fill_(0, ctx.empty, 0)), None, None, None


class Ragged:
    """N tokens that make R rows of unequal length, laid end to end.

    Rows of 2 and 3 tokens: spread() turns (1, N, ...), a a b b b, into (R, T, ...), [[a a .], [b b
    b]], for what needs a row at a time; join() turns it back. T is rounded up to `multiple`. A
    padding place holds its row's first token and passes no gradient on.
    """

    def __init__(self, lengths: list[int], device, multiple: int = 8):
        R, T = len(lengths), -(-max(lengths) // multiple) * multiple
        length = torch.tensor(lengths)[:, None]
        # (R, 1); a row may be empty
        start = (length.cumsum(0) - length).clamp(max=sum(lengths) - 1)
        t = torch.arange(T)
        real = t < length  # (R, T)
        self.shape, self.even = (R, T), min(lengths) == T  # even: nothing needs to be moved
        # (R*T) which token is in each place
        self.token = torch.where(real, start + t, start).flatten().to(device)
        self.place = real.flatten().nonzero()[:, 0].to(device)  # (N) which place each token is in
        self.empty = (~real).flatten().nonzero()[:, 0].to(device)

    def spread(self, x):
        if self.even:
            return x.flatten(0, 1).unflatten(0, self.shape)
        return Take.apply(x.flatten(0, 1), self.token, self.place, None).unflatten(0, self.shape)

    def join(self, x):
        if self.even:
            return x.flatten(0, 1)[None]
        return Take.apply(x.flatten(0, 1), self.place, self.token, self.empty)[None]


def ragged_or_even(lengths: list[int], device) -> Ragged | None:
    """Ragged rows, padded no more than they must; None for equal ones: a view does."""
    return None if len(set(lengths)) == 1 else Ragged(lengths, device, multiple=1)


# -----------------------------------------------------------------------------
# attention over such rows


def packed_mask(segment):
    """segment (R, T) int, which sequence each token belongs to -> block-diagonal causal mask (R, T,
    T).

    segment = [[1, 1, 2]] gives [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]: the third token starts a
    sequence of its own. Segment 0 is what all sequences begin with: [[0, 1, 2]] gives [[[1, 0, 0],
    [1, 1, 0], [1, 0, 1]]].
    """
    T = segment.size(1)
    seen = segment[:, None, :]
    return causal_mask(T, T, segment.device) & ((seen == segment[:, :, None]) | (seen == 0))


class Packed:
    """`attend` for rows of several sequences: each looks at itself and at the row's prefix.

    q, k and v are (1, N, heads, D); `rows` says of each row (tokens of the prefix, of the first
    sequence, ...).
    """

    def __init__(self, rows: list[tuple], model: Transformer):
        self.attention, self.ragged = (
            model.attention,
            Ragged([sum(row) for row in rows], model.device),
        )
        numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
        segment = self.ragged.spread(torch.cat(numbers)[None].to(model.device))
        # (R, T, T); padding ends a row: nothing looks at it
        self.bias = additive(packed_mask(segment), model.dtype)

    def __call__(self, q, k, v):
        q, k, v = (self.ragged.spread(x) for x in (q, k, v))
        return self.ragged.join(self.attention(q, k, v, self.bias))


class SharedPrefix:
    """`attend` for rows that fork: a prefix, and the sequences that go on from it. They see the
    prefix and themselves.

    One row with a prefix of 1 token and sequences of 2 and 3, a b b c c c, is attended to as the
    prefix [[a]] (R, T1) and as the S sequences of all rows [[b b .], [c c c]] (S, T2), each of
    which also sees its prefix. As one row of 6 tokens, most of what attention computes would be
    masked out. Padding is as in Ragged.
    """

    @staticmethod
    def sizes(rows: list[tuple], multiple: int = 8) -> tuple[int, int]:
        """T1 and T2: T2 is the next multiple of `multiple`, T1 + T2 the next one of 4 * multiple.
        (In bfloat16, a softmax over 128 scores takes half as long as over 120.)"""
        longest = max(max(row[1:]) for row in rows)
        T2 = -(-longest // multiple) * multiple
        T1 = max(row[0] for row in rows)
        return T1 + -(T1 + T2) % (4 * multiple), T2

    def __init__(self, rows: list[tuple], model: Transformer):
        self.attention, device = model.attention, model.device
        length = torch.tensor([n for row in rows for n in row])  # of each piece, as they lie
        is_prefix = torch.cat([torch.arange(len(row)) == 0 for row in rows])
        start = (length.cumsum(0) - length).clamp(max=int(length.sum()) - 1)
        T1, T2 = self.sizes(rows)
        self.shapes, token, real = [], [], []
        for pieces, T in ((is_prefix, T1), (~is_prefix, T2)):
            t, n = torch.arange(T), length[pieces][:, None]
            self.shapes.append((len(n), T))
            real.append((t < n).flatten())
            token.append((start[pieces][:, None] + t.where(t < n, 0)).flatten())
        token, real = torch.cat(token), torch.cat(real)
        place = real.nonzero()[:, 0]
        self.token = token.to(device)  # which token is in each place, prefixes first
        self.place = place[token[place].argsort()].to(device)  # (N) which place each token is in
        self.empty = (~real).nonzero()[:, 0].to(device)
        self.counts = [len(row) - 1 for row in rows]  # sequences of each prefix
        of_each = torch.tensor(self.counts)
        seen = torch.arange(T1) < length[is_prefix][:, None]  # (R, T1)
        seen = seen.repeat_interleave(of_each, dim=0).to(device)  # (S, T1)
        own = causal_mask(T2, T2, device).expand(len(seen), -1, -1)
        after = torch.cat([seen[:, None].expand(-1, T2, -1), own], dim=2)  # (S, T2, T1 + T2)
        prefix = causal_mask(T1, T1, device).expand(len(rows), -1, -1)
        self.bias = additive(prefix, model.dtype), additive(after, model.dtype)

    def __call__(self, q, k, v):
        (q1, q2), (k1, k2), (v1, v2) = self.spread(q), self.spread(k), self.spread(v)
        prefixes = self.attention(q1, k1, v1, self.bias[0])
        after = self.attention(q2, self.behind(k1, k2), self.behind(v1, v2), self.bias[1])
        x = torch.cat([prefixes.flatten(0, 1), after.flatten(0, 1)])
        return Take.apply(x, self.place, self.token, self.empty)[None]

    def spread(self, x) -> tuple:
        """(1, N, heads, D) -> prefixes (R, T1, heads, D) and sequences (S, T2, heads, D)."""
        taken = Take.apply(x.flatten(0, 1), self.token, self.place, None)
        pieces = taken.split([n * T for n, T in self.shapes])
        return tuple(piece.unflatten(0, shape) for piece, shape in zip(pieces, self.shapes))

    def behind(self, prefixes, x):
        """(R, T1, ...) and (S, T2, ...) -> (S, T1 + T2, ...), each sequence behind its prefix."""
        repeated = [p.expand(n, *p.shape[1:]) for p, n in zip(prefixes.split(1), self.counts)]
        return torch.cat([torch.cat(repeated), x], dim=1)


SHORT = 512  # tokens of a row that is masked as a whole, though its sequences share a prefix


def attend_to(rows: list[Row], model: Transformer):
    """The `attend` of rows that lie end to end. Taken apart, those of 256 tokens cost more than the
    mask hides, those of 2048 a quarter less (docs/LOG.md)."""
    lengths = [row.lengths for row in rows]
    apart = any(own[0] and sum(own) > SHORT for own in lengths)
    return SharedPrefix(lengths, model) if apart else Packed(lengths, model)
