"""LoRA for a population of candidates: P adapters on one frozen model, in one forward pass.

LoRA (arXiv 2106.09685) adds a low-rank correction to a frozen weight:

    y = x W^T + (alpha / rank) (x A^T) B^T

Here A and B have a leading population axis P, so that P candidates train and answer in the same
batch:

    x (P*b, T, in)                  b rows of T tokens for each candidate, candidate after candidate
    W (out, in)                     frozen and shared: one product over all tokens
    A (P, rank, in), B (P, out, rank)    one batched product over the population axis

The loss is the sum of the candidates' mean losses, and no row sees another's, so each candidate
gets exactly the gradient that it would get alone. tests/test_inner.py holds us to that.

All A and B of one candidate lie in one row of a flat (P, N) float32 tensor: a candidate is a row,
whatever is done to it (inner.py trains rows, lm/adapters.py writes one). Top to bottom: adapters,
attaching, merging.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn

from lm.ranks import share_of
from model import Transformer

PROJECTIONS = {  # name -> the submodule of a block that holds it
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}

# -----------------------------------------------------------------------------
# adapters


@dataclass(frozen=True)
class LoRAConfig:
    rank: int
    alpha: float
    targets: tuple  # names out of PROJECTIONS
    start: int  # first adapted layer; layers below it stay frozen and are computed once
    stop: int  # one past the last adapted layer

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapters:
    """P adapters of one shape. `flat` (P, N) float32 holds them, one candidate per row."""

    def __init__(self, model: Transformer, config: LoRAConfig, flat=None):
        unknown = set(config.targets) - set(PROJECTIONS)
        if unknown or not config.targets:
            names = ", ".join(PROJECTIONS)
            raise SystemExit(
                f"error: LoRA targets {sorted(unknown)} are unknown; choose from {names}"
            )
        if not 0 <= config.start < config.stop <= model.config.n_layer or config.rank < 1:
            raise SystemExit(
                "error: LoRA needs a rank of at least 1 and layers within "
                f"0..{model.config.n_layer}, "
                f"got rank {config.rank}, layers {config.start}..{config.stop}"
            )
        self.config = config
        # module path -> (offset of A, shape of A, offset of B, shape of B) in a row of `flat`
        self.places = {}
        offset = 0
        for layer in range(config.start, config.stop):
            for name in (t for t in PROJECTIONS if t in config.targets):
                path = f"layers.{layer}.{PROJECTIONS[name]}.{name}"
                linear = model.get_submodule(path)
                a, b = (config.rank, linear.in_features), (linear.out_features, config.rank)
                self.places[path] = (offset, a, offset + math.prod(a), b)
                offset += math.prod(a) + math.prod(b)
        self.size = offset  # N
        self.flat = flat

    @classmethod
    def init(cls, model: Transformer, config: LoRAConfig, n: int, seed: int) -> "Adapters":
        """`n` fresh adapters that change nothing yet: A uniform in +-1/sqrt(in) as in PEFT, B zero.

        All candidates start from the same A. What differs between their rewards is then the
        self-edit, not the draw.
        """
        adapters = cls(model, config)
        one = torch.zeros(1, adapters.size)
        generator = torch.Generator().manual_seed(seed)
        for path in adapters.places:
            a, _ = adapters.views(one, path)
            a.uniform_(-1, 1, generator=generator).div_(math.sqrt(a.size(-1)))
        adapters.flat = one.repeat(n, 1).to(model.device)
        return adapters

    def views(self, flat, path: str):
        """A (P, rank, in) and B (P, out, rank) of a module, as views of a flat (P, N) tensor."""
        at_a, shape_a, at_b, shape_b = self.places[path]
        a = flat[:, at_a : at_a + math.prod(shape_a)].view(-1, *shape_a)
        b = flat[:, at_b : at_b + math.prod(shape_b)].view(-1, *shape_b)
        return a, b

    def pick(self, rows) -> "Adapters":
        """The adapters in the given rows, copied."""
        picked = object.__new__(Adapters)
        picked.config, picked.places, picked.size = self.config, self.places, self.size
        picked.flat = self.flat[rows]
        return picked

    def __len__(self) -> int:
        return self.flat.size(0)


# -----------------------------------------------------------------------------
# attaching


class LoRALinear(nn.Module):
    """A frozen linear layer plus the corrections of P candidates. Without A and B it is the frozen
    layer."""

    def __init__(self, base: nn.Linear, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = self.b = self.ragged = None

    def forward(self, x):
        y = self.base(x)  # (P*b, T, out), or all tokens end to end: (1, N, out)
        if self.a is None:
            return y
        if self.ragged is not None:  # candidates with unequally many of the tokens
            low = self.ragged.spread(x) @ self.a.mT  # (P, most tokens of one, rank)
            return y + self.ragged.join(low * self.scale @ self.b.mT).view_as(y)
        P = self.a.size(0)
        low = x.reshape(P, -1, x.size(-1)) @ self.a.mT  # (P, b*T, rank)
        return torch.baddbmm(y.view(P, -1, y.size(-1)), low, self.b.mT, alpha=self.scale).view_as(y)


class attached:
    """Within `with attached(model, adapters) as lora`, the model runs under the adapters; on
    leaving, it is as it was.

    Its rows belong to the P candidates in turn, equally many each, unless share_out() says
    otherwise. Raises RuntimeError if the model has adapters already.
    """

    def __init__(self, model: Transformer, adapters: Adapters):
        if any(isinstance(m, LoRALinear) for m in model.modules()):
            raise RuntimeError("the model has adapters attached already")
        self.model, self.adapters, scale = model, adapters, adapters.config.scale
        self.modules = {
            path: LoRALinear(model.get_submodule(path), scale) for path in adapters.places
        }
        self.grads = None  # (P, N), allocated once: fresh memory costs more than the copies into it

    def __enter__(self) -> "attached":
        self.bind(list(range(len(self.adapters))))
        for path, module in self.modules.items():
            self.model.set_submodule(path, module)
        return self

    def __exit__(self, *exception) -> None:
        for path, module in self.modules.items():
            self.model.set_submodule(path, module.base)

    def bind(self, rows: list[int], train: bool = False) -> None:
        """Use the adapters in these rows, as they are now. With train=True, A and B gather
        gradients, for gradients()."""
        self.bound, index = rows, torch.as_tensor(rows, device=self.model.device)
        for path, module in self.modules.items():
            module.ragged = None
            views = self.adapters.views(self.adapters.flat, path)
            module.a, module.b = (
                m[index].to(self.model.dtype).requires_grad_(train) for m in views
            )

    def share_out(self, ragged) -> None:
        """Until the next bind() a batch's tokens, end to end, belong to the bound candidates as
        `ragged` says (lm/packing.Ragged, a row for each candidate); None: equally many to each."""
        for module in self.modules.values():
            module.ragged = ragged

    def gradients(self):
        """The gradients since the last bind(), laid out like `flat`: (p, N) in float32. The next
        call overwrites them."""
        if self.grads is None:
            self.grads = torch.empty_like(self.adapters.flat)
        for path, module in self.modules.items():
            a, b = self.adapters.views(self.grads[: len(module.a)], path)
            a.copy_(module.a.grad), b.copy_(module.b.grad)
        return self.grads[: len(module.a)]


# -----------------------------------------------------------------------------
# merging


@torch.no_grad()
def merge(model: Transformer, adapters: Adapters) -> dict:
    """Add one adapter to the base weights, W <- W + scale B A (in float32). Returns the old
    weights."""
    old = {}
    for path in adapters.places:
        weight = model.get_submodule(path).weight
        a, b = (m[0] for m in adapters.views(adapters.flat, path))
        old[path] = weight.clone()
        delta = adapters.config.scale * (b @ a)  # (out, in)
        weight.copy_(weight.float() + share_of(weight, delta))
    return old


@contextmanager
def merged(model: Transformer, adapters: Adapters | None):
    """Within, the model has one adapter, or none, in its weights; after, its own again, bit for
    bit."""
    old = merge(model, adapters) if adapters else {}
    try:
        yield
    finally:
        for path, weight in old.items():
            model.get_submodule(path).weight.detach().copy_(weight)
