"""lm/packing.py: rows of several sequences, and that each sequence in them is attended to as if it
stood alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_swapped

import lm.kernels
from lm.packing import (
    Example,
    Packed,
    Ragged,
    SharedPrefix,
    alike,
    arrange,
    attend_to,
    make_row,
    pack,
    packed_mask,
    row_tokens,
    shared_prefix,
)
from model import attention, causal


def example(length, seed, skip=0):
    ids = torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids), tuple(t >= skip for t in range(length)))


def on(attention, dtype=torch.float64):
    """What a layout needs of a model."""
    return SimpleNamespace(attention=attention, dtype=dtype, device=torch.device("cpu"))


# -----------------------------------------------------------------------------
# which sequences share a row


def test_sequences_fill_rows_as_documented():
    assert pack([60, 50, 30, 70], 128) == [[0, 1], [3, 2]]
    # Two rows would do for 210 tokens, but none splits so.
    assert pack([60, 50, 30, 70], 100) == [[1, 2], [3], [0]]
    assert pack([30, 300, 60], 128) == [[1], [2, 0]]
    assert len(pack([300] + [60] * 10, 128)) == 6
    assert pack([50, 60], 0) == [[1], [0]] and pack([], 128) == []


TAILS = ((9, 12), (14, 20), (6, 12))  # length after the prefix, first counted token


def test_sequences_that_begin_alike_share_a_row():
    prefix, asked = example(12, 1).ids, []
    for n, skip in TAILS:
        counts = (False,) * skip + (True,) * (12 + n - skip)
        asked.append(Example(prefix + example(n, n).ids, counts))
    texts = [example(14, 5), *asked]
    assert shared_prefix(asked) == 12 and shared_prefix(texts) == 0
    assert shared_prefix(asked[:1]) == 0
    assert arrange(texts, 64) == [([2, 1, 3], 12), ([0], 0)]  # 12 + 29 tokens, and 14
    assert [row_tokens(texts, *row) for row in arrange(texts, 64)] == [41, 14]
    assert arrange(asked, 12) == [([1], 12), ([0], 12), ([2], 12)]  # no room beside the prefix
    assert arrange(texts, 0) == [([2], 0), ([1], 0), ([3], 0), ([0], 0)]  # the paper's way
    assert arrange([example(12, 1), example(12, 1)], 64) == [([0, 1], 0)]  # counted: no prompt
    other = [Example((7, *e.ids), (False, *e.counts)) for e in asked]
    assert shared_prefix(asked + other) == 0  # no common beginning


def test_prompts_of_several_kinds_share_rows_with_their_own_kind():
    """Where that takes fewer tokens; of one kind, or of short beginnings, all share theirs."""
    one, two = tuple(range(20, 60)), tuple(range(100, 160))
    kinds = []
    for n, start in enumerate((one, two, one, two, one)):
        kinds.append(Example.reply([*start, 300 + n], [7, 8]))
    rows = arrange(kinds, 128)
    assert rows == [([1, 3], 60), ([0, 2, 4], 40)]
    assert [row_tokens(kinds, *row) for row in rows] == [66, 49]
    apart = [make_row([kinds[i] for i in row], prefix).ids.tolist() for row, prefix in rows]
    assert apart[0] == [*two, 301, 7, 8, 303, 7, 8]
    assert arrange(kinds[::2], 128) == [([0, 1, 2], 40)]
    short = []  # of 13 tokens 3 are alike, then some 10 of 13: two rows would read the three twice
    for n in range(2):
        short.append(Example.reply([1, 2, 3, *range(50 * n + 10, 50 * n + 18)], [9, 9]))
    assert alike(short, [0, 1]) == [[0], [1]] and arrange(short, 128) == [([0, 1], 3)]
    assert alike(kinds, [4, 1, 0]) == [[0, 4], [1]] and alike(kinds, []) == []


def test_a_prefix_leaves_each_sequence_a_token():
    """All but the last token of [1 2 3] begin [1 2 3 4], too; that one is left to stand alone."""
    never, last = Example((1, 2, 3), (False,) * 3), Example((1, 2, 3, 4), (False,) * 3 + (True,))
    assert shared_prefix([never, last]) == 2
    assert shared_prefix([last, last]) == 3


def test_rows_as_documented():
    row = make_row([Example((5, 6, 7), (True,) * 3), Example((8, 9), (True,) * 2)])
    assert row.at.tolist() == [0, 1, 3] and row.target.tolist() == [[6], [7], [9]]
    assert row.share.tolist() == [[1], [1], [1]]
    assert row.pos.tolist() == [0, 1, 2, 0, 1] and row.lengths == (0, 3, 2)
    asked = Example.reply([5, 6], [7]), Example.reply([5, 6, 8], [9], weight=-1.0)
    row = make_row(asked, prefix=2)
    assert row.ids.tolist() == [5, 6, 7, 8, 9] and row.pos.tolist() == [0, 1, 2, 2, 3]
    assert row.lengths == (2, 1, 2)
    assert row.at.tolist() == [1, 3] and row.target.tolist() == [[7], [9]]
    assert row.weight.tolist() == [1, -1]
    soft = torch.tensor([[9, 4]], dtype=torch.int32), torch.tensor([[0.75, 0.25]]).half()
    taught = replace(asked[1], soft=soft)
    row = make_row([asked[0], taught], prefix=2)
    assert row.target.tolist() == [[7, 0], [9, 4]]
    assert row.share.tolist() == [[1, 0], [0.75, 0.25]]
    nothing = make_row([Example((5, 6), (False, False))])
    assert nothing.target.shape == nothing.share.shape == (0, 1)


# -----------------------------------------------------------------------------
# end to end <-> side by side


def test_ragged_rows_as_documented():
    ragged = Ragged([2, 3], "cpu", multiple=1)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)[..., None]  # (1, N, 1)
    rows = ragged.spread(x)
    assert rows[..., 0].tolist() == [[1, 2, 1], [3, 4, 5]] and torch.equal(ragged.join(rows), x)
    assert Ragged([2, 3], "cpu", multiple=8).shape == (2, 8)
    empty = Ragged([2, 0, 1], "cpu", multiple=1)  # a row may be empty
    assert empty.spread(x[:, :3])[..., 0].tolist() == [[1, 2], [3, 3], [3, 3]]
    assert torch.equal(empty.join(empty.spread(x[:, :3])), x[:, :3])


@pytest.mark.parametrize("lengths", [[2, 3, 1], [2, 0, 4], [3, 3]])
def test_padding_passes_no_gradient_on(lengths):
    """A loss that weighs every place, padding too, reaches the tokens through their own only."""
    x = torch.arange(6.0).view(1, 6, 1).requires_grad_()
    for multiple in (1, 8):
        ragged = Ragged(lengths, "cpu", multiple)
        [grad] = torch.autograd.grad(ragged.join(ragged.spread(x).cumsum(1).square()).sum(), x)
        plain = torch.arange(6.0).requires_grad_()
        sum(part.cumsum(0).square().sum() for part in plain.split(lengths)).backward()
        torch.testing.assert_close(grad.flatten(), plain.grad)


def test_a_shared_prefix_as_documented():
    """a b b c c c: the prefix, and the sequences; each piece's first token fills it up."""
    rows = SharedPrefix([(1, 2, 3)], on(lambda q, k, v, bias: q))
    x = torch.arange(1.0, 7)[None, :, None].requires_grad_()
    prefixes, sequences = rows.spread(x)
    assert prefixes[..., 0].tolist() == [[1] * 24]
    assert sequences[..., 0].tolist() == [[2, 3] + [2] * 6, [4, 5, 6] + [4] * 5]
    assert torch.equal(rows(x, x, x), x)
    seen = (rows.bias[1] == 0).int()  # the prefix, and what came before in the same sequence
    assert seen[:, :, 0].all() and not seen[:, :, 1:24].any()
    assert seen[:, :3, 24:27].tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]] * 2
    doubled = SharedPrefix([(1, 2, 3)], on(lambda q, k, v, bias: q * (1 if len(q) == 1 else 2)))
    [grad] = torch.autograd.grad(doubled(x, x, x).sum(), x)
    assert grad[0, :, 0].tolist() == [1, 2, 2, 2, 2, 2]


