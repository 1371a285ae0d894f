"""The inner update's step, and the sampler's, in fixed shapes, so that each compiles to one graph:
for --compile.

    grid_of()           what a step takes of P candidates: rows padded to T tokens and L targets
    population_loss()   forward, and the loss of each candidate
    adamw()             clipping, AdamW, and who takes a step, all on the population axis
    next_states()       a token more in each of R rows
    FixedRows           the rows, with a cache of S places each
    Step                all of these, compiled; its update() trains a population

T, L and S are one of few sizes, and P is a power of two: what is there in excess is computed and
never counted. The steps in inner.py and sampler.py, which pad little or nothing, are faster where
nothing is compiled; tests/test_grid.py holds these to them. Letters as in model.py.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from lm.packing import Row, n_tokens
from model import additive, attention, causal_mask

# -----------------------------------------------------------------------------
# the grid


@dataclass
class Grid:
    """What one step of P candidates takes."""

    token: torch.Tensor  # (P, T) which token of all rows, end to end
    pos: torch.Tensor  # (P, T)
    segment: torch.Tensor  # (P, T) which sequence it belongs to; -1: none
    prefix: torch.Tensor  # (P, T) which sequence begins its row, and is seen by all of it
    at: torch.Tensor  # (P, L) index of the token that predicts
    target: torch.Tensor  # (P, L, K), as in lm/packing.Row
    share: torch.Tensor  # (P, L, K)
    weight: torch.Tensor  # (P, L) in the candidate's mean; 0 where nothing is to be predicted

    def on(self, device) -> tuple:
        return tuple(getattr(self, f.name).to(device) for f in fields(self))


def size_of(n: int, unit: int) -> int:
    """The smallest unit times a power of two that n fits in: so there are few sizes."""
    size = unit
    while size < n:
        size *= 2
    return size


def n_targets(rows: list[Row]) -> int:
    return sum(len(row.at) for row in rows)


def grid_of(taken: list[list[Row]], P: int, unit: int) -> Grid:
    """The rows that each of at most P candidates takes in a step, [] if it takes none."""
    T = size_of(max(map(n_tokens, taken)), unit)
    L = size_of(max(map(n_targets, taken)), unit // 2)
    K = max(row.target.size(1) for own in taken for row in own)
    ids, numbers = torch.zeros(P, T, dtype=torch.long), torch.zeros(P, L, K)
    grid = Grid(
        token=ids.clone(),
        pos=ids.clone(),
        segment=ids - 1,
        prefix=ids - 2,
        at=torch.zeros(P, L, dtype=torch.long),
        target=numbers.long(),
        share=numbers,
        weight=torch.zeros(P, L),
    )
    first = 0  # of this candidate's tokens, among those of all
    for p, own in enumerate(taken):
        t = n = sequences = 0  # tokens, targets and sequences of its rows before
        for row in own:
            lengths = torch.tensor(row.lengths)
            which = torch.arange(len(lengths)).repeat_interleave(lengths)
            here, to = slice(t, t + len(row.ids)), slice(n, n + len(row.at))
            grid.token[p, here] = torch.arange(first + here.start, first + here.stop)
            grid.pos[p, here], grid.at[p, to] = row.pos, row.at + t
            grid.segment[p, here], grid.prefix[p, here] = which + sequences, sequences
            grid.target[p, to, : row.target.size(1)] = row.target
            grid.share[p, to, : row.target.size(1)] = row.share
            grid.weight[p, to] = row.weight
            t, n, sequences = here.stop, to.stop, sequences + len(lengths)
        first += t
        grid.weight[p] /= max(1, n)
    return grid


# -----------------------------------------------------------------------------
# the loss


class HeadLoss(torch.autograd.Function):
    """Cross-entropy (N) of states (N, C), after the last norm, to targets and their shares (N, K).
    The gradient is made on the way, `chunk` states at a time, so that no (N, V) logits are kept."""

    @staticmethod
    def forward(ctx, h, weight, target, share, chunk: int):
        grads, losses = [], []
        for x, t, s in zip(h.split(chunk), target.split(chunk), share.split(chunk)):
            logp = (x @ weight.T).float().log_softmax(-1)  # (chunk, V)
            losses.append(-(s * logp.gather(1, t).clamp(min=math.log(1e-38))).sum(1))
            p = logp.exp().scatter_add(1, t, -s)
            grads.append(p.to(h.dtype) @ weight)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad):
        (own,) = ctx.saved_tensors
        return own * grad[:, None].to(own.dtype), None, None, None, None


def population_loss(lora, flat, x, pos, segment, prefix, at, target, share, weight):
    """The loss of each candidate (P), a mean over its own counted tokens, under the adapters flat
    (P, N) of lora (lora.attached). x (P, T, C) are the states of the grid's tokens."""
    model, T = lora.model, x.size(1)
    for path, module in lora.modules.items():
        a, b = lora.adapters.views(flat, path)
        module.a, module.b = a.to(model.dtype), b.to(model.dtype)
    seen = segment[:, None, :]
    mask = (seen == segment[:, :, None]) | (seen == prefix[:, :, None])
    bias = additive(mask & causal_mask(T, T, x.device), model.dtype)
    start = lora.adapters.config.start
    x = model.run_layers(x, pos, lambda q, k, v: attention(q, k, v, bias), start=start)
    x = model.norm(x.gather(1, at[..., None].expand(-1, -1, x.size(2))))  # (P, L, C)
    h, target, share = (m.flatten(0, 1) for m in (x, target, share))
    nll = HeadLoss.apply(h, model.lm_head.weight, target, share, 256)
    for module in lora.modules.values():
        module.a = module.b = None
    return (nll.view_as(weight) * weight).sum(1)


