"""The inner update: train a population of adapters, each on its own examples, side by side.

Three things make it fast, and none changes what a candidate learns:
    packing        short sequences share a row (block-diagonal mask, positions start anew), so little is padded
    lower layers   when only the top layers adapt, what the frozen ones make of each sequence is computed once
    labels only    the large output projection runs only where a token is predicted, a chunk at a time

The optimiser is torch's AdamW with one parameter group per candidate: own learning rate, own step count, and a candidate
that has finished or diverged simply has no gradient. Top to bottom: examples, rows, frozen layers, the update.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lora import Adapters, attached
from model import Transformer, packed_mask

# -----------------------------------------------------------------------------
# examples and rows


@dataclass(frozen=True)
class Example:
    """One training sequence: token ids, and for each token whether the loss counts it (the first is never predicted)."""

    ids: tuple
    counts: tuple  # bool per token
    weight: float = 1.0  # outer update only: 1 for a rewarded self-edit; may be negative


def pack(lengths: list[int], row_len: int) -> list[list[int]]:
    """Put sequences of the given lengths into rows of at most `row_len` tokens, first fit in order. Indices per row.

    pack([60, 50, 30, 70], 100) -> [[0, 2], [1], [3]]. A longer sequence gets a row of its own; row_len 0: all do.
    """
    rows, room = [], []
    for i, n in enumerate(lengths):
        fit = next((r for r, free in enumerate(room) if n <= free), None)
        if fit is None:
            rows.append([i])
            room.append(row_len - n)
        else:
            rows[fit].append(i)
            room[fit] -= n
    return rows


@dataclass(frozen=True)
class Row:
    """Packed sequences as tensors: T tokens, L of which are predicted from the token before them."""

    x: torch.Tensor  # (T, C) what the frozen lower layers make of the tokens
    pos: torch.Tensor  # (T) position within its own sequence
    segment: torch.Tensor  # (T) number of the sequence
    at: torch.Tensor  # (L) index of the token that predicts
    target: torch.Tensor  # (L) id that it should predict
    weight: torch.Tensor  # (L)


def make_row(examples: list[Example], states: list[torch.Tensor]) -> Row:
    """Lay examples end to end. ids [5 6 7] all counted, then [8 9]: at = [0 1 3], target = [6 7 9]."""
    at, target, weight, start = [], [], [], 0
    for e in examples:
        predicted = [t for t in range(1, len(e.ids)) if e.counts[t]]
        at += [start + t - 1 for t in predicted]
        target += [e.ids[t] for t in predicted]
        weight += [e.weight] * len(predicted)
        start += len(e.ids)
    device = states[0].device
    return Row(
        x=torch.cat(states),
        pos=torch.cat([torch.arange(len(e.ids)) for e in examples]).to(device),
        segment=torch.cat([torch.full((len(e.ids),), i) for i, e in enumerate(examples)]).to(device),
        at=torch.tensor(at, dtype=torch.long, device=device),
        target=torch.tensor(target, dtype=torch.long, device=device),
        weight=torch.tensor(weight, device=device),
    )


# -----------------------------------------------------------------------------
# the frozen lower layers, once


@torch.no_grad()
def lower_states(model: Transformer, examples: list[Example], stop: int, tokens: int = 2048) -> dict:
    """{ids: (T, C)} after layers 0 .. stop-1, each distinct sequence computed once. `tokens` bounds one batch.

    Exits with one line if a sequence is longer than the model's context.
    """
    distinct = sorted({e.ids for e in examples}, key=lambda ids: (len(ids), ids))
    if distinct and len(distinct[-1]) > model.config.max_seq_len:
        limit = f"the model's context of {model.config.max_seq_len}"
        raise SystemExit(f"error: a training sequence of {len(distinct[-1])} tokens is longer than {limit}")
    states, batch = {}, []
    for ids in distinct:
        if batch and (len(batch) + 1) * len(ids) > tokens:
            states |= _lower_batch(model, batch, stop)
            batch = []
        batch.append(ids)
    return states | (_lower_batch(model, batch, stop) if batch else {})


def _lower_batch(model: Transformer, batch: list[tuple], stop: int) -> dict:
    ids = pad_sequence([torch.tensor(i) for i in batch], batch_first=True).to(model.device)  # (R, T), padded right
    x = model.embed(ids)
    if stop:
        R, T = ids.shape
        pos = torch.arange(T, device=ids.device).expand(R, T)
        x = model.run_layers(x, pos, packed_mask(torch.zeros_like(ids)), stop=stop)
    return {i: row[: len(i)] for i, row in zip(batch, x)}


# -----------------------------------------------------------------------------
# the inner update


@dataclass(frozen=True)
class Study:
    """How one candidate is trained. One step takes `batch` rows; an epoch takes every row once."""

    lr: float = 2e-3  # peak AdamW learning rate
    epochs: int = 8
    steps: int = 0  # if above 0, take exactly this many steps, whatever the number of rows, instead of `epochs`
    clip: float = 1.0  # largest gradient norm, per candidate
    schedule: str = "linear"  # or "cosine", "constant": decay from lr to 0
    row_len: int = 128  # tokens per packed row; 0 puts each sequence in its own row (the paper's way)
    batch: int = 1  # rows per step

    def lr_at(self, step: int, total: int) -> float:
        left = 1 - step / total
        decay = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}
        return self.lr * decay[self.schedule]


@dataclass
class Outcome:
    """What happened to one candidate in the inner update."""

    steps: int = 0
    tokens: int = 0  # tokens trained on, all epochs together
    loss: float | None = None  # mean loss of the last step that counted
    diverged: bool = False


def plan_steps(n_rows: int, study: Study, seed: int) -> list[list[int]]:
    """Which rows each step takes: every epoch all rows once, in a new seeded order."""
    if not n_rows:
        return []
    rng = np.random.default_rng(seed)
    per_epoch = math.ceil(n_rows / study.batch)
    total = study.steps or study.epochs * per_epoch
    steps = []
    while len(steps) < total:
        order = rng.permutation(n_rows).tolist()
        steps += [order[i : i + study.batch] for i in range(0, n_rows, study.batch)]
    return steps[:total]


def backward_through_head(model: Transformer, x, target, weight, chunk: int = 256):
    """Back-propagate sum(weight * cross-entropy) and return the cross-entropies (L).

    x (L, C) are the states that predict target (L). The (L, V) logits never exist at once: the gradient with respect
    to x is gathered chunk by chunk, and x is back-propagated through once at the end.
    """
    leaf = x.detach().requires_grad_()
    losses = []
    for part in torch.arange(len(x), device=x.device).split(chunk):
        nll = F.cross_entropy(model.head(leaf[part]).float(), target[part], reduction="none")
        (nll * weight[part]).sum().backward()
        losses.append(nll.detach())
    x.backward(leaf.grad)
    return torch.cat(losses)


def train_step(model: Transformer, adapters: Adapters, bind, rows: list[list[Row]]):
    """One forward and backward of p candidates: adapters.flat is (p, N), rows[i] those of candidate i.

    Returns losses (p), each a mean over the candidate's own counted tokens, and gradients (p, N) in float32.
    """
    b = max(len(r) for r in rows)
    flat = [row for mine in rows for row in mine + mine[:1] * (b - len(mine))]  # fill up with rows that do not count
    real = [i < len(mine) for mine in rows for i in range(b)]
    T = max(len(r.pos) for r in flat)
    T = -(-T // 8) * 8  # few distinct shapes: memory is reused
    x = pad_sequence([F.pad(r.x, (0, 0, 0, T - len(r.pos))) for r in flat], batch_first=True)  # (p*b, T, C)
    pos = torch.stack([F.pad(r.pos, (0, T - len(r.pos))) for r in flat])
    segment = torch.stack([F.pad(r.segment, (0, T - len(r.pos)), value=-1) for r in flat])
    used = [i for i, ok in enumerate(real) if ok]
    at = torch.cat([flat[i].at + i * T for i in used])
    target = torch.cat([flat[i].target for i in used])
    owner = torch.cat([torch.full_like(flat[i].at, i // b) for i in used])  # (L) candidate of each predicted token
    count = torch.bincount(owner, minlength=len(rows)).clamp(min=1)
    weight = torch.cat([flat[i].weight for i in used]) / count[owner]

    values = adapters.flat.to(model.dtype)
    grads = torch.zeros_like(values)
    bind(values, grads)
    hidden = model.run_layers(x, pos, packed_mask(segment), start=adapters.config.start)
    nll = backward_through_head(model, hidden.view(-1, hidden.size(-1))[at], target, weight)
    losses = torch.zeros(len(rows), device=nll.device).index_add_(0, owner, nll * weight)
    return losses, grads.float()


def inner_update(model, adapters: Adapters, examples: list[list[Example]], studies: list[Study], seed: int, tick=None):
    """Train adapters.flat[i] on examples[i] as studies[i] says, all together; returns an Outcome per candidate.

    SEAL's inner loop, theta_i = SFT(theta, SE_i). The base weights stay as they are. A candidate whose loss or gradient
    is not finite stops there, flagged `diverged`, and the others do not notice. `tick(tokens, mean loss)` is called
    after every step.
    """
    batch = {s.batch for s in studies}
    assert len(adapters) == len(examples) == len(studies) and len(batch) == 1
    start = adapters.config.start
    states = lower_states(model, [e for mine in examples for e in mine], start)
    rows = []
    for mine, study in zip(examples, studies):
        packed = pack([len(e.ids) for e in mine], study.row_len)
        rows.append([make_row([mine[i] for i in r], [states[mine[i].ids] for i in r]) for r in packed])
    plans = [plan_steps(len(mine), study, seed) for mine, study in zip(rows, studies)]
    outcomes = [Outcome() for _ in studies]
    # Gradients are written into slices of one (P, N) block, a layout torch would not choose; it says so once.
    warnings.filterwarnings("ignore", message="grad and param do not obey")
    params = [nn.Parameter(row) for row in adapters.flat]  # views: the optimiser writes into adapters.flat
    groups = [{"params": [p], "lr": s.lr} for p, s in zip(params, studies)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    with attached(model, adapters) as bind:
        for step in range(max(map(len, plans))):
            active = [i for i, plan in enumerate(plans) if step < len(plan) and not outcomes[i].diverged]
            if not active:
                break
            taken = [[rows[i][r] for r in plans[i][step]] for i in active]
            losses, grads = train_step(model, adapters.pick(active), bind, taken)
            norms = grads.norm(dim=1)
            clips = torch.tensor([studies[i].clip for i in active], device=norms.device)
            grads *= (clips / (norms + 1e-6)).clamp(max=1)[:, None]
            for i, grad, norm, loss in zip(active, grads, norms.tolist(), losses.tolist()):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    outcomes[i].diverged = True
                    continue
                params[i].grad = grad
                optimizer.param_groups[i]["lr"] = studies[i].lr_at(step, len(plans[i]))
                outcomes[i].steps, outcomes[i].loss = step + 1, loss
                outcomes[i].tokens += sum(len(r.pos) for r in taken[active.index(i)])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if tick:
                tick(sum(len(r.pos) for mine in taken for r in mine), float(losses.mean()))
    for outcome, finite in zip(outcomes, adapters.flat.isfinite().all(dim=1).tolist()):
        outcome.diverged |= not finite  # the last step is not followed by a loss that would tell
    return outcomes
