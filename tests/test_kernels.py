"""lm/kernels.py: the model that it makes faster gives the plain one's logits and gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import swap_in, write_checkpoint

import lm.kernels
from inner import SFTConfig, inner_update
from lm.checkpoint import load_model, save_model
from lm.kernels import KeptLinear, KeptProduct, OneBuffer, has_kept_products
from lm.packing import Example, Packed, Ragged
from lora import PROJECTIONS, Adapters, LoRAConfig, attached, merged
from model import additive, attention, causal_mask

LORA = LoRAConfig(4, 8.0, tuple(PROJECTIONS), 1, 4)
# A kernel rounds in other places than what it replaces: by how much two results may differ, as a
# share of their size.
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}
DTYPES = [getattr(torch, name) for name in CLOSE]


def swapped(folder, dtype="float32"):
    model = load_model(folder, "cpu", dtype)
    swap_in(model)
    return model


def kept_linear(*shape, dtype=torch.float32, bias=True):
    linear = torch.nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False)
    linear.__class__, linear.kept = KeptLinear, {}
    return linear


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unlike(model, n, config=LORA):
    adapters = Adapters.init(model, config, n, seed=0)
    adapters.flat += 0.1 * draw(*adapters.flat.shape, seed=1)
    return adapters


def ids_for(rows=2, length=40):
    return torch.randint(0, 211, (rows, length), generator=torch.Generator().manual_seed(1))


def with_gradients(f, inputs, weight):
    """What f() returns, and the gradients of `weight` times it."""
    leaves = [m.clone().requires_grad_() for m in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def close(a, b, dtype):
    """As a whole: single numbers near zero may differ more."""
    return (a - b).norm() <= CLOSE[str(dtype).removeprefix("torch.")] * b.norm()


def skip_without_kept_products(dtype):
    if not has_kept_products(dtype):
        pytest.skip(f"this CPU, or this torch, does not multiply {dtype} in oneDNN's layout")


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


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_swapped_in_model_decodes_as_the_plain_one(tmp_path, dtype):
    """Without gradients, on rows of one length: what sampling runs."""
    folder = write_checkpoint(tmp_path / "base", "qwen2")
    models = load_model(folder, "cpu", dtype), swapped(folder, dtype)
    with torch.inference_mode():
        expected, got = (model(ids_for()) for model in models)
    assert close(got, expected, dtype)


def test_the_parts_are_swapped_in_and_the_weights_stay(family_folder):
    model = load_model(family_folder, "cpu", "float32")
    before = {name: p.data_ptr() for name, p in model.state_dict().items()}
    swap_in(model)
    assert {name: p.data_ptr() for name, p in model.state_dict().items()} == before
    assert model.attention is lm.kernels.attention
    kinds = {type(m) for m in model.modules()}
    assert (KeptLinear in kinds) is has_kept_products(torch.float32)
    assert (torch.nn.Linear in kinds) is not has_kept_products(torch.float32)


def test_off_the_cpu_nothing_is_swapped_in(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "qwen3")
    model = load_model(folder, "cpu", "float32").to("meta")
    before = [type(m) for m in model.modules()]
    swap_in(model)
    assert [type(m) for m in model.modules()] == before and model.attention is attention


def test_a_swapped_in_model_is_saved_like_the_plain_one(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "qwen2")
    model = swapped(folder)
    expected = model(ids_for())  # the kept forms are there now
    save_model(model, tmp_path / "saved", folder)
    save_model(load_model(folder, "cpu", "float32"), tmp_path / "plain", folder)
    files = [tmp_path / name / "model.safetensors" for name in ("saved", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(swapped(tmp_path / "saved")(ids_for()), expected)


@torch.no_grad()
def test_a_merge_is_noticed_and_so_is_its_end(tmp_path):
    folder = write_checkpoint(tmp_path / "base", "qwen2")
    plain, fast = load_model(folder, "cpu", "float32"), swapped(folder)
    before = fast(ids_for())
    with merged(plain, unlike(plain, 1)), merged(fast, unlike(fast, 1)):
        torch.testing.assert_close(fast(ids_for()), plain(ids_for()), atol=1e-5, rtol=1e-4)
        assert not close(fast(ids_for()), before, "float32")
    assert torch.equal(fast(ids_for()), before)


def test_training_after_a_merge_runs_on_the_merged_weights(tmp_path):
    """A learner whose weights are a policy's trains like that."""
    folder = write_checkpoint(tmp_path / "base", "smollm2")
    ids, flats = tuple(ids_for(1)[0].tolist()), []
    examples, config = [[Example(ids, (True,) * 40)]], SFTConfig(lr=1e-2, steps=3)
    top = LoRAConfig(4, 8.0, ("q_proj", "v_proj"), 1, 4)
    for model in (load_model(folder, "cpu", "float32"), swapped(folder)):
        for policy in (None, unlike(model, 1)):  # unmerged first: the forms are kept by then
            adapters = Adapters.init(model, top, 1, seed=0)
            with merged(model, policy):
                inner_update(model, adapters, examples, [config], seed=0)
            flats.append(adapters.flat - Adapters.init(model, top, 1, seed=0).flat)
    plain, plain_merged, fast, fast_merged = flats
    for got, expected in ((fast, plain), (fast_merged, plain_merged)):
        assert (got - expected).norm() <= 1e-3 * expected.norm()
    assert (plain_merged - plain).norm() > 0.1 * plain.norm()


