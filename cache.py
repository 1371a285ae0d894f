"""The key-value cache of a batch of rows that have much in common: prompts that begin alike, samples of one prompt.

Letters as in model.py; B is the number of rows of one block.
"""

import functools

import torch

from model import Attend, Transformer, weigh_
from rows import Ragged


class KVCache:
    """Keys and values of the batch's rows, in blocks. Each block holds more tokens, and may serve several rows at once.

    What all prompts begin with is read as one row, for each candidate; fan_out() makes it the prompts' rows, which go on
    in a block of their own, and again makes each prompt the rows of its samples. So nothing is stored or read twice. All
    rows are at the same slot: one that has read less than others masks out the slots that it left empty.
    """

    def __init__(self, model: Transformer, rows: int, slots: int):
        self.model, self.blocks = model, []
        self._open(rows, slots)

    def _open(self, rows: int, slots: int) -> None:
        c = self.model.config
        shape = (2, c.n_layer, rows, c.n_kv_head, slots, c.head_dim)
        kv = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        self.blocks.append(CacheBlock(kv, [1] * rows))

    @property
    def length(self) -> int:
        return sum(block.length for block in self.blocks)

    def fan_out(self, counts: list[int], slots: int) -> None:
        """Make every row as many as counts says, which go on in a new block with the given number of slots."""
        for block in self.blocks:
            mine = iter(counts)
            block.serve([sum(next(mine) for _ in range(count)) for count in block.counts])
        self._open(sum(counts), slots)

    def extend(self, slots: int) -> None:
        """See to it that the last block has room for so many more tokens."""
        last = self.blocks[-1]
        if (more := last.length + slots - last.kv.size(4)) > 0:
            last.kv = torch.nn.functional.pad(last.kv, (0, 0, 0, more))

    def take_back(self, slots: int) -> None:
        """Forget the last tokens."""
        self.blocks[-1].length -= slots

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows of the batch, in ascending order."""
        for block in self.blocks:
            owner = torch.arange(len(block.counts)).repeat_interleave(torch.tensor(block.counts))[rows]
            kept, counts = owner.unique_consecutive(return_counts=True)
            if len(kept) < len(block.counts):
                block.kv = block.kv[:, :, kept.to(block.kv.device)]
            block.serve(counts.tolist())

    def layer(self, i: int):
        return LayerCache(self, i)


class CacheBlock:
    """Part of a cache: kv (2, n_layer, B, K, slots, D), `length` slots filled; its row b serves counts[b] rows in turn."""

    def __init__(self, kv, counts: list[int]):
        self.kv, self.length = kv, 0
        self.serve(counts)

    def serve(self, counts: list[int]) -> None:
        self.counts = counts
        self.share = Ragged(counts, self.kv.device, multiple=1) if max(counts) > 1 else None


class LayerCache:
    """One layer's view of a KVCache."""

    def __init__(self, cache: KVCache, i: int):
        self.blocks, self.i = cache.blocks, i

    def attend(self, q, k, v, bias):
        """Store k, v (R, K, T, D) in the last block; attend with q (R, K, G*T, D) to all blocks -> (R, K, G*T, D).

        bias (R, 1, 1, T, S) is for the S slots of all blocks. The result is Attend's, and for one block also the way.
        """
        last = self.blocks[-1]
        stop = last.length + k.size(2)
        last.kv[0, self.i, :, :, last.length : stop] = k
        last.kv[1, self.i, :, :, last.length : stop] = v
        ends = [block.length for block in self.blocks[:-1]] + [stop]
        keys, values = ([block.kv[n, self.i, :, :, :end] for block, end in zip(self.blocks, ends)] for n in (0, 1))
        if len(self.blocks) == 1:
            return Attend.apply(q, *keys, *values, bias)
        shares = [block.share for block in self.blocks]
        scores = torch.cat([multiply(q, key.mT, share) for key, share in zip(keys, shares)], -1)  # (R, K, G*T, S)
        att = weigh_(scores, bias)
        parts = [multiply(*part) for part in zip(att.split(ends, -1), values, shares)]
        return functools.reduce(torch.add, parts)


def multiply(x, m, share):
    """x (R, K, n, i) @ m (B, K, i, j) -> (R, K, n, j), where row b of m serves share's b-th lot of rows of x, or B = R."""
    if share is None:
        return x @ m
    x = share.spread(x[None]).transpose(1, 2)  # (B, K, rows per lot, n, i)
    y = x.flatten(2, 3) @ m
    return share.join(y.view(*x.shape[:4], -1).transpose(1, 2))[0]
