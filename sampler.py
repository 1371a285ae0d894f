"""The sampler: continue many prompts at once, with a key-value cache, under one adapter or many, greedily or at random.

What makes it fast: tokens that prompts have in common are read once, samples of one prompt share its cache, all rows
advance together, and rows that are finished leave the batch.
"""

from contextlib import nullcontext
from os.path import commonprefix

import torch
from torch.nn.utils.rnn import pad_sequence

from cache import KVCache
from lora import Adapters, attached
from model import Transformer, causal_mask


def choose(logits, temperature: float, top_p: float, u):
    """One token id per row (R) from logits (R, V): the largest if temperature is 0, else a nucleus sample.

    The nucleus is the smallest set of most likely tokens with mass >= top_p; `u` (R) in [0, 1) picks within it by the
    inverse of its cumulative distribution: masses 0.6, 0.3 (top_p 0.9), u = 0.7 -> 0.7 * 0.9 = 0.63, the second token.
    """
    if temperature == 0:
        return logits.max(-1).indices  # several times faster than argmax in bfloat16
    probs = (logits.float() / temperature).softmax(-1)
    likely = probs > 1e-4 * probs.amax(-1, keepdim=True)  # sorting these few costs less than sorting 49,152
    if (torch.where(likely, probs, 0).sum(-1) < top_p).any():
        likely = torch.ones_like(likely)
    each = likely.sum(-1).tolist()
    mass, at = pad_sequence(probs[likely].split(each), batch_first=True).sort(dim=-1, descending=True, stable=True)
    ids = pad_sequence(likely.nonzero()[:, 1].split(each), batch_first=True).gather(-1, at)
    total = mass.cumsum(-1)
    last = (total < top_p).sum(-1, keepdim=True).clamp(max=total.size(-1) - 1)  # where the nucleus ends
    at = torch.searchsorted(total, u[:, None] * total.gather(-1, last), right=True).minimum(last)
    return ids.gather(-1, at)[:, 0]


def grid(owner: list[int], P: int) -> list[list[int]]:
    """Items by owner, as P lists of one length, filled up with repeats: grid([0, 0, 1], 2) -> [[0, 1], [2, 2]].

    Every owner must have an item.
    """
    mine = [[i for i, o in enumerate(owner) if o == p] for p in range(P)]
    assert all(mine), "a candidate without items"
    b = max(map(len, mine))
    return [m + m[:1] * (b - len(m)) for m in mine]