# -----------------------------------------------------------------------------
# part by part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_kept_weight_gives_the_same_product_and_gradient_and_follows_the_weight(dtype, bias):
    skip_without_kept_products(dtype)
    linear = kept_linear(48, 80, dtype=dtype, bias=bias)
    x, grad = draw(2, 7, 48).to(dtype), draw(2, 7, 80, seed=1).to(dtype)
    plainly = lambda x: F.linear(x, linear.weight, linear.bias)  # noqa: E731
    trained_through = lambda x: KeptProduct.apply(x, linear)  # noqa: E731
    for seed in (2, 3):  # the second weight takes the place of the first, as in lora.merge
        weight = draw(80, 48, seed=seed).to(dtype)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias:
            linear.bias = torch.nn.Parameter(draw(80, seed=seed).to(dtype), requires_grad=False)
        expected = with_gradients(plainly, [x], grad)
        for f in (linear, trained_through):
            torch.testing.assert_close(with_gradients(f, [x], grad), expected)
        with torch.no_grad():  # what sampling runs
            torch.testing.assert_close(linear(x), plainly(x))
    linear.weight.zero_()  # in place: noticed by its version
    assert linear(x).count_nonzero() == (14 * 80 if bias else 0)
    for f in (linear, trained_through):
        assert with_gradients(f, [x], grad)[1].count_nonzero() == 0


def test_a_form_is_made_once_for_each_weight_and_only_when_needed(monkeypatch):
    skip_without_kept_products(torch.float32)
    linear, x, made = kept_linear(48, 80), draw(2, 7, 48), []
    real = torch.ops.mkldnn._reorder_linear_weight
    watched = lambda w: made.append(tuple(w.shape)) or real(w)  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", watched)
    for _ in range(3):
        linear(x)
    assert made == [(80, 48)]  # without training the transpose is not kept
    linear.weight = torch.nn.Parameter(linear.weight * 2, requires_grad=False)
    linear(x)
    assert made == [(80, 48), (80, 48)]
    for _ in range(3):
        linear(x.clone().requires_grad_()).sum().backward()
    assert made == [(80, 48), (80, 48)]  # nor in float32, where it would not pay


def test_in_float32_training_uses_the_form_of_decoding():
    skip_without_kept_products(torch.float32)
    linear = kept_linear(48, 80)
    linear(draw(2, 7, 48).requires_grad_()).sum().backward()
    assert list(linear.kept) == [False]


def test_in_bfloat16_the_transpose_is_kept_for_training(monkeypatch):
    skip_without_kept_products(torch.bfloat16)
    linear, x = kept_linear(48, 80, dtype=torch.bfloat16), draw(2, 7, 48).bfloat16()
    for _ in range(3):
        linear(x.clone().requires_grad_()).sum().backward()
    assert sorted(linear.kept) == [False, True]


def test_a_weight_that_is_trained_itself_gets_its_gradient():
    linear, x = kept_linear(48, 80), draw(2, 7, 48)
    linear.requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.flatten(0, 1).sum(0).expand(80, 48))
    assert linear.bias.grad.tolist() == [14.0] * 80 and not linear.kept


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
