"""The sampler: continue many prompts at once, with a key-value cache, under one adapter or many,
greedily or at random.

What makes it fast: tokens that prompts have in common are read once, a prompt is read once for all
its samples, all rows advance together, and rows that are finished leave the batch. (The plain way
is model.CachedLayer; seal.py uses it.)

Letters in shape comments as in model.py. Top to bottom: choosing a token, the batch with its cache,
prefill, generate.
"""

from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from os.path import commonprefix

import torch
from torch.nn.utils.rnn import pad_sequence

from lm.files import sub_seed
from lm.packing import Ragged, ragged_or_even
from lm.ranks import as_first
from lora import Adapters, attached
from model import Transformer, additive, causal_mask

# -----------------------------------------------------------------------------
# choosing a token


def choose(logits, temperature: float, top_p: float, u):
    """One token id per row (R) from logits (R, V): the largest if temperature is 0, else a nucleus
    sample.

    The nucleus is the smallest set of most likely tokens with mass >= top_p; `u` (R) in [0, 1)
    picks within it by the inverse of its cumulative distribution: masses 0.6, 0.3 (top_p 0.9), u =
    0.7 -> 0.7 * 0.9 = 0.63, the second token.
    """
    if temperature == 0:
        return logits.max(-1).indices  # several times faster than argmax in bfloat16
    probs = (logits.float() / temperature).softmax(-1)
    # Sorting these few costs less than sorting 49,152.
    likely = probs > 1e-4 * probs.amax(-1, keepdim=True)
    likely |= torch.where(likely, probs, 0).sum(-1, keepdim=True) < top_p
    each = likely.sum(-1).tolist()
    mass, at = pad_sequence(probs[likely].split(each), batch_first=True).sort(
        dim=-1, descending=True, stable=True
    )
    ids = pad_sequence(likely.nonzero()[:, 1].split(each), batch_first=True).gather(-1, at)
    total = mass.cumsum(-1)
    # Where the nucleus ends.
    last = (total < top_p).sum(-1, keepdim=True).clamp(max=total.size(-1) - 1)
    at = torch.searchsorted(total, u[:, None] * total.gather(-1, last), right=True).minimum(last)
    return ids.gather(-1, at)[:, 0]


# -----------------------------------------------------------------------------
# rows that are read side by side


