"""The inner update: train a population of adapters, each on its own examples, side by side.

    theta_i = SFT(theta_0, SE_i)    for all candidates i of a population (arXiv 2506.10943, 3.1)

Four things make it fast. The first decides what a step takes, a row; the others change nothing:
    packing        short sequences share a row (lm/packing.py), so little is padded
    one prompt     sequences that begin with the same prompt read it once
    lower layers   when only the top layers adapt, the frozen ones run once for each row
    labels only    the large output projection runs only where a token is predicted, in chunks

The optimiser is torch's AdamW with one parameter group per candidate: own learning rate, own step
count, and a candidate that has finished or diverged simply has no gradient. (One that diverged is
scored as if it had answered nothing: reward.quiz_candidates().) Top to bottom: settings, frozen
layers, the loss, the update.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn as nn

from lm.flags import at_least
from lm.log import Progress
from lm.packing import (
    Example,
    Row,
    arrange,
    attend_to,
    make_row,
    n_tokens,
    ragged_or_even,
    side_by_side,
)
from lm.ranks import shared
from lora import PROJECTIONS, Adapters, LoRAConfig, attached, merged
from model import Transformer

# -----------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class SFTConfig:
    """How one candidate is trained. One step takes `batch` rows; an epoch takes every row once."""

    lr: float = 4e-3  # peak AdamW learning rate
    epochs: int = 8
    steps: int = 0  # if above 0: exactly so many, whatever the number of rows, instead of `epochs`
    clip: float = 1.0  # largest gradient norm, per candidate
    schedule: str = "linear"  # or "cosine", "constant": decay from lr to 0
    row_len: int = 256  # tokens per packed row; 0: each sequence has its own (the paper's way)
    batch: int = 1  # rows per step

    def lr_at(self, step: int, total: int) -> float:
        left = 1 - step / total
        decay = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}
        return self.lr * decay[self.schedule]

    def total_steps(self, n_rows: int) -> int:
        return (self.steps or self.epochs * math.ceil(n_rows / self.batch)) if n_rows else 0


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

    def record(self) -> dict:
        taken = {"steps": self.steps, "tokens": self.tokens}
        return taken | {"loss": self.loss, "diverged": self.diverged}


def add_lora_flags(parser, population: bool = True) -> None:
    add = parser.add_argument_group("inner update: LoRA").add_argument
    add("--rank", type=at_least(1), default=16, help="LoRA rank; the paper: 32")
    add("--alpha", type=at_least(0.0), default=32.0, help="LoRA alpha; the paper: 64")
    options = {"choices": PROJECTIONS, "help": "the paper: q_proj v_proj"}
    add("--targets", nargs="+", default=list(PROJECTIONS), **options)
    about = "adapt the last K layers; 0 or the paper: all"
    add("--top-layers", type=at_least(0), default=10, help=about)
    if population:
        about = "candidates that train side by side; the paper: 1"
        add("--population", type=at_least(1), default=8, help=about)


def add_sft_flags(parser) -> None:
    add = parser.add_argument_group("inner update: AdamW").add_argument
    about = "peak learning rate, decays linearly; the paper: 1e-3"
    add("--lr", type=at_least(0.0), default=SFTConfig.lr, help=about)
    about = "optimiser steps; 0 or the paper: as many as --epochs make"
    add("--steps", type=at_least(0), default=16, help=about)
    about = "passes over the rows with --steps 0; the paper: 10"
    add("--epochs", type=at_least(1), default=SFTConfig.epochs, help=about)
    about = "tokens per packed row; 0 or the paper: a row per sequence"
    add("--row-len", type=at_least(0), default=SFTConfig.row_len, help=about)


def lora_config(args, model: Transformer) -> LoRAConfig:
    """The inner update's LoRA. Exits if --top-layers is more than the model has."""
    n = model.config.n_layer
    if args.top_layers > n:
        raise SystemExit(f"error: --top-layers {args.top_layers}: the model has {n} layers")
    start = n - args.top_layers if args.top_layers else 0
    return LoRAConfig(args.rank, args.alpha, tuple(args.targets), start, n)


