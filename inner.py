"""The inner update: train a population of adapters, each on its own examples, side by side.

Four things make it fast, and none changes what a candidate learns:
    packing        short sequences share a row (block-diagonal mask, positions start anew), so little is padded
    one prompt     sequences that begin with the same prompt read it once, and are attended to apart where that is less work
    lower layers   when only the top layers adapt, what the frozen ones make of each row is computed once
    labels only    the large output projection runs only where a token is predicted, a chunk at a time

The optimiser is torch's AdamW with one parameter group per candidate: own learning rate, own step count, and a candidate
that has finished or diverged simply has no gradient. Top to bottom: examples, rows, frozen layers, the update.
"""

import itertools
import math
import os.path
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn

from lora import Adapters, attached
from model import Transformer, packed_mask
from rows import Forks, Ragged

# -----------------------------------------------------------------------------
# examples and rows


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and for each token whether the loss counts it (the first is never predicted)."""

    ids: tuple
    counts: tuple  # bool per token
    weight: float = 1.0  # outer update only: 1 for a rewarded self-edit; may be negative


def pack(lengths: list[int], row_len: int) -> list[list[int]]:
    """Put sequences of the given lengths into rows of at most `row_len` tokens, as evenly filled as possible. Indices per
    row, fullest row first.

    pack([60, 50, 30, 70], 128) -> [[0, 1], [3, 2]], 110 and 100 tokens. A sequence longer than that has a row of its own;
    row_len 0 puts each sequence in a row of its own.
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


@dataclass(frozen=True)
class Row:
    """Packed sequences as tensors: T tokens, L of which are predicted from the token before them."""

    ids: torch.Tensor  # (T)
    pos: torch.Tensor  # (T) position within its own sequence
    lengths: tuple  # tokens of the prefix that all sequences of the row begin with, and of each sequence after it
    at: torch.Tensor  # (L) index of the token that predicts
    target: torch.Tensor  # (L) id that it should predict
    weight: torch.Tensor  # (L)
    x: torch.Tensor | None = None  # (T, C) what the frozen lower layers make of the tokens

    @property
    def key(self) -> tuple:
        """Rows with the same key have the same states."""
        return tuple(self.ids.tolist()), self.lengths


def make_row(examples: list[Example], prefix: int = 0) -> Row:
    """Lay examples end to end. ids [5 6 7] all counted, then [8 9]: at = [0 1 3], target = [6 7 9].

    The first `prefix` tokens, the same in all examples and never counted, are laid down once and looked at by all. Ids
    [5 6 7] and [5 6 8 9] with prefix 2 are laid as 5 6 7 8 9, at positions 0 1 2 2 3; lengths are then (2, 1, 2).
    """
    ids, pos, lengths = list(examples[0].ids[:prefix]), list(range(prefix)), [prefix]
    at, target, weight = [], [], []
    for e in examples:
        place = [*range(prefix), *range(len(ids), len(ids) + len(e.ids) - prefix)]  # index in the row of each token
        predicted = [t for t in range(1, len(e.ids)) if e.counts[t]]
        at += [place[t - 1] for t in predicted]
        target += [e.ids[t] for t in predicted]
        weight += [e.weight] * len(predicted)
        ids += e.ids[prefix:]
        pos += range(prefix, len(e.ids))
        lengths.append(len(e.ids) - prefix)
    ids, pos, at, target = (torch.tensor(v, dtype=torch.long) for v in (ids, pos, at, target))
    return Row(ids, pos, tuple(lengths), at, target, torch.tensor(weight, dtype=torch.float32))


def arrange(examples: list[Example], row_len: int) -> list[tuple[list[int], int]]:
    """Which examples share a row, and how many first tokens they share in it; the row with the most tokens first.

    Those that begin with a prompt, which the loss does not count, share rows among themselves, and the prompt's common
    beginning is read once for all: notes that are questions share half of their tokens.
    """
    rows = []
    for prompted in (False, True):
        mine = [i for i, e in enumerate(examples) if (not e.counts[0]) is prompted]
        prefix = shared_prefix([examples[i] for i in mine]) if row_len else 0
        packed = pack([len(examples[i].ids) - prefix for i in mine], max(0, row_len - prefix))
        rows += [([mine[i] for i in row], prefix) for row in packed]
    return sorted(rows, key=lambda row: -row_tokens(examples, *row))