# -----------------------------------------------------------------------------
# the optimiser


def adamw(flat, grad, m, v, count, lr, clip, active, alive, loss):
    """One step of AdamW (arXiv 1711.05101, without decay) for each candidate that is `active` and
    `alive`, in place. flat, grad, m, v (P, N); count, of its steps so far, and the others (P). One
    whose loss or gradient is not finite stays as it is, and is alive no more. Returns who took a
    step (P)."""
    norm = grad.norm(dim=1)
    sound = loss.isfinite() & norm.isfinite()
    steps = active & alive & sound
    alive &= sound | ~active
    count += steps
    grad = grad * (clip / (norm + 1e-6)).clamp(max=1)[:, None]
    own, t = steps[:, None], count.clamp(min=1)[:, None]
    m.copy_(torch.where(own, torch.lerp(m, grad, 0.1), m))
    v.copy_(torch.where(own, torch.lerp(v, grad * grad, 0.001), v))
    size = (v / (1 - 0.999**t)).sqrt() + 1e-8
    flat.copy_(torch.where(own, flat - lr[:, None] * (m / (1 - 0.9**t)) / size, flat))
    return steps


# -----------------------------------------------------------------------------
# decoding


def next_states(model, lora, flat, cache, token, pos, at, seen):
    """States (R, C) of one more token (R) in each row, at position pos (R), under the adapters flat
    (P, N), if there are any, of R/P rows each. cache, of each layer (2, R, S, K, D), gets its keys
    and values at place `at` (1); seen (R, S) says which places the token looks at."""
    for path, module in lora.modules.items() if lora else ():
        module.a, module.b = lora.adapters.views(flat, path)
    bias = additive(seen[:, None], model.dtype)  # (R, 1, S)

    def attend(layer: int):
        def look(q, k, v):
            cache[layer].index_copy_(2, at, torch.stack((k, v)))
            return attention(q, *cache[layer], bias)

        return look

    x = model.embed(token[:, None])
    x = model.run_layers(x, pos[:, None], [attend(i) for i in range(len(cache))])
    for module in lora.modules.values() if lora else ():
        module.a = module.b = None
    return x[:, 0]