def test_padding_of_a_shared_prefix_passes_no_gradient_on():
    x = torch.arange(1.0, 5)[None, :, None].requires_grad_()
    summed = SharedPrefix([(1, 1, 2)], on(lambda q, k, v, bias: q.cumsum(1)))
    [grad] = torch.autograd.grad(summed(x, x, x).square().sum(), x)
    assert grad[0, :, 0].tolist() == [2, 4, 2 * (3 + 7), 2 * 7]


def test_each_sequence_is_put_behind_its_prefix():
    rows = SharedPrefix([(1, 2, 3), (1, 1)], on(None))
    prefixes = torch.tensor([[1.0], [2.0]])[..., None].requires_grad_()
    sequences = torch.arange(10.0, 19).view(3, 3, 1).requires_grad_()
    both = rows.behind(prefixes, sequences)
    assert both[..., 0].tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [2, 16, 17, 18]]
    (both * torch.tensor([1.0, 10.0, 100.0])[:, None, None]).sum().backward()
    assert prefixes.grad[..., 0].tolist() == [[11], [100]]
    assert sequences.grad[:, 0, 0].tolist() == [1, 10, 100]


def test_sizes_of_what_a_softmax_runs_over():
    assert SharedPrefix.sizes([(1, 2, 3)]) == (24, 8)  # 1 + 8 up to 32
    assert SharedPrefix.sizes([(10, 40), (0, 33)]) == (24, 40)  # 10 + 40 up to 64
    assert SharedPrefix.sizes([(24, 8)]) == (24, 8)


# -----------------------------------------------------------------------------
# attention