def row_tokens(examples: list[Example], row: list[int], prefix: int) -> int:
    """How many tokens a row of arrange() has."""
    return prefix + sum(len(examples[i].ids) - prefix for i in row)


def shared_prefix(examples: list[Example]) -> int:
    """How many first tokens all examples share, none of them counted or an example's last. 0 for fewer than two examples.

    Chats that ask "Who cast it?" and "Who rang it?" share all up to "Who".
    """
    if len(examples) < 2:
        return 0
    given = [next((t for t, c in enumerate(e.counts) if c), len(e.ids) - 1) for e in examples]
    return min(len(os.path.commonprefix([e.ids for e in examples])), *given)


def end_to_end(rows, *names: str) -> list[torch.Tensor]:
    """The named tensors of all rows one after the other, each (1, N, ...)."""
    return [torch.cat([getattr(row, name) for row in rows])[None] for name in names]


def layout(rows: list[Row]) -> tuple:
    """How attention sees the rows' tokens, and its mask: each row as one, or its sequences apart, whichever is less work.

    A row of 250 tokens that is six notes asks for 62,500 scores, most of them masked out; its notes, of 40 tokens after a
    prefix of 10 (padded to 24), for 6 x 40 x 64 and 24 x 24. Apart, all of the batch are padded to the longest: a passage
    would not pay.
    """
    lengths, device = [row.lengths for row in rows], rows[0].ids.device
    T1, T2 = Forks.sizes(lengths)
    apart = len(rows) * T1**2 + sum(len(mine) - 1 for mine in lengths) * T2 * (T1 + T2)
    if any(head for head, *_ in lengths) and apart < len(rows) * max(map(sum, lengths)) ** 2:
        forks = Forks(lengths, device)
        return forks, forks.masks
    ragged = Ragged(list(map(sum, lengths)), device)
    segment = torch.tensor([i for mine in lengths for i, n in enumerate(mine) for _ in range(n)], device=device)
    return ragged, packed_mask(ragged.spread(segment[None]))  # padding ends a row, so no token looks at it


# -----------------------------------------------------------------------------
# the frozen lower layers, once


@torch.no_grad()
def with_lower_states(model: Transformer, rows: list[Row], stop: int, tokens: int = 2048) -> list[Row]:
    """The rows, on the model's device, with x after layers 0 .. stop-1. Equal rows are computed once; `tokens` bounds one
    batch. Exits with one line if a sequence is longer than the model's context.
    """
    longest = max((int(row.pos.max()) + 1 for row in rows), default=0)
    if longest > model.config.max_seq_len:
        limit = f"the model's context of {model.config.max_seq_len}"
        raise SystemExit(f"error: a training sequence of {longest} tokens is longer than {limit}")
    keys = [row.key for row in rows]
    moved = [{k: m.to(model.device) for k, m in vars(row).items() if torch.is_tensor(m)} for row in rows]
    rows = [replace(row, **tensors) for row, tensors in zip(rows, moved)]
    states, batch = {}, {}
    for key, row in sorted(dict(zip(keys, rows)).items(), key=lambda item: len(item[1].ids)):
        if batch and (len(batch) + 1) * len(row.ids) > tokens:
            states |= _lower_batch(model, batch, stop)
            batch = {}
        batch[key] = row
    states |= _lower_batch(model, batch, stop) if batch else {}
    return [replace(row, x=states[key]) for key, row in zip(keys, rows)]


def _lower_batch(model: Transformer, batch: dict, stop: int) -> dict:
    rows = list(batch.values())
    ids, pos = end_to_end(rows, "ids", "pos")
    x = model.embed(ids)
    if stop:
        shape, mask = layout(rows)
        x = model.run_layers(x, pos, mask, stop=stop, rows=shape)
    return dict(zip(batch, x[0].split([len(row.ids) for row in rows])))