def sft_config(args) -> SFTConfig:
    return SFTConfig(lr=args.lr, epochs=args.epochs, steps=args.steps, row_len=args.row_len)


def add_learner_flag(parser) -> None:
    about = "whose weights are updated with what a policy wrote; the paper: policy"
    parser.add_argument("--learner", default="base", choices=["base", "policy"], help=about)
    about = "another Hugging Face folder, to study what --model writes, and to be quizzed"
    parser.add_argument("--student", default="", metavar="FOLDER", help=about)


def learner(model: Transformer, policy: Adapters | None, args):
    """Within, the model has the weights that learn and answer: its own, or with --learner policy
    those of the policy."""
    return merged(model, policy if args.learner == "policy" else None)


# -----------------------------------------------------------------------------
# the frozen lower layers, once


@torch.no_grad()
def with_lower_states(model: Transformer, rows: list[Row], stop: int, tokens: int = 2048) -> list:
    """The rows with x after layers 0 .. stop-1, on the model's device, unless they have it. Equal
    rows are computed once; `tokens` bounds one batch.
    """
    if all(row.x is not None for row in rows):
        return rows
    keys, states, batch = [row.key for row in rows], {}, {}
    for key, row in sorted(dict(zip(keys, rows)).items(), key=lambda item: len(item[1].ids)):
        if batch and (len(batch) + 1) * len(row.ids) > tokens:
            states |= lower_batch(model, batch, stop)
            batch = {}
        batch[key] = row
    states |= lower_batch(model, batch, stop) if batch else {}
    return [replace(row, x=states[key]) for key, row in zip(keys, rows)]


def lower_batch(model: Transformer, batch: dict, stop: int) -> dict:
    rows = list(batch.values())
    x = model.embed(torch.cat([row.ids for row in rows])[None].to(model.device))  # (1, N, C)
    if stop:
        pos = torch.cat([row.pos for row in rows])[None].to(model.device)
        x = model.run_layers(x, pos, attend_to(rows, model), stop=stop)
    return dict(zip(batch, x[0].split([len(row.ids) for row in rows])))


def laid_out(examples: list[Example], row_len: int) -> list[Row]:
    """The examples as rows, longest first."""
    rows = []
    for members, prefix in arrange(examples, row_len):
        rows.append(make_row([examples[i] for i in members], prefix))
    return rows


def refuse_long(model, examples: list[Example]) -> None:
    longest = max((len(e.ids) for e in examples), default=0)
    if longest > model.config.max_seq_len:
        limit = f"the model's context of {model.config.max_seq_len}"
        raise SystemExit(f"error: a training sequence of {longest} tokens is longer than {limit}")


KEPT_STATES = 1 << 16  # tokens; memory must not grow with the length of a text


def lay_rows(model, examples: list[list], configs: list[SFTConfig], start: int) -> list[list[Row]]:
    """Each candidate's rows, with what the layers below `start` make of them; without, if they are
    more than KEPT_STATES tokens: then every step computes it for its own rows. Exits with one line
    if a sequence is longer than the model's context."""
    rows = [laid_out(own, config.row_len) for own, config in zip(examples, configs)]
    refuse_long(model, [e for own in examples for e in own])
    lengths = {row.key: len(row.ids) for own in rows for row in own}
    if sum(lengths.values()) > KEPT_STATES:
        return rows
    ready = with_lower_states(model, [row for own in rows for row in own], start)
    ends = np.cumsum([len(own) for own in rows]).tolist()
    return [ready[end - len(own) : end] for own, end in zip(rows, ends)]


def plan_steps(n_rows: int, config: SFTConfig, seed: int) -> list[list[int]]:
    """Which rows each step takes: every epoch all rows once, in a new seeded order, `batch` at a
    time."""
    steps, total = [], config.total_steps(n_rows)
    for epoch in itertools.count():
        if len(steps) >= total:
            return steps[:total]
        order = np.random.default_rng([seed, epoch]).random(n_rows).argsort().tolist()
        steps += [order[i : i + config.batch] for i in range(0, n_rows, config.batch)]