class Batch:
    """R rows that read and remember side by side, each under its owner's adapter.

    Keys and values lie in two parts. `prefix`: what rows begin with in common; its row b serves
    counts[b] rows in turn, so it is neither stored nor multiplied once for each. `own`: what each
    row read after that. All rows are equally long there: one that has read less than others masks
    out the places that it left empty.
    """

    def __init__(
        self, model: Transformer, owner: list[int], room: int, lora: attached | None = None
    ):
        """Row r runs under adapter owner[r] of `lora`, if there is one; owners ascend. `room`:
        tokens to be read."""
        self.model, self.owner, self.lora, self.tokens = model, owner, lora, None
        # (R, places) was a token read?
        self.valid = torch.ones(len(owner), 0, dtype=torch.bool, device=model.device)
        self.prefix, self.counts, self.share = None, [], None
        self.own, self.length = self._empty(len(owner), room), 0

    def _empty(self, rows: int, room: int) -> list:
        """Of each layer (2, R, K, room, D), keys and values."""
        c, like = self.model.config, {"dtype": self.model.dtype, "device": self.model.device}
        shape = (2, rows, c.n_kv_head, room, c.head_dim)
        return [torch.empty(shape, **like) for _ in range(c.n_layer)]

    def _each_layer(self, change) -> None:
        """own <- change(own), a layer at a time, so that only one layer is there twice."""
        for i in range(len(self.own)):
            self.own[i] = change(self.own[i])

    def read(self, parts: list[list[int]]):
        """Row r reads the tokens parts[r]. Returns their states (N, C), row after row.

        They lie end to end, so that no weight is multiplied with padding. In the cache, and for
        attention, each row has as many places as the longest part: [1 2] and [3] fill [[1 2], [3
        .]].
        """
        lengths, device = list(map(len, parts)), self.model.device
        T, even = max(lengths), min(lengths) == max(lengths)
        # (R, T)
        real = torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]
        pos = self.valid.sum(1, keepdim=True) + torch.arange(T, device=device)  # (R, T)
        ids = torch.tensor([t for part in parts for t in part], device=device)
        ids, pos = (ids.view(-1, T), pos) if even else (ids[None], pos[real][None])
        self.valid = torch.cat([self.valid, real], dim=1)
        if self.lora:
            self._bind(lengths)
        bias = additive(
            causal_mask(T, self.valid.size(1), device) & self.valid[:, None, :], self.model.dtype
        )
        ragged = ragged_or_even(lengths, device)
        attend = [partial(self._attend, i, bias, ragged) for i in range(self.model.config.n_layer)]
        x = self.model.run_layers(self.model.embed(ids), pos, attend)
        self.length += T
        return x.flatten(0, 1)

    def _bind(self, lengths: list[int]) -> None:
        """Each token under its row's adapter; row r has lengths[r] of them."""
        present = sorted(set(self.owner))
        of_owner = dict.fromkeys(present, 0)
        for n, o in zip(lengths, self.owner):
            of_owner[o] += n
        tokens = list(of_owner.values())
        if present != self.lora.bound:
            self.lora.bind(present)
            self.tokens = None
        if tokens != self.tokens:
            self.tokens = tokens
            self.lora.share_out(ragged_or_even(tokens, self.model.device))

    def _attend(self, layer: int, bias, ragged: Ragged | None, q, k, v):
        """Store k and v, then look at all that is stored. q (R, T, H, D); k, v (R, T, K, D); bias
        (R, T, S); with `ragged`, q, k and v are (1, N, heads, D)."""
        if ragged:
            q, k, v = ragged.spread(q), ragged.spread(k), ragged.spread(v)
        (R, T, H, D), K, end = q.shape, k.size(2), self.length + q.size(1)
        own = self.own[layer]
        own[0, :, :, self.length : end] = k.transpose(1, 2)
        own[1, :, :, self.length : end] = v.transpose(1, 2)
        k, v = own[:, :, :, :end]  # (R, K, end, D)
        q = q.transpose(1, 2).reshape(R, K, -1, D) * D**-0.5  # (R, K, G*T, D)
        scores = q @ k.mT
        if self.prefix is not None:
            # (R, K, G*T, S)
            scores = torch.cat([self._with_prefix(q, self.prefix[layer][0].mT), scores], dim=-1)
        scores.unflatten(2, (-1, T)).add_(bias[:, None, None])
        att = torch.softmax(scores, -1, out=scores)
        y = att[..., -end:] @ v
        if self.prefix is not None:
            y = self._with_prefix(att[..., :-end], self.prefix[layer][1]) + y
        y = y.reshape(R, H, T, D).transpose(1, 2)
        return ragged.join(y) if ragged else y

    def _with_prefix(self, x, m):
        """x (R, K, n, i) @ m (B, K, i, j) -> (R, K, n, j), where row b of m serves counts[b] rows
        of x."""
        if self.share is None:
            return x @ m
        x = self.share.spread(x[None]).transpose(1, 2)  # (B, K, rows of each, n, i)
        y = (x.flatten(2, 3) @ m).view(*x.shape[:4], -1)
        return self.share.join(y.transpose(1, 2))[0]

    def _serve(self, counts: list[int]) -> None:
        self.counts = counts
        self.share = Ragged(counts, self.model.device, multiple=1) if max(counts) > 1 else None

    def fork(self, counts: list[int], room: int) -> None:
        """Row r becomes counts[r] rows; what it has read is their prefix. Once only."""
        self.owner = [o for o, count in zip(self.owner, counts) for _ in range(count)]
        self.valid = self.valid.repeat_interleave(
            torch.tensor(counts, device=self.valid.device), dim=0
        )
        self.prefix = [own[:, :, :, : self.length] for own in self.own]
        self._serve(counts)
        self.own, self.length = self._empty(sum(counts), room), 0

    @property
    def full(self) -> bool:
        return self.length == self.own[0].size(3)

    def extend(self, tokens: int) -> None:
        """See to it that there is room for so many more tokens."""
        if (more := self.length + tokens - self.own[0].size(3)) > 0:
            self._each_layer(lambda own: torch.nn.functional.pad(own, (0, 0, 0, more)))

    def take_back(self, places: int) -> None:
        """Forget the last places."""
        self.valid = self.valid[:, : self.valid.size(1) - places]
        self.length -= places

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows, in ascending order; one that is given n times becomes n rows.
        """
        if self.prefix is not None:
            owner = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))[
                rows
            ]
            kept, counts = owner.unique_consecutive(return_counts=True)
            if len(kept) < len(self.counts):
                kept = kept.to(self.model.device)
                self.prefix = [prefix[:, kept] for prefix in self.prefix]
            self._serve(counts.tolist())
        self.owner, self.valid = [self.owner[r] for r in rows], self.valid[rows]
        index = torch.tensor(rows, device=self.model.device)
        self._each_layer(lambda own: own[:, index])


# -----------------------------------------------------------------------------
# prompts, and what follows

ROOM = 32  # the cache grows by so many tokens at a time; most rows are finished soon


def prefill(
    model: Transformer,
    prompts: list[list[int]],
    owner: list[int],
    room: int,
    lora: attached | None = None,
):
    """Read prompts, whose owners ascend, into a new Batch; `room` more tokens are to follow.
    Returns it, and the states (R, C) of the prompts' last tokens.

    What all prompts of an owner begin with is read once: prompts [1 2 3], [1 2 4 5] of one owner
    and [1 6], [1 7] of another are read as the rows [1 2], [1] and then as [3], [4 5], [6], [7].
    Exits with one line if a prompt does not fit the model's context.
    """
    refuse_long(model, prompts, room)
    of_owner = {o: [] for o in owner}
    for prompt, o in zip(prompts, owner):
        of_owner[o].append(prompt)
    # At least one token of each prompt is left to be read by itself: its state predicts what
    # follows.
    prefix = {o: commonprefix(own)[: min(map(len, own)) - 1] for o, own in of_owner.items()}
    if len(prompts) > len(of_owner) and any(prefix.values()):
        rest = [p[len(prefix[o]) :] for p, o in zip(prompts, owner)]
        batch = Batch(model, list(of_owner), max(map(len, prefix.values())), lora)
        batch.read(list(prefix.values()))
        batch.fork([len(own) for own in of_owner.values()], max(map(len, rest)) + room)
    else:
        batch, rest = Batch(model, owner, max(map(len, prompts)) + room, lora), prompts
    x = batch.read(rest)
    return batch, x[torch.tensor([len(r) for r in rest], device=x.device).cumsum(0) - 1]


def refuse_long(model: Transformer, prompts: list[list[int]], room: int) -> None:
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if longest + room > limit:
        told = f"a prompt of {longest} tokens with room for {room} more"
        raise SystemExit(f"error: {told} is longer than the model's context of {limit}")


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
    copies: int | list[int] = 1,
    adapters: Adapters | None = None,
    owner: list[int] | None = None,
    on_prefill=None,
    on_token=None,
    tick=None,
) -> list[list[int]]:
    """Continue each prompt `copies` times, or prompt i copies[i] times, at least once; returns that
    many lists of new ids, a prompt's copies together.

    A continuation ends with a token of `end_ids` (which is kept) or after `max_new` tokens. Each
    has a random stream of its own, from the seed, its prompt and which copy it is: but for rounding
    its text does not depend on what else is in the batch, nor on the order. With `adapters`,
    prompt i runs under adapter owner[i].
    Rows that are finished leave the batch. `on_prefill(prompt of each row, batch, x)` is called
    once, when the prompts are read; `on_token(which continuation, id)` for each new token, and
    `tick(live rows)` for each of all rows together.
    """
    assert owner or not adapters or len(adapters) == 1, "which prompt runs under which adapter?"
    owner = owner or [0] * len(prompts)
    end_ids = set(end_ids)
    order = sorted(range(len(prompts)), key=lambda i: owner[i])
    copies = [copies] * len(prompts) if isinstance(copies, int) else copies
    first = [0, *accumulate(copies)]  # where a prompt's outputs begin
    rows = [first[i] + c for i in order for c in range(copies[i])]  # batch row -> output
    u = torch.zeros(len(rows), max_new)
    if temperature:
        for i, prompt in enumerate(prompts):
            for c in range(copies[i]):
                own = torch.Generator().manual_seed(sub_seed(seed, c, *prompt))
                u[first[i] + c] = torch.rand(max_new, generator=own)
    u = u.to(model.device)
    out, live = [[] for _ in rows], [True] * len(rows)
    with attached(model, adapters) if adapters else nullcontext() as lora:
        refuse_long(model, prompts, max_new)
        in_order, owners = [prompts[i] for i in order], [owner[i] for i in order]
        batch, x = prefill(model, in_order, owners, min(ROOM, max_new), lora)
        if on_prefill:
            on_prefill(order, batch, x)
        if len(rows) > len(prompts):
            each = [n for n, i in enumerate(order) for _ in range(copies[i])]
            batch.keep(each)
            x = x[each]
        if model.step:  # --compile
            batch = model.step.rows(batch)
        for step in range(max_new):
            logits = model.head(x)
            logits[:, model.unused] = -torch.inf
            tokens = as_first(choose(logits, temperature, top_p, u[rows, step])).tolist()
            if tick:
                tick(sum(live))
            for n, t in enumerate(tokens):
                if live[n]:
                    out[rows[n]].append(t)
                    live[n] = t not in end_ids
                    if on_token:
                        on_token(rows[n], t)
            if not any(live) or step == max_new - 1:
                break
            kept = [n for n, alive in enumerate(live) if alive]
            if batch.full or len(kept) <= 0.75 * len(live):  # copying the cache must pay
                batch.keep(kept)
                rows = [rows[n] for n in kept]
                tokens = [tokens[n] for n in kept]
                live = [True] * len(kept)
            if batch.full:
                batch.extend(min(ROOM, max_new - step - 1))
            x = batch.read([[t] for t in tokens])
    return out