# -----------------------------------------------------------------------------
# the inner update


@dataclass(frozen=True)
class Study:
    """How one candidate is trained. One step takes `batch` rows; an epoch takes every row once."""

    lr: float = 4e-3  # peak AdamW learning rate
    epochs: int = 8
    steps: int = 0  # if above 0, take exactly this many steps, whatever the number of rows, instead of `epochs`
    clip: float = 1.0  # largest gradient norm, per candidate
    schedule: str = "linear"  # or "cosine", "constant": decay from lr to 0
    row_len: int = 256  # tokens per packed row; 0 puts each sequence in its own row (the paper's way)
    batch: int = 1  # rows per step

    def lr_at(self, step: int, total: int) -> float:
        left = 1 - step / total
        decay = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}
        return self.lr * decay[self.schedule]


@dataclass
class Outcome:
    """What happened to one candidate in the inner update."""

    losses: list = field(default_factory=list)  # mean loss of each step that counted
    tokens: int = 0  # tokens trained on, all epochs together
    diverged: bool = False

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float | None:
        return self.losses[-1] if self.losses else None


def plan_steps(n_rows: int, study: Study, seed: int, slots: int = 0) -> list[list[int]]:
    """Which rows each step takes: every epoch all rows once, in a new seeded order.

    Rows are numbered from the longest to the shortest, and the order of two of them does not depend on how many there
    are. So a population whose largest candidate has `slots` rows can take rows of like length together: with batch 1, a
    candidate that has no row of the slot's number pauses for a step ([]), which costs nothing and changes nothing for it.
    """
    steps, epoch, left = [], 0, 0 if not n_rows else study.steps or study.epochs * math.ceil(n_rows / study.batch)
    while left > 0:
        order = np.random.default_rng([seed, epoch]).random(max(n_rows, slots)).argsort().tolist()
        mine = [i for i in order if i < n_rows]
        if study.batch == 1:
            taken = [[i] if i < n_rows else [] for i in order]
        else:
            taken = [mine[i : i + study.batch] for i in range(0, n_rows, study.batch)]
        for step in taken:
            if left or not step:
                steps.append(step)
                left -= bool(step)
        epoch += 1
    return steps


def backward_through_head(model: Transformer, x, target, weight, chunk: int = 256):
    """Back-propagate sum(weight * cross-entropy) and return the cross-entropies (L).

    x (L, C) are the states that predict target (L). The (L, V) logits never exist at once, nor in float32: chunk by chunk
    they become probabilities p, then the gradient weight * (p - onehot(target)), which goes back to x through the frozen
    output projection.
    """
    leaf = x.detach().requires_grad_()
    normed = model.norm(leaf)
    grad, nll = torch.empty_like(normed), torch.empty(len(x), device=x.device)
    with torch.no_grad():
        for h, t, g, loss in zip(*(m.split(chunk) for m in (normed.detach(), target, grad, nll))):
            p = model.lm_head(h)
            torch.softmax(p, -1, out=p)  # in float32 inside
            hit = (torch.arange(len(t), device=x.device), t)
            loss.copy_(-p[hit].float().clamp(min=1e-38).log())  # at most 87.5, not infinite: it has not diverged
            p[hit] = 0
            p[hit] = -p.sum(-1)  # p - 1, without the rounding of a p close to 1
            g.copy_(model.lm_head.backward_input(p))
        grad *= weight[:, None].to(x.dtype)
    normed.backward(grad)
    x.backward(leaf.grad)
    return nll