# -----------------------------------------------------------------------------
# the loss


def backward_through_head(model: Transformer, x, target, share, weigh, chunk: int = 256):
    """Back-propagate sum(weight * cross-entropy), where weigh(cross-entropies) gives the weights
    (L), and return what is summed (L).

    x (L, C) are the states that predict target (L, K), each with its share (L, K) of the
    probability: without a teacher K is 1, and the share, too. The (L, V) logits never exist at
    once, nor in float32: chunk by chunk they become probabilities p, then the gradient weight * (p
    - q), where q has the shares at the targets, which goes back to x through the frozen output
    projection.
    """
    leaf = x.detach().requires_grad_()
    normed = model.norm(leaf)
    grad, nll = torch.empty_like(normed), torch.empty(len(x), device=x.device)
    parts = (m.split(chunk) for m in (normed.detach(), target, share, grad, nll))
    for h, t, s, g, loss in zip(*parts):
        logits = model.lm_head(h.requires_grad_())
        p = logits.detach()
        torch.softmax(p, -1, out=p)  # in place, in float32 inside
        # At most 87.5 and not infinite: a token held for impossible is no divergence.
        loss.copy_(-(s * p.gather(1, t).float().clamp(min=1e-38).log()).sum(1))
        at = torch.arange(len(t), device=t.device)[:, None]  # scatter is slow in bfloat16
        p.index_put_((at, t[:, 1:]), -s[:, 1:].to(p.dtype), accumulate=True)
        p[at, t[:, :1]] = 0  # p - q sums to 0: so the first is known without rounding a p
        p[at, t[:, :1]] = -p.sum(1, keepdim=True)  # that is close to 1
        logits.backward(p)
        g.copy_(h.grad)
    weight = weigh(nll)
    grad *= weight[:, None].to(x.dtype)
    normed.backward(grad)
    x.backward(leaf.grad)
    return weight * nll


# -----------------------------------------------------------------------------
# the update


def as_given(rows: list[Row], nll):
    """The weights (L) of the rows' targets, whatever their cross-entropies."""
    return torch.cat([row.weight for row in rows]).to(nll.device)


def train_step(model: Transformer, lora: attached, active: list, taken: list, weigh=as_given):
    """One forward and backward of p candidates: those in rows `active` of the adapters, each on its
    own `taken` rows.

    All tokens lie end to end, candidate after candidate. Returns losses (p), each a mean over the
    candidate's own counted tokens, and gradients (p, N) in float32. weigh(rows, cross-entropies)
    gives the weights, if they are not the rows' own (lm/outer.py).
    """
    rows, device = [row for own in taken for row in own], model.device
    start = lora.adapters.config.start
    # In one batch, so that the processes of a copy run the lower layers equally often (--shard).
    rows = with_lower_states(model, rows, start, tokens=1 << 30)
    x = torch.cat([row.x for row in rows])[None]
    pos = torch.cat([row.pos for row in rows])[None].to(device)
    first = np.cumsum([0, *(len(row.ids) for row in rows)]).tolist()  # where each row starts
    at = torch.cat([row.at + n for row, n in zip(rows, first)])
    target = side_by_side([row.target for row in rows]).to(device)
    share = side_by_side([row.share for row in rows]).to(device)
    per_row = torch.arange(len(taken)).repeat_interleave(torch.tensor(list(map(len, taken))))
    predicted = torch.tensor([len(row.at) for row in rows])
    owner = per_row.repeat_interleave(predicted).to(device)  # (L) candidate of each target
    counted = owner.bincount(minlength=len(taken))  # (p)

    def mean(nll):
        """The sum of the candidates' own means: no candidate's gradient depends on who trains
        beside it."""
        return weigh(rows, nll) / counted[owner]

    lora.bind(active, train=True)
    lora.share_out(ragged_or_even(list(map(n_tokens, taken)), device))
    hidden = model.run_layers(x, pos, attend_to(rows, model), start=start)
    terms = backward_through_head(model, hidden[0, at.to(device)], target, share, mean)
    losses = torch.zeros(len(taken), device=device).index_add_(0, owner, terms)
    return losses, lora.gradients()


