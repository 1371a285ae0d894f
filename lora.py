"""LoRA for a population of candidates: P adapters on one frozen model, in one forward pass.

LoRA (arXiv 2106.09685) adds a low-rank correction to a frozen weight:   y = x W^T + (alpha / rank) (x A^T) B^T
Here A and B have a leading population axis P, so that P candidates train and answer in the same batch:

    x (P*b, T, in)      b rows of T tokens for each candidate, candidate after candidate (or unequally many tokens)
    W (out, in)         frozen and shared: one GEMM over all tokens
    A (P, rank, in), B (P, out, rank): one batched product over the population axis

The loss is the sum of the candidates' mean losses, and no row sees another's, so each candidate gets exactly the
gradient that it would get alone. tests/test_inner.py holds us to that.

All A and B of one candidate lie in one row of a flat (P, N) float32 tensor: a candidate is a row, whatever is done to
it (inner.py trains rows, save_adapter writes one). Top to bottom: adapters, attaching, files, merging.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import read_json, write_atomic
from model import Transformer
from rows import Ragged

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
            raise SystemExit(f"error: LoRA targets {sorted(unknown)} are unknown; choose from {', '.join(PROJECTIONS)}")
        if not 0 <= config.start < config.stop <= model.config.n_layer or config.rank < 1:
            raise SystemExit(
                f"error: LoRA needs a rank of at least 1 and layers within 0..{model.config.n_layer}, "
                f"got rank {config.rank}, layers {config.start}..{config.stop}"
            )
        self.config = config
        self.slots = {}  # module path -> (offset of A, shape of A, offset of B, shape of B)
        offset = 0
        for layer in range(config.start, config.stop):
            for name in (t for t in PROJECTIONS if t in config.targets):
                path = f"layers.{layer}.{PROJECTIONS[name]}.{name}"
                linear = model.get_submodule(path)
                a, b = (config.rank, linear.in_features), (linear.out_features, config.rank)
                self.slots[path] = (offset, a, offset + math.prod(a), b)
                offset += math.prod(a) + math.prod(b)
        self.size = offset  # N
        self.flat = flat

    @classmethod
    def init(cls, model: Transformer, config: LoRAConfig, n: int, seed: int) -> "Adapters":
        """`n` fresh adapters that change nothing yet: A uniform in +-1/sqrt(in) as in PEFT, B zero.

        All candidates start from the same A. What differs between their rewards is then the self-edit, not the draw.
        """
        adapters = cls(model, config)
        one = torch.zeros(1, adapters.size)
        generator = torch.Generator().manual_seed(seed)
        for path in adapters.slots:
            a, _ = adapters.views(one, path)
            a.uniform_(-1, 1, generator=generator).div_(math.sqrt(a.size(-1)))
        adapters.flat = one.repeat(n, 1).to(model.device)
        return adapters

    def views(self, flat, path: str):
        """A (P, rank, in) and B (P, out, rank) of module `path`, as views of a flat (P, N) tensor."""
        at_a, shape_a, at_b, shape_b = self.slots[path]
        a = flat[:, at_a : at_a + math.prod(shape_a)].view(-1, *shape_a)
        b = flat[:, at_b : at_b + math.prod(shape_b)].view(-1, *shape_b)
        return a, b

    def pick(self, rows) -> "Adapters":
        """The adapters in the given rows, copied."""
        picked = object.__new__(Adapters)
        picked.config, picked.slots, picked.size, picked.flat = self.config, self.slots, self.size, self.flat[rows]
        return picked

    def __len__(self) -> int:
        return self.flat.size(0)


class LoRALinear(nn.Module):
    """A frozen linear layer plus the corrections of P candidates. Without A and B it is the frozen layer."""

    def __init__(self, base: nn.Linear, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = self.b = self.ragged = None

    def forward(self, x):
        y = self.base(x)  # (P*b, T, out), or all tokens end to end: (1, N, out)
        if self.a is None:
            return y
        if self.ragged is not None:  # candidates with unequally many of the tokens
            low = self.ragged.spread(x) @ self.a.mT  # (P, n, rank)
            return y + self.ragged.join(low * self.scale @ self.b.mT).view_as(y)
        P = self.a.size(0)
        low = x.reshape(P, -1, x.size(-1)) @ self.a.mT  # (P, b*T, rank)
        return torch.baddbmm(y.view(P, -1, y.size(-1)), low, self.b.mT, alpha=self.scale).view_as(y)


class attached:
    """Within `with attached(model, adapters) as lora`, the model runs under the adapters; on leaving, it is as it was.

    Its rows belong to the P candidates in turn, equally many each; or, after assign(), its tokens in the given numbers.
    Raises RuntimeError if the model has adapters already.
    """

    def __init__(self, model: Transformer, adapters: Adapters):
        if any(isinstance(m, LoRALinear) for m in model.modules()):
            raise RuntimeError("the model has adapters attached already")
        self.model, self.adapters, scale = model, adapters, adapters.config.scale
        self.modules = {path: LoRALinear(model.get_submodule(path), scale) for path in adapters.slots}
        self.grads = None  # (P, N), allocated once: fresh memory costs more than the copies into it

    def __enter__(self) -> "attached":
        self.bind(list(range(len(self.adapters))))
        for path, module in self.modules.items():
            self.model.set_submodule(path, module)
        return self

    def __exit__(self, *exception) -> None:
        for path, module in self.modules.items():
            self.model.set_submodule(path, module.base)

    def bind(self, rows, train: bool = False) -> None:
        """Use the adapters in these rows, as they are now. With train=True, A and B gather gradients, for gradients()."""
        self.bound, self.tokens, rows = rows, None, torch.as_tensor(rows, device=self.model.device)
        for path, module in self.modules.items():
            module.ragged = None
            views = self.adapters.views(self.adapters.flat, path)
            module.a, module.b = (m[rows].to(self.model.dtype).requires_grad_(train) for m in views)

    def assign(self, tokens: list[int]) -> None:
        """From now on, a batch's tokens belong to the bound candidates in turn, in these numbers."""
        if tokens != self.tokens:
            self.tokens, even = tokens, len(set(tokens)) == 1
            ragged = None if even else Ragged(tokens, self.model.device, multiple=1)
            for module in self.modules.values():
                module.ragged = ragged

    def gradients(self):
        """The gradients since the last bind(), laid out like `flat`: (p, N) in float32. The next call overwrites them."""
        if self.grads is None:
            self.grads = torch.empty_like(self.adapters.flat)
        for path, module in self.modules.items():
            a, b = self.adapters.views(self.grads[: len(module.a)], path)
            a.copy_(module.a.grad), b.copy_(module.b.grad)
        return self.grads[: len(module.a)]