def train_step(model: Transformer, lora: attached, active: list[int], taken: list[list[Row]]):
    """One forward and backward of p candidates: those in rows `active` of the adapters, each on its own `taken` rows.

    All tokens lie end to end, candidate after candidate. Returns losses (p), each a mean over the candidate's own
    counted tokens, and gradients (p, N) in float32.
    """
    rows, device = [row for mine in taken for row in mine], model.device
    shape, mask = layout(rows)
    x, pos = end_to_end(rows, "x", "pos")
    first = np.cumsum([0, *(len(row.ids) for row in rows)]).tolist()  # where each row starts
    at = torch.cat([row.at + start for row, start in zip(rows, first)])
    target = torch.cat([row.target for row in rows])
    counted = torch.tensor([sum(len(row.at) for row in mine) for mine in taken], device=device)
    owner = torch.arange(len(taken), device=device).repeat_interleave(counted)  # (L) candidate of each predicted token
    weight = torch.cat([row.weight for row in rows]) / counted[owner]

    lora.bind(active, train=True)
    lora.assign([sum(len(row.ids) for row in mine) for mine in taken])
    hidden = model.run_layers(x, pos, mask, start=lora.adapters.config.start, rows=shape)
    nll = backward_through_head(model, hidden[0, at], target, weight)
    losses = torch.zeros(len(taken), device=device).index_add_(0, owner, nll * weight)
    return losses, lora.gradients()


def lay_rows(model: Transformer, examples: list[list[Example]], studies: list[Study], start: int) -> list[list[Row]]:
    """The rows of each candidate, longest first, with what the layers below `start` make of them."""
    rows = [
        [make_row([mine[i] for i in row], prefix) for row, prefix in arrange(mine, study.row_len)]
        for mine, study in zip(examples, studies)
    ]
    ready = iter(with_lower_states(model, [row for mine in rows for row in mine], start))
    return [[next(ready) for _ in mine] for mine in rows]


def inner_update(model, adapters: Adapters, examples: list[list[Example]], studies: list[Study], seed: int, tick=None):
    """Train adapters.flat[i] on examples[i] as studies[i] says, all together; returns an Outcome per candidate.

    SEAL's inner loop, theta_i = SFT(theta, SE_i). The base weights stay as they are. A candidate whose loss or gradient
    is not finite stops there, flagged `diverged`, and the others do not notice. `tick(tokens, mean loss)` is called
    after every step.
    """
    batch = {s.batch for s in studies}
    assert len(adapters) == len(examples) == len(studies) and len(batch) == 1
    rows = lay_rows(model, examples, studies, adapters.config.start)
    slots = max(map(len, rows))
    plans = [plan_steps(len(mine), study, seed, slots) for mine, study in zip(rows, studies)]
    totals = [sum(map(bool, plan)) for plan in plans]
    outcomes = [Outcome() for _ in studies]
    params = [nn.Parameter(row) for row in adapters.flat]  # views: the optimiser writes into adapters.flat
    groups = [{"params": [p], "lr": s.lr} for p, s in zip(params, studies)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    with attached(model, adapters) as lora:
        for step in itertools.zip_longest(*plans, fillvalue=[]):
            active = [i for i, mine in enumerate(step) if mine and not outcomes[i].diverged]
            if not active:
                continue
            taken = [[rows[i][r] for r in step[i]] for i in active]
            losses, grads = train_step(model, lora, active, taken)
            norms = grads.norm(dim=1)
            clips = torch.tensor([studies[i].clip for i in active], device=norms.device)
            grads *= (clips / (norms + 1e-6)).clamp(max=1)[:, None]
            for i, mine, grad, norm, loss in zip(active, taken, grads, norms.tolist(), losses.tolist()):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    outcomes[i].diverged = True
                    continue
                params[i].grad = grad
                optimizer.param_groups[i]["lr"] = studies[i].lr_at(len(outcomes[i].losses), totals[i])
                outcomes[i].losses.append(loss)
                outcomes[i].tokens += sum(len(row.ids) for row in mine)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if tick:
                tick(sum(len(row.ids) for mine in taken for row in mine), float(losses.mean()))
    for outcome, finite in zip(outcomes, adapters.flat.norm(dim=1).isfinite().tolist()):
        outcome.diverged |= not finite  # the last step is not followed by a loss that would tell
    return outcomes
