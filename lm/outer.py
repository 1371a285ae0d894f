"""--outer grpo and pairs: an outer update that learns from what earned less, too.

    grpo    each sample counts by its advantage, how far its credit is from the mean of all samples
            of its prompt; it may only go so far from the policy that wrote it, and from the base
            model (GRPO, arXiv 2402.03300; the loss is a mean over tokens)
    pairs   the best sample of a prompt against the worst: the first is to become GAP more likely
            than the second, by the mean over tokens (IPO, arXiv 2310.12036)

The gradient of either is a sum over tokens: a weight times the gradient of the token's
log-probability, and the weight is made of log-probabilities that are at hand. So the step is the
inner update's, with other weights; the loss that is reported is their weighted mean, which says
little. All probabilities are the model's own, at a temperature of 1, though samples are drawn at
--temperature and within --top-p. Letters as in model.py.
"""

import math
from dataclasses import replace
from functools import partial

import torch

from inner import (
    Outcome,
    SFTConfig,
    as_given,
    laid_out,
    plan_steps,
    refuse_long,
    train_end_to_end,
    train_step,
    with_lower_states,
)
from lm.files import chunks
from lm.log import Progress
from lm.packing import Example, Row, make_row, shared_prefix
from lm.ranks import gathered, shared
from lora import Adapters, attached
from model import Transformer

CLIP = 0.2  # by how much a probability may change, as a share, before it counts no more
KL = 0.04  # weight of the divergence from the base model, as in the paper of GRPO
GAP = 0.5  # nats; 1 / (2 tau) of the paper of IPO

# -----------------------------------------------------------------------------
# weights: of each token's cross-entropy, nll (L), in what a step minimises


def ratio(difference):
    """Of two probabilities, whose logarithms differ by so much; at most e^3 = 20, or a single token
    that was held for impossible would be all that counts in a step."""
    return difference.clamp(max=3).exp()


def grpo(rows: list[Row], nll):
    """-min(r A, clip(r) A) + KL (s - log s - 1), where r is the token's probability over that of
    the policy that wrote it, s that of the base model over its own, and A its advantage."""
    advantage = as_given(rows, nll)
    old, base = torch.cat([row.before for row in rows]).unbind(1)
    r = ratio(-nll - old)
    inside = torch.where(advantage > 0, r < 1 + CLIP, r > 1 - CLIP)
    return advantage * r * inside - KL * (1 - ratio(base + nll))


def pairs(rows: list[Row], nll):
    """(gap - GAP)^2 of each row, one prompt and its best and worst sample, which have weight 1 and
    -1: how much likelier the best one has become than the worst one, since the update began. Of
    several rows in a step each counts by its tokens."""
    weights = []
    for row, own in zip(rows, nll.split([len(row.at) for row in rows])):
        sign = row.weight.to(nll.device)
        share = torch.where(sign > 0, 1 / (sign > 0).sum(), -1 / (sign < 0).sum())
        gap = (share * (-own - row.before[:, 0])).sum()
        weights.append(2 * (GAP - gap) * share * len(own))
    return torch.cat(weights)


RULES = {"grpo": grpo, "pairs": pairs}

# -----------------------------------------------------------------------------
# the update


@torch.no_grad()
def log_probs(model: Transformer, rows: list[Row]) -> list:
    """Of each row, the log-probabilities (L) of its targets under the model as it is. A row at a
    time, and some tokens of it: all states, or logits, would take gigabytes."""
    found, device = [], model.device
    for row in rows:
        [ready] = with_lower_states(model, [row], model.config.n_layer)
        own = []
        for at, target in zip(row.at.to(device).split(256), row.target.to(device).split(256)):
            logp = model.head(ready.x[at]).float().log_softmax(-1)  # (256, V)
            own.append(logp.gather(1, target[:, :1])[:, 0])
        found.append(torch.cat(own))
    return found


def by_gradient(
    model: Transformer,
    policy: Adapters,
    examples: list[Example],
    rule: str,
    config: SFTConfig,
    seed: int,
    label: str,
) -> Outcome:
    """Train the policy in place, one adapter, by a rule of RULES. An example is a prompt and what
    was sampled after it. Its weight is its advantage; with "pairs" 1 and -1, for the best and the
    worst of a prompt, which follow each other, and make a row. It diverged if its weights are not
    finite, or if what it was to make likelier, and expected better than a guess among all tokens,
    it now expects no better. Exits with one line if an example is longer than the model's context.
    It is not compiled (--compile)."""
    refuse_long(model, examples)
    if rule == "pairs":
        rows = [make_row(pair, shared_prefix(pair)) for pair in chunks(examples, 2)]
    else:
        rows = laid_out(examples, config.row_len)
    base = log_probs(model, rows)
    with attached(model, policy) as lora:  # and not merged: the arithmetic of the steps
        before = [torch.stack(both, dim=1) for both in zip(log_probs(model, rows), base)]
        rows = [replace(row, before=both) for row, both in zip(rows, before)]
        plan = plan_steps(len(rows), config, seed)
        progress = Progress(label, len(plan))
        tick = lambda tokens, loss: progress.step(loss=loss)  # noqa: E731
        step = shared(partial(train_step, weigh=RULES[rule]))
        [outcome] = train_end_to_end(lora, [rows], [plan], [config], tick, step)
        lora.bind([0])  # as it is now
        liked, after = torch.cat([row.weight for row in rows]) > 0, log_probs(model, rows)
    first = float(torch.cat(before)[:, 0].cpu()[liked].mean())
    last = float(torch.cat(after).cpu()[liked].mean())
    first, last = gathered([first, last])[:2]  # rounded alike for all processes
    guess = -0.99 * math.log(model.config.vocab_size)
    outcome.diverged |= first > guess >= last or not math.isfinite(last)
    return outcome