# -----------------------------------------------------------------------------
# files and merging


def peft_name(path: str, part: str) -> str:
    """('layers.3.mlp.up_proj', 'A') -> 'base_model.model.model.layers.3.mlp.up_proj.lora_A.weight'."""
    return f"base_model.model.model.{path}.lora_{part}.weight"


def save_adapter(adapters: Adapters, folder, base: str, row: int = 0) -> None:
    """Write one adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors). Each is replaced atomically."""
    tensors = {}
    for path in adapters.slots:
        a, b = adapters.views(adapters.flat[row : row + 1], path)
        tensors[peft_name(path, "A")], tensors[peft_name(path, "B")] = a[0].contiguous(), b[0].contiguous()
    c = adapters.config
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": c.rank,
        "lora_alpha": c.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(c.targets),
        "layers_to_transform": list(range(c.start, c.stop)),
        "inference_mode": True,
    }
    folder = Path(folder)
    write_atomic(folder / "adapter_model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", lambda p: p.write_text(json.dumps(config, indent=1), encoding="utf-8"))


def load_adapter(model: Transformer, folder) -> Adapters:
    """Read a PEFT LoRA folder for `model`, as a population of one. Exits with one line if it does not fit."""
    folder = Path(folder)
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for key in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise SystemExit(f"error: {folder}: {key} = {config[key]!r} is not supported")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise SystemExit(f"error: {folder} is not a plain LoRA adapter (peft_type LORA, bias none)")
    try:
        tensors, rank, alpha = load_file(file), config["r"], config["lora_alpha"]
    except (SafetensorError, OSError) as e:
        raise SystemExit(f"error: cannot read {file}: {e}") from e
    except KeyError as e:
        raise SystemExit(f"error: {folder / 'adapter_config.json'}: field {e} is missing") from e
    layers = sorted({int(n) for name in tensors for n in re.findall(r"\.layers\.(\d+)\.", name)})
    targets = tuple(t for t in PROJECTIONS if any(f".{t}.lora_" in name for name in tensors))
    if not layers or not targets:
        raise SystemExit(f"error: {file} has no LoRA tensors for {', '.join(PROJECTIONS)}")
    config = LoRAConfig(rank, alpha, targets, layers[0], layers[-1] + 1)
    adapters = Adapters(model, config)
    flat = torch.zeros(1, adapters.size)
    expected = {peft_name(p, part): v for p in adapters.slots for part, v in zip("AB", adapters.views(flat, p))}
    for name in expected.keys() ^ tensors.keys():
        raise SystemExit(f"error: {file}: tensor {name} is {'missing' if name in expected else 'unexpected'}")
    for name, view in expected.items():
        if tensors[name].shape != view.shape[1:]:
            raise SystemExit(
                f"error: {file}: {name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(view.shape[1:])}"
            )
        view[0] = tensors[name]
    adapters.flat = flat.to(model.device)
    return adapters


@torch.no_grad()
def merge(model: Transformer, adapters: Adapters) -> dict:
    """Add one adapter to the base weights, W <- W + scale B A (in float32). Returns the old weights."""
    old = {}
    for path in adapters.slots:
        linear = model.get_submodule(path)
        a, b = (m[0] for m in adapters.views(adapters.flat, path))
        old[path] = linear.weight.detach()
        weight = linear.weight.float() + adapters.config.scale * (b @ a)
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    return old


@contextmanager
def merged(model: Transformer, adapters: Adapters | None):
    """Within, the model has one adapter, or none, in its weights; after, its own again, the same tensors bit for bit."""
    old = merge(model, adapters) if adapters else {}
    try:
        yield
    finally:
        for path, weight in old.items():
            model.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
