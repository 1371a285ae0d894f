"""lm/kernels.py: the model that it makes faster gives the plain one's logits and gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import swap_in, write_checkpoint

import lm.kernels
from lm.checkpoint import load_model
from lm.kernels import OneBuffer
from lm.packing import Packed, Ragged
from lora import PROJECTIONS, Adapters, LoRAConfig, attached
from model import additive, attention, causal_mask

LORA = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 1, 4)
# A kernel rounds in other places than what it replaces: by how much two results may differ, as a
# share of their size.
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}


def swapped(folder, dtype="float32"):
    model = load_model(folder, "cpu", dtype)
    swap_in(model)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unlike(model, n, config=LORA):
    adapters = Adapters.init(model, config, n, seed=0)
    adapters.flat += 0.1 * draw(*adapters.flat.shape, seed=1)
    return adapters


def ids_for(rows, length):
    return torch.randint(0, 211, (rows, length), generator=torch.Generator().manual_seed(1))


def with_gradients(f, inputs, weight):
    """What f() returns, and the gradients of `weight` times it."""
    leaves = [m.clone().requires_grad_() for m in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def close(a, b, dtype):
    """As a whole: single numbers near zero may differ more."""
    return (a - b).norm() <= CLOSE[str(dtype).removeprefix("torch.")] * b.norm()


# -----------------------------------------------------------------------------
# the whole model


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_swapped_in_model_is_the_plain_one(family_folder, dtype):
    """Logits, and the gradients of two adapters' A and B, on two packed rows each."""
    rows = [(0, 9, 4), (3, 5, 6), (0, 7, 6), (2, 11)]
    ids, results = ids_for(1, sum(map(sum, rows))), []
    pos = torch.cat([torch.arange(sum(row)) for row in rows])[None]
    for model in (load_model(family_folder, "cpu", dtype), swapped(family_folder, dtype)):
        with attached(model, unlike(model, 2)) as lora:
            lora.bind([0, 1], train=True)
            lora.share_out(Ragged([27, 26], "cpu"))
            logits = model.head(model.run_layers(model.embed(ids), pos, Packed(rows, model)))
            F.cross_entropy(logits[0].float(), ids[0].roll(-1)).backward()
            results.append((logits.detach(), lora.gradients()))
    for expected, got in zip(*results):
        assert got.dtype == expected.dtype and expected.norm() > 0
        assert close(got, expected, dtype)


def test_off_the_cpu_nothing_is_swapped_in(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "qwen3")
    model = load_model(folder, "cpu", "float32")
    swap_in(model)
    assert model.attention is lm.kernels.attention
    model = load_model(folder, "cpu", "float32").to("meta")
    swap_in(model)
    assert model.attention is attention


# -----------------------------------------------------------------------------
# attention


SHAPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 6e-2)]


@pytest.mark.parametrize("dtype, tolerance", SHAPES)
def test_attention_in_one_buffer_is_what_autograd_makes_of_it(dtype, tolerance):
    """2 rows, 3 key heads with 2 query heads each, 4 queries, the first of which sees 3 of 6
    places; row 1 has 2 of padding."""
    shapes = ((2, 3, 8, 16), (2, 3, 6, 16), (2, 3, 6, 16), (2, 3, 8, 16))
    *qkv, grad = (draw(*s, seed=n).to(dtype).double() for n, s in enumerate(shapes))
    mask = causal_mask(4, 6).repeat(2, 1, 1)
    mask[1, :, :2] = False

    def plainly(q, k, v):
        scores = (q @ k.mT).view(2, 3, 2, 4, 6) + additive(mask, torch.float64)[:, None, None]
        return scores.softmax(-1).view(2, 3, 8, 6) @ v

    in_one = lambda q, k, v: OneBuffer.apply(q, k, v, additive(mask, dtype))  # noqa: E731
    expected = with_gradients(plainly, qkv, grad)
    got = with_gradients(in_one, [m.to(dtype) for m in qkv], grad.to(dtype))
    got = [m.double() for m in got]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", SHAPES)
def test_the_attention_swapped_in_is_the_plain_one(dtype, tolerance):
    """The same, with the heads where the model has them."""
    shapes = ((2, 4, 6, 16), (2, 6, 3, 16), (2, 6, 3, 16), (2, 4, 6, 16))
    *qkv, grad = (draw(*s, seed=n).to(dtype) for n, s in enumerate(shapes))
    mask = causal_mask(4, 6).repeat(2, 1, 1)
    mask[1, :, :2] = False
    results = []
    for kernel in (lm.kernels.attention, attention):
        attend = lambda q, k, v, kernel=kernel: kernel(q, k, v, additive(mask, dtype))  # noqa: E731
        results.append(with_gradients(attend, qkv, grad))
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)
