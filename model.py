"""A decoder-only transformer: Llama 2/3, SmolLM2, Qwen2/2.5 and Qwen3, in one file.

Top to bottom: configuration, rotary embedding, the parts of a block, the transformer, masks.
Submodules carry the names of Hugging Face checkpoints, so that reading one (checkpoint.py) is a lookup per tensor.

Letters used in shape comments:
    R rows (sequences in the batch)     T tokens per row in this call     S key slots (cached + new)
    C n_embd    H n_head    K n_kv_head    G = H / K query heads per key head    D head_dim    V vocabulary
"""

import functools
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from rows import Forks

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
# rotary position embedding


def rope_table(config: Config, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times frequency, each (max_seq_len, D) in float32: the D/2 angles twice, sin first negated.

    With rope_type "llama3" the long wavelengths are stretched by `factor`, the short ones kept, those between blended.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    freq = config.rope_theta**-half  # (D/2)
    if s := config.rope_scaling:
        turns = s["original_max_position_embeddings"] * freq / (2 * torch.pi)  # full turns in the original context
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        keep = keep.clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, fully stretched
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = torch.arange(config.max_seq_len, dtype=torch.float32, device=device)[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its angle. x (R, T, heads, D); cos, sin (R, T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


# -----------------------------------------------------------------------------
# the parts of a block


class Linear(nn.Linear):
    """A linear layer with a frozen weight.

    On a CPU, F.linear first brings the weight into the layout that its product wants, in every call: with 50 rows that
    takes as long as the product. So oneDNN's form of it is kept, and its transpose's where it is trained through: that takes
    two or three times the memory.
    Replace `weight` to change it (as lora.merge does); writing through `weight.data` would not be noticed.
    """

    def reset_parameters(self):  # weights come from a checkpoint; drawing random ones first would take longer
        self.kept = {}  # transposed? -> (weight, its version, its blocked form)

    def forward(self, x):
        """x (..., in) -> x W^T + bias (..., out)."""
        if not self.may_block():
            return F.linear(x, self.weight, self.bias)
        return Blocked.apply(x, self) if x.requires_grad else blocked_product(x, self.blocked(), self.bias)

    def backward_input(self, grad):
        """dy (..., out) -> dx = dy W (..., in)."""
        return blocked_product(grad, self.blocked(transposed=True)) if self.may_block() else grad @ self.weight

    def may_block(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        w = self.weight
        return w.device.type == "cpu" and not w.requires_grad and has_blocked_products(w.dtype)

    def blocked(self, transposed: bool = False):
        weight, version, form = self.kept.get(transposed, (None, 0, None))
        if weight is not self.weight or version != weight._version:
            weight = self.weight
            form = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous() if transposed else weight)
            self.kept[transposed] = weight, weight._version, form
        return form


@functools.cache
def has_blocked_products(dtype) -> bool:
    """Can this CPU, and this build of torch, multiply in oneDNN's layout? In float32 only where torch has MKL, too (x86)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkl.is_available()


def blocked_product(x, form, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, form, bias, "none", [], "")


class Blocked(torch.autograd.Function):
    """A Linear on the forms that it keeps."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return blocked_product(x, linear.blocked(), linear.bias)

    @staticmethod
    def backward(ctx, grad):
        return ctx.linear.backward_input(grad), None


class Embedding(nn.Embedding):
    def reset_parameters(self):
        pass


class Normalize(torch.autograd.Function):
    """x / rms(x), in float32 inside. By hand, because autograd's version costs as much as a projection on a CPU.

    With h = x / rms(x):  dx = (dh - h * mean(dh * h)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x, eps):
        h = x.float()
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        h = h * scale
        ctx.save_for_backward(h, scale)
        return h.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        h, scale = ctx.saved_tensors
        g = grad.float()
        return torch.addcmul(g, h, (g * h).mean(-1, keepdim=True), value=-1).mul_(scale).to(grad.dtype), None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return self.weight * Normalize.apply(x, self.eps)


def weigh_(scores, bias):
    """scores (R, K, G*T, S) + bias (R, 1, 1, T, S), then softmax, in place; in float32 inside, whatever the dtype."""
    scores.view(*scores.shape[:2], -1, *bias.shape[-2:]).add_(bias)  # the same memory, as (R, K, G, T, S)
    return torch.softmax(scores, -1, out=scores)


class Attend(torch.autograd.Function):
    """softmax(q k^T + bias) v, by hand: the scores, most of what attention writes, have one buffer and not three.

    With a the softmax:  dv = a^T dy,  da = dy v^T,  ds = a * (da - sum(da * a)),  dq = ds k,  dk = ds^T q.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        """q (R, K, G*T, D), k and v (R, K, S, D), bias (R, 1, 1, T, S) -> (R, K, G*T, D)."""
        att = weigh_(q @ k.mT, bias)  # (R, K, G*T, S)
        ctx.save_for_backward(q, k, v, att)
        return att @ v

    @staticmethod
    def backward(ctx, grad):
        q, k, v, att = ctx.saved_tensors
        d = torch.ops.aten._softmax_backward_data(grad @ v.mT, att, -1, att.dtype)  # ds, of da
        return d @ k, d.mT @ q, att.mT @ grad, None


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, bias, layer_cache=None, rows=None):
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        q = self.q_norm(self.q_proj(x).unflatten(-1, (H, D)))  # (R, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (K, D)))  # (R, T, K, D)
        v = self.v_proj(x).unflatten(-1, (K, D))  # (R, T, K, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if rows is None:
            y = self.attend(q, k, v, bias, layer_cache)
        elif isinstance(rows, Forks):  # with rows, q, k and v are (1, N, heads, D)
            (q1, q2), (k1, k2), (v1, v2) = rows.spread(q), rows.spread(k), rows.spread(v)
            tails = self.attend(q2, rows.after(k1, k2), rows.after(v1, v2), bias[1])
            y = rows.join(self.attend(q1, k1, v1, bias[0]), tails)
        else:
            q, k, v = rows.spread(q), rows.spread(k), rows.spread(v)
            y = rows.join(self.attend(q, k, v, bias, layer_cache))
        return self.o_proj(y)

    def attend(self, q, k, v, bias, layer_cache=None):
        """q (R, T, H, D), k and v (R, S, K, D), bias (R, 1, 1, T, S) -> (R, T, H*D).

        With a cache, k and v (R, T, K, D) are stored there, and the S slots are all that it holds then.
        """
        R, T, H, D = q.shape
        K = self.n_kv_head
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (R, K, S, D)
        # Query heads that share a key head are laid out as more queries of it, so k and v are never copied per head.
        q = q.transpose(1, 2).reshape(R, K, -1, D) * D**-0.5  # (R, K, G*T, D); scaled here, where there is least to multiply
        if layer_cache is None:
            y = Attend.apply(q, k.contiguous(), v.contiguous(), bias)  # copied once here, not in each of its products
        else:
            y = layer_cache.attend(q, k, v, bias)
        return y.reshape(R, H, T, D).transpose(1, 2).reshape(R, T, H * D)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.n_embd, c.n_inner, bias=False)
        self.up_proj = Linear(c.n_embd, c.n_inner, bias=False)
        self.down_proj = Linear(c.n_inner, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, bias, layer_cache=None, rows=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, bias, layer_cache, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


# -----------------------------------------------------------------------------
# the transformer


class Transformer(nn.Module):
    """Token ids in, logits out; the three stages are public because training and sampling call them apart.

    model(ids) runs all. `embed` -> `run_layers` (any range of layers) -> `head` gives the same; the inner update runs
    the frozen lower layers once and the upper ones every step, and does `head`'s part itself, only where there is a label.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.rope = None  # (cos, sin), made on first use on the right device
        self.train_block = Block.forward  # what runs a layer that is trained; compile_blocks() replaces it

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def compile_blocks(self, backend: str) -> None:
        """Let torch.compile make the training blocks faster: "inductor" generates code, "cudagraphs" (CUDA) only records
        the kernel launches, and needs no Triton. Decoding, where shapes change with every token, is left alone."""
        # Attention's shapes and forms vary from step to step: compiling it, too, takes longer than most runs.
        Attention.attend = torch.compiler.disable(Attention.attend)
        self.train_block = torch.compile(Block.forward, backend=backend, dynamic=backend == "inductor")

    def embed(self, ids):
        """ids (R, T) int64 -> x (R, T, C)."""
        return self.embed_tokens(ids)

    def run_layers(self, x, pos, mask, start=0, stop=None, cache=None, rows=None):
        """Layers start .. stop-1. x (R, T, C), pos (R, T) positions for RoPE, mask (R, T, S) bool, True = may look.

        With `rows`, x is (1, N, C) and pos (1, N): the tokens of its rows end to end. The mask is by rows all the same;
        Forks have two.
        """
        if self.rope is None or self.rope[0].device != x.device:
            self.rope = rope_table(self.config, x.device)
        rope = tuple(table[pos].unsqueeze(2).to(x.dtype) for table in self.rope)  # 2 x (R, T, 1, D)
        bias = [additive(m, x.dtype) for m in mask] if isinstance(rows, Forks) else additive(mask, x.dtype)
        for i, layer in enumerate(self.layers[start:stop], start):
            run = self.train_block if torch.is_grad_enabled() else Block.forward
            x = run(layer, x, rope, bias, cache and cache.layer(i), rows)
        if cache is not None:
            cache.blocks[-1].length += mask.size(1)
        return x

    def head(self, x):
        """x (..., C) -> logits (..., V)."""
        return self.lm_head(self.norm(x))

    def forward(self, ids, pos=None, mask=None, cache=None):
        """ids (R, T) -> logits (R, T, V). Without pos and mask: plain causal rows that start at position 0."""
        R, T = ids.shape
        past = cache.length if cache is not None else 0
        if pos is None:
            pos = torch.arange(past, past + T, device=ids.device).expand(R, T)
        if mask is None:
            mask = causal_mask(torch.ones(R, past + T, dtype=torch.bool, device=ids.device), T)
        return self.head(self.run_layers(self.embed(ids), pos, mask, cache=cache))


# -----------------------------------------------------------------------------
# masks


def additive(mask, dtype):
    """mask (R, T, S) bool -> what is added to scores (R, 1, 1, T, S): 0 where it is True, else the lowest number."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)[:, None, None]


def causal_mask(valid, T: int):
    """valid (R, S) bool, False for padding -> mask (R, T, S): the last T slots look at valid slots up to their own.

    valid = [[0, 1, 1]], T = 2 gives [[[0, 1, 0], [0, 1, 1]]].
    """
    S = valid.size(1)
    causal = torch.ones(T, S, dtype=torch.bool, device=valid.device).tril(S - T)
    return causal & valid[:, None, :]


def packed_mask(segment):
    """segment (R, T) int, which sequence each token belongs to -> block-diagonal causal mask (R, T, T).

    segment = [[1, 1, 2]] gives [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]: the third token starts a sequence of its own. Segment 0
    is what all sequences begin with: [[0, 1, 2]] gives [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]].
    """
    T = segment.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=segment.device).tril()
    seen = segment[:, None, :]
    return causal & ((seen == segment[:, :, None]) | (seen == 0))