class FixedRows:
    """The rows of a sampler.Batch, once their prompts are read, in fixed shapes: P adapters with
    R/P rows each, as many as the one with most, and S places. They read a token at a time; methods
    as there. Each row has a copy of its prompt's keys and values: memory for speed. The batch is
    used up."""

    def __init__(self, batch, compiled):
        self.model, self.lora, self.compiled = batch.model, batch.lora, compiled
        self.length, valid = batch.valid.size(1), batch.valid
        self.owner = batch.owner if batch.lora else [0] * len(batch.owner)
        counts = torch.tensor(batch.counts, dtype=torch.long, device=valid.device)
        self.cache = []
        for i in range(len(batch.own)):
            own = batch.own[i][:, :, :, : batch.length]  # (2, rows, K, places, D)
            batch.own[i] = None  # only one layer is there twice
            if batch.prefix is not None:
                own = torch.cat((batch.prefix[i].repeat_interleave(counts, dim=1), own), dim=3)
                batch.prefix[i] = None
            self.cache.append(own.transpose(2, 3))
        self.pos, self.seen = valid.sum(1), valid
        self.slot = list(range(len(self.owner)))  # which of the R is each row
        self.lay(self.length + 1)

    def shape(self) -> tuple[int, int]:
        """P and R/P, the fewest that have room for all rows; R is at least 8."""
        present = set(self.owner)
        P = size_of(len(present), 1)
        return P, size_of(max(map(self.owner.count, present)), max(1, 8 // P))

    def lay(self, places: int) -> None:
        """Give each row a slot, in the smallest shapes that have room for all, and for so many
        places."""
        present, (P, each), S = sorted(set(self.owner)), self.shape(), -(-places // 256) * 256
        source, given = [self.slot[0]] * (P * each), []
        for p, o in enumerate(present):
            own = [n for n, other in enumerate(self.owner) if other == o]
            for i, n in enumerate(own):
                source[p * each + i] = self.slot[n]
                given.append((n, p * each + i))
        self.slot = [slot for _, slot in sorted(given)]
        index, more = torch.tensor(source, device=self.model.device), S - self.cache[0].size(2)
        for i, own in enumerate(self.cache):
            self.cache[i] = F.pad(own[:, index], (0, 0, 0, 0, 0, more))
        self.pos, self.seen = self.pos[index], self.seen[index]
        self.seen = F.pad(self.seen, (0, S - self.seen.size(1)))
        if self.lora:
            flat = self.lora.adapters.flat[present].to(self.model.dtype)
            self.flat = F.pad(flat, (0, 0, 0, P - len(present)))
            self.lora.share_out(None)

    @property
    def full(self) -> bool:
        return self.length == self.cache[0].size(2)

    def extend(self, tokens: int) -> None:
        if self.length + tokens > self.cache[0].size(2):
            self.lay(self.length + tokens)

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows; the shapes stay, until half of the slots would do."""
        self.owner, self.slot = [self.owner[r] for r in rows], [self.slot[r] for r in rows]
        if 2 * math.prod(self.shape()) <= len(self.pos):
            self.lay(self.length)

    def read(self, parts: list[list[int]]):
        token = torch.zeros(len(self.pos), dtype=torch.long)
        token[self.slot] = torch.tensor(parts)[:, 0]
        at = torch.tensor([self.length], device=self.model.device)
        self.seen[:, self.length] = True
        torch.compiler.cudagraph_mark_step_begin()
        flat = self.flat if self.lora else None
        how = (token.to(self.model.device), self.pos, at, self.seen)
        x = self.compiled(self.model, self.lora, flat, self.cache, *how)
        self.pos, self.length = self.pos + 1, self.length + 1
        return x[self.slot]


# -----------------------------------------------------------------------------
# the step


class Step:
    """population_loss(), adamw() and next_states(), compiled by a backend of torch.compile.

    That of CUDA graphs copies what it is given into each replay: of a cache, or weights, that it
    does not know to stay where they are, all of it. What that costs has not been measured.
    """

    def __init__(self, backend):
        torch._dynamo.config.recompile_limit = 256  # a graph for each shape that a run has
        self.loss = torch.compile(population_loss, backend=backend, fullgraph=True, dynamic=False)
        self.adamw = torch.compile(adamw, backend=backend, fullgraph=True, dynamic=False)
        self.next = torch.compile(next_states, backend=backend, fullgraph=True, dynamic=False)

    def rows(self, batch) -> FixedRows:
        """The rows of a sampler.Batch, as they go on."""
        return FixedRows(batch, self.next)

    def update(self, lora, rows, plans, configs, lower, tick=None) -> list[tuple]:
        """Train each candidate's adapter on its rows, as inner.inner_update() says; plans[p][k] are
        those of its step k, and lower(rows) gives them what the frozen layers make of them. Returns
        for each candidate its losses, the tokens that it was trained on, and whether it
        diverged."""
        adapters, device, n = lora.adapters, lora.model.device, len(configs)
        P, unit = size_of(n, 1), size_of(max(c.row_len for c in configs), 32)
        flat = adapters.flat.new_zeros(P, adapters.size)
        flat[:n] = adapters.flat
        m, v, count = torch.zeros_like(flat), torch.zeros_like(flat), flat.new_zeros(P)
        clip = flat.new_tensor([*(c.clip for c in configs), *[1.0] * (P - n)])
        alive, found = torch.ones(P, dtype=torch.bool, device=device), []
        for k in range(max(map(len, plans), default=0)):
            taken, lr = [], torch.zeros(P)
            for p, (own, config, plan) in enumerate(zip(rows, configs, plans)):
                going = k < len(plan)
                taken.append(lower([own[i] for i in plan[k]]) if going else [])
                lr[p] = config.lr_at(k, len(plan)) if going else 0.0
            active = torch.zeros(P, dtype=torch.bool)
            active[:n] = torch.tensor([bool(own) for own in taken])
            token, *grid = grid_of(taken, P, unit).on(device)
            x = torch.cat([row.x for own in taken for row in own])[token]  # (P, T, C)
            torch.compiler.cudagraph_mark_step_begin()
            loss = self.loss(lora, flat.requires_grad_(), x, *grid)
            [grad] = torch.autograd.grad(loss.sum(), flat)
            # A CUDA graph's next call may write where its last one's results are.
            flat, loss, grad = flat.detach(), loss.detach().clone(), grad.clone()
            how = (count, lr.to(device), clip, active.to(device), alive, loss)
            steps = self.adamw(flat, grad, m, v, *how).clone()
            found.append((loss, steps, list(map(n_tokens, taken))))
            if tick:
                tick(sum(found[-1][2]), float(loss[active].mean()))
        adapters.flat.copy_(flat[:n])
        return [outcome_of(p, found, lives) for p, lives in enumerate(alive[:n].tolist())]


def outcome_of(p: int, found: list[tuple], lives: bool) -> tuple:
    counted = [k for k, (_, steps, _) in enumerate(found) if steps[p]]
    losses = [float(found[k][0][p]) for k in counted]
    return losses, sum(found[k][2][p] for k in counted), not lives
