"""A decoder-only transformer: Llama 2/3, SmolLM2, Qwen2/2.5 and Qwen3, in one file.

Top to bottom: configuration, rotary embedding, attention, the parts of a block, the transformer, a
cache for decoding. Submodules carry the names of Hugging Face checkpoints, so that reading one
(lm/checkpoint.py) is a lookup per tensor.

Letters in shape comments:
    R rows (sequences in the batch)    T tokens per row in this call
    S tokens that may be looked at (earlier + these)
    C n_embd    H n_head    K n_kv_head    G = H / K query heads per key head    D head_dim
    V vocabulary

What a token may look at is not the block's business: a block takes a callable `attend(q, k, v)`.
Here are the plain ones, causal() and one with a cache; lm/packing.py has packed rows and shared
prefixes, sampler.py a cache for many prompts.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class Config:
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_inner: int  # width of the MLP's hidden layer
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # only rope_type "llama3"
    tie_embeddings: bool
    qkv_bias: bool  # Qwen2, Qwen2.5
    qk_norm: bool  # Qwen3
    hf: dict = field(repr=False)  # config.json as read, to be written back on save


# -----------------------------------------------------------------------------
# rotary position embedding (arXiv 2104.09864)


def turns_at(pos, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times frequency, pos (R, T) -> 2 x (R, T, 1, D) in float32.

    The D/2 angles stand there twice, since both numbers of a pair turn by the same; the first sines
    are negated, which is what rotate() needs. With rope_type "llama3" long wavelengths are
    stretched by `factor`, short ones kept, those between blended.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=pos.device)
    half /= config.head_dim
    freq = config.rope_theta**-half  # (D/2)
    if s := config.rope_scaling:
        # Full turns in the first context.
        turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        keep = keep.clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, fully stretched
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = pos[:, :, None, None].float() * freq  # (R, T, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its angle. x (R, T, heads, D); cos, sin (R, T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


# -----------------------------------------------------------------------------
# attention


def attention(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v, with grouped query heads.

    q (R, T, H, D); k, v (R, S, K, D); bias (R, T, S), see additive() -> (R, T, H, D).
    """
    (R, T, H, D), K = q.shape, k.size(2)
    # The G query heads that share a key head are laid out as more queries of it, so keys are never
    # copied per head.
    q = q.transpose(1, 2).reshape(R, K, -1, D)  # (R, K, G*T, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (R, K, S, D)
    scores = (q @ k.mT * D**-0.5).unflatten(2, (-1, T)) + bias[:, None, None]  # (R, K, G, T, S)
    y = scores.softmax(-1).flatten(2, 3) @ v  # (R, K, G*T, D)
    return y.reshape(R, H, T, D).transpose(1, 2)


def additive(mask, dtype):
    """mask bool, True where a token may look -> what is added to the scores: 0 there, elsewhere the
    lowest number."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)


def causal_mask(T: int, S: int, device=None):
    """(T, S) bool: the last T of S tokens look at all up to themselves. T = 2, S = 3: [[1, 1, 0],
    [1, 1, 1]]."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def causal(q, k, v):
    """The plain `attend`: rows of one length, each of which is one sequence."""
    mask = causal_mask(q.size(1), k.size(1), q.device)
    return attention(q, k, v, additive(mask, q.dtype)[None])


# -----------------------------------------------------------------------------
# the parts of a block


class RMSNorm(nn.Module):
    """weight * x / rms(x), in float32 inside."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, attend):
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        q = self.q_norm(self.q_proj(x).unflatten(-1, (H, D)))  # (R, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (K, D)))  # (R, T, K, D)
        v = self.v_proj(x).unflatten(-1, (K, D))  # (R, T, K, D)
        y = attend(rotate(q, *rope), rotate(k, *rope), v)  # (R, T, H, D)
        return self.o_proj(y.flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_inner, bias=False)
        self.down_proj = nn.Linear(c.n_inner, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, attend):
        """x (R, T, C), rope 2 x (R, T, 1, D), attend(q, k, v) as above -> (R, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


# -----------------------------------------------------------------------------
# the transformer


class Transformer(nn.Module):
    """Token ids in, logits out. The three stages are public because training and sampling call them
    apart.

    model(ids) runs all. `embed` -> `run_layers` (any range of layers) -> `head` gives the same; the
    inner update runs the frozen lower layers once and the upper ones every step, and `head` only
    where a token is predicted.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.unused = []  # ids that no text has, so that none is sampled; Tokenizer.unused()
        self.attention = attention  # lm/kernels.py swaps it
        self.step = None  # with --compile: how it is trained, and samples (lm/grid.py)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def embed(self, ids):
        """ids (R, T) int64 -> x (R, T, C)."""
        return self.embed_tokens(ids)

    def run_layers(self, x, pos, attend, start=0, stop=None):
        """Layers start .. stop-1. x (R, T, C), pos (R, T) positions for RoPE -> (R, T, C).

        `attend` is one callable for all layers, or a list with one for each (a cache keeps the keys
        of each layer).
        """
        rope = [part.to(x.dtype) for part in turns_at(pos, self.config)]  # 2 x (R, T, 1, D)
        for i, layer in enumerate(self.layers[start:stop], start):
            x = layer(x, rope, attend[i] if isinstance(attend, list) else attend)
        return x

    def head(self, x):
        """x (..., C) -> logits (..., V)."""
        return self.lm_head(self.norm(x))

    def forward(self, ids, cache: list["CachedLayer"] | None = None):
        """ids (R, T) -> logits (R, T, V). The rows start at position 0, or go on where those in the
        cache end."""
        past = cache[0].length if cache else 0
        pos = torch.arange(past, past + ids.size(1), device=ids.device).expand_as(ids)
        return self.head(self.run_layers(self.embed(ids), pos, cache or causal))


# -----------------------------------------------------------------------------
# decoding with a cache, plainly (sampler.py has the fast way)


class CachedLayer:
    """The `attend` of one layer that remembers the keys and values of all that was read before.

    cache = [CachedLayer() for _ in model.layers]; then model(prompt, cache), model(next token,
    cache), ...
    """

    def __init__(self):
        self.k = self.v = None  # (R, S, K, D)

    @property
    def length(self) -> int:
        return 0 if self.k is None else self.k.size(1)

    def __call__(self, q, k, v):
        self.k = k if self.k is None else torch.cat((self.k, k), dim=1)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=1)
        return causal(q, self.k, self.v)