def prefill(model: Transformer, prompts: list[list[int]], slots: int, P: int = 1):
    """Read prompts, equally many for each of P owners, into a new cache; `slots` more tokens are to follow.

    What all prompts of an owner start with is read once, not for each prompt. That part and the rest are each padded on
    the left, so that all rows end at the same slot: prompts [1 2 3], [1 2 4 5] of one owner and [1 6], [1 7] of another
    become the blocks [[1 2], [. 1]] and [[. 3], [4 5], [. 6], [. 7]]. Returns the cache, valid (R, filled slots) bool, and
    the states (R, C) of the last prompt tokens. Exits with one line if a prompt does not fit the model's context.
    """
    device, R, longest = model.device, len(prompts), max(map(len, prompts))
    if longest + slots > model.config.max_seq_len:
        limit = f"the model's context of {model.config.max_seq_len}"
        raise SystemExit(f"error: a prompt of {longest} tokens with room for {slots} more is longer than {limit}")
    each = [prompts[i : i + R // P] for i in range(0, R, R // P)]
    heads = [commonprefix(mine)[: min(map(len, mine)) - 1] for mine in each]
    tails = [p[len(head) :] for head, mine in zip(heads, each) for p in mine]

    def read(parts, before):
        """before (rows, S) bool, valid so far -> valid (rows, S + T), states (rows, T, C)."""
        ids = pad_sequence([torch.tensor(p[::-1], dtype=torch.long) for p in parts], batch_first=True).flip(1).to(device)
        T = ids.size(1)
        pos = torch.arange(T, device=device) - T + torch.tensor([[len(p)] for p in parts], device=device)  # pads: < 0
        valid = torch.cat([before, pos >= 0], dim=1)
        pos = pos.clamp(min=0) + before.sum(1, keepdim=True)
        return valid, model.run_layers(model.embed(ids), pos, causal_mask(valid, T), cache=cache)

    shared, longest = max(map(len, heads)), max(map(len, tails))
    cache = KVCache(model, P if shared else R, shared or longest)
    valid = torch.ones(P, 0, dtype=torch.bool, device=device)
    if shared:
        valid, _ = read(heads, valid)
        cache.fan_out(R // P, longest)
    valid, x = read(tails, valid.repeat_interleave(R // P, dim=0))
    return cache, valid, x[:, -1]


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new: int,
    end_ids,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    copies: int = 1,
    adapters: Adapters | None = None,
    owner: list[int] | None = None,
    on_prefill=None,
    tick=None,
) -> list[list[int]]:
    """Continue each prompt `copies` times; returns len(prompts) * copies lists of new ids, a prompt's copies together.

    A continuation ends with a token of `end_ids` (which is kept) or after `max_new` tokens. Each has a random stream
    of its own, so its text does not depend on what else is in the batch. With `adapters`, prompt i runs under adapter
    owner[i]; without, owners say which prompts begin alike. Rows that are finished leave the batch. `on_prefill(prompt
    of each row, cache, valid, x)` is called once, when the prompts are read; `tick(live rows)` for every token.
    """
    owner = owner or [0] * len(prompts)
    P = len(adapters) if adapters else max(owner) + 1
    cells = grid(owner, P)
    b = len(cells[0]) * copies
    rows = [i * copies + c for mine in cells for i in mine for c in range(copies)]  # batch row -> output
    live = [rows.index(r) == n for n, r in enumerate(rows)]  # fillers are repeats
    u = torch.rand(len(prompts) * copies, max_new, generator=torch.Generator().manual_seed(seed))
    u, out, end_ids = u.to(model.device), [[] for _ in range(len(prompts) * copies)], set(end_ids)

    with attached(model, adapters) if adapters else nullcontext() as lora:
        in_order = [i for mine in cells for i in mine]
        cache, valid, x = prefill(model, [prompts[i] for i in in_order], max_new, P)
        if on_prefill:
            on_prefill(in_order, cache, valid, x)
        copied = [n for n in range(len(in_order)) for _ in range(copies)]
        cache.fan_out(copies, max_new) if copies > 1 else cache.extend(max_new)
        valid, x = valid[copied], x[copied]
        pos = torch.tensor([len(prompts[r // copies]) for r in rows], device=model.device)
        candidates = list(range(P))  # whose rows are still in the batch
        for step in range(max_new):
            token = choose(model.head(x), temperature, top_p, u[rows, step])
            if tick:
                tick(sum(live))
            for n, t in enumerate(token.tolist()):
                if live[n]:
                    out[rows[n]].append(t)
                    live[n] = t not in end_ids
            if not any(live) or step == max_new - 1:
                break
            kept = shrink(live, b)
            if len(kept) <= 0.75 * len(live):  # copying the cache must pay
                keep_c = sorted({n // b for n in kept})
                if lora and len(keep_c) < len(candidates):
                    candidates = [candidates[c] for c in keep_c]
                    lora.bind(candidates)
                b = len(kept) // len(keep_c)
                cache.keep(kept)
                valid, token, pos = valid[kept], token[kept], pos[kept]
                rows, live = [rows[n] for n in kept], [live[n] for n in kept]
            valid = torch.cat([valid, valid.new_ones(len(rows), 1)], dim=1)
            x = model.embed(token[:, None])
            x = model.run_layers(x, pos[:, None], causal_mask(valid, 1), cache=cache)[:, -1]
            pos = pos + 1
    return out


def shrink(live: list[bool], b: int) -> list[int]:
    """Which of the rows, b per candidate, to keep: candidates with none alive go, the others keep equally many each.

    shrink([1, 0, 0,  0, 0, 0,  1, 1, 0], b=3) -> [0, 1, 6, 7]: row 1 is dead but fills the first candidate up to two.
    """
    mine = [sorted(range(c, c + b), key=lambda n: (not live[n], n)) for c in range(0, len(live), b)]
    most = max(sum(live[n] for n in m) for m in mine)
    return [n for m in mine if live[m[0]] for n in sorted(m[:most])]