def test_packed_masks_as_documented():
    def mask(segment):
        return packed_mask(torch.tensor([segment])).int().tolist()

    assert mask([0, 1, 2]) == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    assert mask([1, 1, 2]) == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def with_gradients(attend, q, k, v):
    """What attend() returns, and the gradients of a loss that weighs every number differently."""
    leaves = [m.clone().requires_grad_() for m in (q, k, v)]
    y = attend(*leaves)
    [weight] = draw(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def test_plain_attention_is_torchs():
    """4 query heads on 2 key heads. All of a row, and the last tokens of one that has a cache."""
    q, k, v = draw((2, 9, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6))

    def torchs(q, k, v):
        q, k, v = (m.transpose(1, 2) for m in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    ours, theirs = with_gradients(causal, q, k, v), with_gradients(torchs, q, k, v)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(causal(q[:, 6:], k, v), theirs[0][:, 6:])


LAYOUTS = [
    (Packed, [(0, 9)]),
    (Packed, [(0, 5), (0, 12, 3), (4, 2, 7)]),
    (Packed, [(0, 8), (3, 5)]),  # nothing is padded
    (SharedPrefix, [(1, 2, 3)]),
    (SharedPrefix, [(3, 2, 7), (0, 5), (11, 9)]),
    (SharedPrefix, [(24, 8, 8)]),  # nothing is padded
]


@pytest.mark.parametrize("attention", [attention, lm.kernels.attention], ids=["plain", "kernel"])
@pytest.mark.parametrize("layout, rows", LAYOUTS)
def test_a_sequence_in_a_row_is_attended_to_as_alone(layout, rows, attention):
    """Forward and backward: each sequence gets what plain causal attention makes of its prefix and
    itself, and the prefix gets the gradients of all that go on from it."""
    total = sum(map(sum, rows))

    def alone(q, k, v):
        parts, at = [], 0
        for prefix, *lengths in rows:
            first = list(range(at, at + prefix))
            at += prefix
            if prefix:
                parts.append(causal(*(m[:, first] for m in (q, k, v))))
            for n in lengths:
                index = [*first, *range(at, at + n)]
                parts.append(causal(*(m[:, index] for m in (q, k, v)))[:, prefix:])
                at += n
        return torch.cat(parts, dim=1)

    qkv = draw((1, total, 4, 6), (1, total, 2, 6), (1, total, 2, 6))
    together = with_gradients(layout(rows, on(attention)), *qkv)
    torch.testing.assert_close(together, with_gradients(alone, *qkv))


def test_sequences_are_attended_to_apart_if_some_share_a_prefix(tiny, monkeypatch):
    """In rows that are long enough for it: one of 250 tokens is masked as a whole."""
    prompt = example(10, 1).ids
    notes = []
    for n in range(6):
        notes.append(Example(prompt + example(40, n).ids, (False,) * 10 + (True,) * 40))
    row, passage = make_row(notes, 10), make_row([example(200, 7)])
    assert isinstance(attend_to([row], tiny), Packed)
    monkeypatch.setattr("lm.packing.SHORT", 250)
    assert isinstance(attend_to([row], tiny), Packed)
    monkeypatch.setattr("lm.packing.SHORT", 249)
    apart = attend_to([row], tiny)
    assert isinstance(apart, SharedPrefix)
    assert apart.bias[1].shape == (6, 40, 64)  # the prefix is padded to 24
    assert isinstance(attend_to([row, passage], tiny), SharedPrefix)
    assert isinstance(attend_to([passage, row], tiny), SharedPrefix)
    assert isinstance(attend_to([passage], tiny), Packed)
    assert isinstance(attend_to([make_row(notes), passage], tiny), Packed)  # nothing shared


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(tiny):
    ids = torch.arange(100, 120)[None]
    pos = torch.tensor([[*range(8), *range(12)]])
    x = tiny.run_layers(tiny.embed(ids), pos, Packed([(0, 8, 12)], tiny))
    apart = torch.cat([tiny(ids[:, :8]), tiny(ids[:, 8:])], dim=1)
    torch.testing.assert_close(tiny.head(x), apart, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_end_to_end_give_the_logits_of_each_row_alone(family_folder):
    model = load_swapped(family_folder)
    rows = [torch.arange(n) * 7 % 211 for n in (5, 12, 9)]
    ids, pos = torch.cat(rows)[None], torch.cat([torch.arange(len(r)) for r in rows])[None]
    attend = Packed([(0, len(r)) for r in rows], model)
    together = model.head(model.run_layers(model.embed(ids), pos, attend))[0]
    alone = torch.cat([model(r[None])[0] for r in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sequences_see_their_prefix_as_if_alone(tiny):
    """Two rows: sequences of 2 and 7 tokens after a prefix of 3, and one of 5 without a prefix."""
    ids = torch.arange(300, 317)[None]
    prefix, *sequences, other = ids[0].split([3, 2, 7, 5])
    pos = torch.tensor([[0, 1, 2, 3, 4, *range(3, 10), *range(5)]])
    x = tiny.run_layers(tiny.embed(ids), pos, SharedPrefix([(3, 2, 7), (0, 5)], tiny))
    together = tiny.head(x)[0].split([3, 2, 7, 5])
    for sequence, logits in zip(sequences, together[1:3]):
        alone = tiny(torch.cat([prefix, sequence])[None])[0, 3:]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[0], tiny(prefix[None])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[3], tiny(other[None])[0], atol=1e-5, rtol=1e-4)
