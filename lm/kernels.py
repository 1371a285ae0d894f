"""The same model, faster on a CPU: one call, swap_in(model), and nothing else in the project knows
of it.

    weights      F.linear brings a weight into the layout that its product wants, in every call:
                 with 50 rows that takes as long as the product. Here oneDNN's form of it is kept,
                 which takes memory once more; in bfloat16 also its transpose's, where it is trained
                 through (in float32 the backward pass is as fast without).
    attention    most of what attention writes are the scores; here they have one buffer and not
                 three.

What each is worth stands in docs/SPEED.md. On other devices, and under torch.compile, the plain
versions run.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Transformer


def swap_in(model: Transformer) -> None:
    """Let the model's projections and attention run on this file's versions. The weights stay the
    same tensors.

    Replace a `weight` to change it afterwards (as lora.merge does): writing through `weight.data`
    would not be noticed.
    """
    if model.device.type != "cpu":
        return
    model.attention = attention
    for module in model.modules():
        if isinstance(module, nn.Linear) and has_kept_products(module.weight.dtype):
            module.__class__, module.kept = KeptLinear, {}


# -----------------------------------------------------------------------------
# weights


@functools.cache
def has_kept_products(dtype) -> bool:
    """Can this CPU, and this build of torch, multiply in oneDNN's layout? In float32 only where
    torch has MKL (x86)."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkl.is_available()


def kept_product(x, form, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, form, bias, "none", [], "")


class KeptLinear(nn.Linear):
    """A linear layer with a frozen weight, in oneDNN's layout."""

    def forward(self, x):
        """x (..., in) -> x W^T + bias (..., out)."""
        if (
            torch.compiler.is_compiling()
            or self.weight.requires_grad
            or self.weight.device.type != "cpu"
        ):
            return F.linear(x, self.weight, self.bias)
        if x.requires_grad and torch.is_grad_enabled():
            return KeptProduct.apply(x, self)
        return kept_product(x, self.form(), self.bias)

    def form(self, transposed: bool = False):
        weight, version, form = self.kept.get(transposed, (None, 0, None))
        if weight is not self.weight or version != weight._version:
            weight = self.weight
            form = torch.ops.mkldnn._reorder_linear_weight(
                weight.T.contiguous() if transposed else weight
            )
            self.kept[transposed] = weight, weight._version, form
        return form


class KeptProduct(torch.autograd.Function):
    """y = x W^T, dx = dy W, on the forms that the layer keeps."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return kept_product(x, linear.form(), linear.bias)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.linear.weight
        if weight.dtype == torch.float32:
            return grad @ weight, None
        return kept_product(grad, ctx.linear.form(transposed=True)), None


# -----------------------------------------------------------------------------
# attention


class OneBuffer(torch.autograd.Function):
    """softmax(q k^T + bias) v, its scores in one buffer.

    With a the softmax:  dv = a^T dy,  da = dy v^T,  ds = a * (da - sum(da * a)),  dq = ds k,  dk =
    ds^T q.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        """q (R, K, G*T, D), already divided by sqrt(D); k and v (R, K, S, D); bias (R, T, S) -> (R,
        K, G*T, D)."""
        att = q @ k.mT  # (R, K, G*T, S)
        # The same memory, as (R, K, G, T, S).
        att.unflatten(2, (-1, bias.size(1))).add_(bias[:, None, None])
        torch.softmax(att, -1, out=att)  # in float32 inside, whatever the dtype
        ctx.save_for_backward(q, k, v, att)
        return att @ v

    @staticmethod
    def backward(ctx, grad):
        q, k, v, att = ctx.saved_tensors
        d = torch.ops.aten._softmax_backward_data(grad @ v.mT, att, -1, att.dtype)  # ds, of da
        return d @ k, d.mT @ q, att.mT @ grad, None


def attention(q, k, v, bias):
    """model.attention: q (R, T, H, D); k, v (R, S, K, D); bias (R, T, S) -> (R, T, H, D)."""
    (R, T, H, D), K = q.shape, k.size(2)
    # (R, K, S, D), copied once here, not in each product
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    # (R, K, G*T, D), scaled where there is least to multiply
    q = q.transpose(1, 2).reshape(R, K, -1, D) * D**-0.5
    y = OneBuffer.apply(q, k, v, bias)
    return y.reshape(R, H, T, D).transpose(1, 2)
