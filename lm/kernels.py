"""The same model, faster on a CPU: one call, swap_in(model), and nothing else in the project knows
of it.

Most of what attention writes are the scores; here they have one buffer and not four. What that is
worth stands in docs/SPEED.md. On other devices, and under torch.compile, the plain version runs.
"""

import torch

from model import Transformer


def swap_in(model: Transformer) -> None:
    """Let the model's attention run on this file's version."""
    if model.device.type == "cpu":
        model.attention = attention


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
