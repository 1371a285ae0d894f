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
from rows import Ragged


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


class Batch:
    """Rows that read side by side: their cache, which of its slots are valid for each, and whose adapters they run under."""

    def __init__(self, model: Transformer, owner: list[int], slots: int, lora: attached | None = None):
        """Row r runs under adapter owner[r] of `lora`, if there is one; owners ascend."""
        self.model, self.owner, self.lora = model, owner, lora
        self.cache = KVCache(model, len(owner), slots)
        self.valid = torch.ones(len(owner), 0, dtype=torch.bool, device=model.device)  # (R, filled slots)

    def read(self, parts: list[list[int]]):
        """Row r reads the tokens parts[r]. Returns their states (N, C), row after row.

        They lie end to end, so that no weight is multiplied with padding. In the cache, and for attention, each row has as
        many slots as the longest part: [1 2] and [3] fill the slots [[1 2], [3 .]].
        """
        lengths, device = list(map(len, parts)), self.model.device
        T, even = max(lengths), min(lengths) == max(lengths)
        real = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]  # (R, T)
        pos = self.valid.sum(1, keepdim=True) + torch.arange(T, device=device)  # (R, T)
        ids = torch.tensor([t for part in parts for t in part], device=device)
        ids, pos = (ids.view(-1, T), pos) if even else (ids[None], pos[real][None])
        self.valid = torch.cat([self.valid, real], dim=1)
        if self.lora:
            self.bind(lengths)
        mask, rows = causal_mask(self.valid, T), None if even else Ragged(lengths, device, multiple=1)
        return self.model.run_layers(self.model.embed(ids), pos, mask, cache=self.cache, rows=rows).flatten(0, 1)

    def bind(self, lengths: list[int]) -> None:
        """Each token under its row's adapter; row r has lengths[r] of them."""
        present = sorted(set(self.owner))
        if present != self.lora.bound:
            self.lora.bind(present)
        self.lora.assign([sum(n for n, o in zip(lengths, self.owner) if o == p) for p in present])

    def fan_out(self, counts: list[int], slots: int) -> None:
        """Row r becomes counts[r] rows, which go on in a new block of the cache with the given number of slots."""
        self.owner = [o for o, count in zip(self.owner, counts) for _ in range(count)]
        self.valid = self.valid.repeat_interleave(torch.tensor(counts, device=self.valid.device), dim=0)
        self.cache.fan_out(counts, slots)

    def take_back(self, slots: int) -> None:
        """Forget the last slots."""
        self.valid = self.valid[:, : self.valid.size(1) - slots]
        self.cache.take_back(slots)

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows, in ascending order."""
        self.owner, self.valid = [self.owner[r] for r in rows], self.valid[rows]
        self.cache.keep(rows)


def prefill(model: Transformer, prompts: list[list[int]], owner: list[int], slots: int, lora: attached | None = None):
    """Read prompts, whose owners ascend, into a new Batch; `slots` more tokens are to follow. Returns it, and the states
    (R, C) of the prompts' last tokens.

    What all prompts of an owner begin with is read once: prompts [1 2 3], [1 2 4 5] of one owner and [1 6], [1 7] of another
    are read as the rows [1 2], [1] and then as [3], [4 5], [6], [7]. Exits with one line if a prompt does not fit the
    model's context.
    """
    longest = max(map(len, prompts))
    if longest + slots > model.config.max_seq_len:
        limit = f"the model's context of {model.config.max_seq_len}"
        raise SystemExit(f"error: a prompt of {longest} tokens with room for {slots} more is longer than {limit}")
    each = {o: [p for p, mine in zip(prompts, owner) if mine == o] for o in dict.fromkeys(owner)}
    heads = {o: commonprefix(mine)[: min(map(len, mine)) - 1] for o, mine in each.items()}
    tails = [p[len(heads[o]) :] for p, o in zip(prompts, owner)]
    room = max(map(len, tails))
    if len(prompts) > len(each) and any(heads.values()):
        batch = Batch(model, list(each), max(map(len, heads.values())), lora)
        batch.read(list(heads.values()))
        batch.fan_out([len(mine) for mine in each.values()], room)
    else:
        batch, tails = Batch(model, owner, longest, lora), prompts
    x = batch.read(tails)
    return batch, x[torch.tensor([len(t) for t in tails], device=x.device).cumsum(0) - 1]


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
    of each row, batch, x)` is called once, when the prompts are read; `tick(live rows)` for every token.
    """
    assert owner or not adapters or len(adapters) == 1, "which prompt runs under which adapter?"
    owner, end_ids = owner or [0] * len(prompts), set(end_ids)
    order = sorted(range(len(prompts)), key=lambda i: owner[i])
    rows = [i * copies + c for i in order for c in range(copies)]  # batch row -> output
    u = torch.rand(len(prompts) * copies, max_new, generator=torch.Generator().manual_seed(seed)).to(model.device)
    out, live = [[] for _ in rows], [True] * len(rows)
    with attached(model, adapters) if adapters else nullcontext() as lora:
        batch, x = prefill(model, [prompts[i] for i in order], [owner[i] for i in order], max_new, lora)
        if on_prefill:
            on_prefill(order, batch, x)
        if copies > 1:
            batch.fan_out([copies] * len(order), max_new)
            x = x.repeat_interleave(copies, dim=0)
        else:
            batch.cache.extend(max_new)
        for step in range(max_new):
            tokens = choose(model.head(x), temperature, top_p, u[rows, step]).tolist()
            if tick:
                tick(sum(live))
            for n, t in enumerate(tokens):
                if live[n]:
                    out[rows[n]].append(t)
                    live[n] = t not in end_ids
            if not any(live) or step == max_new - 1:
                break
            kept = [n for n, alive in enumerate(live) if alive]
            if len(kept) <= 0.75 * len(live):  # copying the cache must pay
                batch.keep(kept)
                rows, tokens, live = [rows[n] for n in kept], [tokens[n] for n in kept], [True] * len(kept)
            x = batch.read([[t] for t in tokens])
    return out