dealt_step = shared(train_step, by_all=False)  # to those that hold a copy of the model (--shard)


def inner_update(
    model, adapters: Adapters, examples, configs, seed: int, tick=None, one_step=dealt_step
) -> list[Outcome]:
    """Train adapters.flat[i] on examples[i] ([Example]) as configs[i], an SFTConfig, says.

    The base weights stay as they are. A candidate whose loss or gradient is not finite stops there,
    flagged `diverged`, and the others do not notice. So is one that began better than a guess among
    all tokens, a loss of ln V, and did not end so: its weights are finite, and ruined.
    `tick(tokens, mean loss)` is called after every step.
    """
    assert len(adapters) == len(examples) == len(configs)
    rows = lay_rows(model, examples, configs, adapters.config.start)
    plans = [plan_steps(len(own), config, seed) for own, config in zip(rows, configs)]
    with attached(model, adapters) as lora:
        if model.step:  # --compile
            lower = partial(with_lower_states, model, stop=adapters.config.start)
            found = model.step.update(lora, rows, plans, configs, lower, tick)
            outcomes = [Outcome(*own) for own in found]
        else:
            outcomes = train_end_to_end(lora, rows, plans, configs, tick, one_step)
    guess = 0.99 * math.log(model.config.vocab_size)
    for outcome, finite in zip(outcomes, adapters.flat.norm(dim=1).isfinite().tolist()):
        ruined = outcome.steps > 0 and outcome.losses[0] < guess <= outcome.loss
        # The last step is not followed by a loss that would tell.
        outcome.diverged |= ruined or not finite
    return outcomes


def train_end_to_end(lora, rows, plans, configs, tick, one_step):
    """The inner update's steps, all tokens end to end, so that nothing is padded."""
    model, adapters, outcomes = lora.model, lora.adapters, [Outcome() for _ in configs]
    params = [nn.Parameter(row) for row in adapters.flat]  # views: AdamW writes into `flat`
    groups = [{"params": [p], "lr": c.lr} for p, c in zip(params, configs)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    for step in itertools.zip_longest(*plans):
        active = [i for i, own in enumerate(step) if own and not outcomes[i].diverged]
        if not active:
            continue
        taken = [list(map(rows[i].__getitem__, step[i])) for i in active]
        losses, grads = one_step(model, lora, active, taken)
        norms = grads.norm(dim=1)
        clips = torch.tensor([configs[i].clip for i in active], device=norms.device)
        grads *= (clips / (norms + 1e-6)).clamp(max=1)[:, None]
        results = zip(active, taken, grads, norms.tolist(), losses.tolist())
        for i, own, grad, norm, loss in results:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                outcomes[i].diverged = True  # without a gradient AdamW leaves it alone
                continue
            params[i].grad = grad
            optimizer.param_groups[i]["lr"] = configs[i].lr_at(outcomes[i].steps, len(plans[i]))
            outcomes[i].losses.append(loss)
            outcomes[i].tokens += n_tokens(own)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tick:
            tick(sum(map(n_tokens, taken)), float(losses.mean()))
    return outcomes


def update_one(
    model, adapter: Adapters, examples: list[Example], config: SFTConfig, seed: int, label: str
) -> Outcome:
    """An inner update of one adapter, in place, with a progress line in steps; its rows are shared
    out to all processes, unless --compile makes the step."""
    progress = Progress(label, config.total_steps(len(laid_out(examples, config.row_len))))
    tick = lambda tokens, loss: progress.step(loss=loss)  # noqa: E731
    [outcome] = inner_update(model, adapter, [examples], [config], seed, tick, shared(train_step))
    return outcome
