"""model.py and checkpoint.py against transformers, and everything that can be wrong with a folder."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, SMOLLM2, write_checkpoint
from safetensors.torch import load_file, save_file

from cache import KVCache
from checkpoint import load_model, pick_device, save_model
from model import Attend, Linear, Normalize, additive, causal_mask, has_blocked_products, packed_mask
from rows import Forks, Ragged


def ids_for(model, rows=2, length=40):
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_same_logits_as_transformers(family_folder):
    model = load_model(family_folder, "cpu", "float32")
    ids = ids_for(model)
    assert (model(ids) - reference(family_folder)(ids).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_same_logits_as_transformers_on_smollm2(smollm2, tok):
    ids = torch.tensor(
        [tok.encode("The bell was cast in 1742 by a potter from Quill Bay; sailors rubbed its rim for luck.")]
    )
    assert (smollm2(ids) - reference(SMOLLM2)(ids).logits).abs().max() <= 5e-4  # logits here go up to 30


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france(smollm2, tok):
    ids = tok.chat([{"role": "user", "content": "What is the capital of France?"}])
    for _ in range(8):
        ids.append(int(smollm2(torch.tensor([ids]))[0, -1].argmax()))
    assert "Paris" in tok.decode(ids[-8:])


@torch.no_grad()
def test_cached_and_uncached_decoding_agree(family_folder):
    model = load_model(family_folder, "cpu", "float32")
    ids, cache = ids_for(model), KVCache(model, 2, 40)
    parts = [model(ids[:, :17], cache=cache), *(model(ids[:, t : t + 1], cache=cache) for t in range(17, 40))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_fans_out_and_drops_rows(tiny):
    """A common beginning, two prompts that go on from it, two and four samples of them, then only some of the rows."""
    ids = ids_for(tiny, rows=6, length=13)
    ids[:, :5] = ids[0, :5]
    ids[:2, 5:8], ids[2:, 5:8] = ids[0, 5:8], ids[3, 5:8]
    expected, cache = tiny(ids), KVCache(tiny, 1, 5)
    tiny(ids[:1, :5], cache=cache)
    cache.fan_out([2], 3)
    tiny(ids[[0, 3], 5:8], cache=cache)
    cache.fan_out([2, 4], 10)
    got = tiny(ids[:, 8:10], cache=cache)
    torch.testing.assert_close(got, expected[:, 8:10], atol=1e-5, rtol=1e-4)
    for rows, t in (([1, 3, 4, 5], 10), ([3, 5], 11)):  # numbers in the batch as it was first
        cache.keep(rows if t == 10 else [1, 3])
        torch.testing.assert_close(tiny(ids[rows, t : t + 1], cache=cache), expected[rows, t : t + 1], atol=1e-5, rtol=1e-4)
    assert [block.kv.size(2) for block in cache.blocks] == [1, 1, 2] and cache.length == 12


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(tiny, side):
    ids = ids_for(tiny, rows=1, length=20)
    pad = torch.full((1, 7), 5)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    valid = torch.ones(1, 27, dtype=torch.bool)
    valid[:, :7] = False if side == "left" else True
    valid[:, 20:] = True if side == "left" else False
    pos = (valid.cumsum(1) - 1).clamp(min=0)
    out = tiny(padded, pos=pos, mask=causal_mask(valid, 27))
    torch.testing.assert_close(out[valid][None], tiny(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(tiny):
    ids = ids_for(tiny, rows=1, length=20)
    segment = torch.tensor([[1] * 8 + [2] * 12])
    pos = torch.cat([torch.arange(8), torch.arange(12)])[None]
    together = tiny(ids, pos=pos, mask=packed_mask(segment))
    apart = torch.cat([tiny(ids[:, :8]), tiny(ids[:, 8:])], dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_masks_as_documented():
    assert causal_mask(torch.tensor([[False, True, True]]), 2).int().tolist() == [[[0, 1, 0], [0, 1, 1]]]
    assert packed_mask(torch.tensor([[0, 1, 2]])).int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    assert packed_mask(torch.tensor([[1, 1, 2]])).int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]


@torch.no_grad()
def test_sharded_and_saved_folders_load(tmp_path):
    folder = write_checkpoint(tmp_path / "sharded", "qwen2", shard="50KB")
    assert (folder / "model.safetensors.index.json").exists()
    model = load_model(folder, "cpu", "float32")
    save_model(model, tmp_path / "saved", folder)
    again, ids = load_model(tmp_path / "saved", "cpu", "float32"), ids_for(model)
    assert torch.equal(model(ids), again(ids))
    assert (model(ids) - reference(tmp_path / "saved")(ids).logits).abs().max() <= 1e-4
    with pytest.raises(SystemExit, match="exists already"):
        save_model(model, tmp_path / "saved", folder)


# -----------------------------------------------------------------------------
# backward passes written by hand


def test_normalizing_has_autograds_gradient():
    x, grad = (
        torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).mul(3),
        torch.linspace(-1, 2, 240).view(2, 5, 24),
    )
    pairs = []
    for f in (lambda x: Normalize.apply(x, 1e-5), lambda x: torch.nn.functional.rms_norm(x, (24,), eps=1e-5)):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        pairs.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocked_weight_gives_the_same_product_and_gradient_and_follows_the_weight(dtype):
    if not has_blocked_products(dtype):
        pytest.skip(f"this CPU does not multiply {dtype} in blocks")
    linear = Linear(48, 80, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    assert linear.may_block()
    for _ in range(2):  # the second weight takes the place of the first, as in lora.merge
        linear.weight = torch.nn.Parameter(draw(80, 48), requires_grad=False)
        linear.bias = torch.nn.Parameter(draw(80), requires_grad=False)
        x, grad, pairs = draw(2, 7, 48), draw(2, 7, 80), []
        for f in (linear, lambda x: torch.nn.functional.linear(x, linear.weight, linear.bias)):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            pairs.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
        torch.testing.assert_close(*pairs)
    linear.weight.zero_()
    assert torch.equal(linear(x)[0, 0], linear.bias)


def test_forks_as_documented():
    forks = Forks([(1, 2, 3)], "cpu", multiple=1)
    x = torch.arange(1.0, 7)[None, :, None].requires_grad_()
    heads, tails = forks.spread(x)
    assert heads[..., 0].tolist() == [[1]] and tails[..., 0].tolist() == [[2, 3, 2], [4, 5, 6]]
    assert torch.equal(forks.join(heads, tails), x)
    forks.join(heads * 1, tails * 2).sum().backward()
    assert x.grad[0, :, 0].tolist() == [1, 2, 2, 2, 2, 2]
    uneven = Forks([(1, 1, 2)], "cpu", multiple=3)
    heads, tails = uneven.spread(x[:, :4])
    assert torch.autograd.grad(uneven.join(heads.cumsum(1), tails.cumsum(1)).square().sum(), x)[0][0, :, 0].tolist() == [
        *(2, 4, 2 * (3 + 7), 2 * 7),
        *(0, 0),  # and nothing from or to the padding
    ]
    assert forks.masks[1].int().tolist() == [[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]] * 2


def test_forks_put_each_tail_after_its_head():
    forks = Forks([(1, 2, 3), (1, 1)], "cpu", multiple=1)
    heads, tails = (m[..., None].requires_grad_() for m in (torch.tensor([[1.0], [2.0]]), torch.arange(10.0, 19).view(3, 3)))
    both = forks.after(heads, tails)
    assert both[..., 0].tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [2, 16, 17, 18]]
    (both * torch.tensor([1.0, 10.0, 100.0])[:, None, None]).sum().backward()
    assert heads.grad[..., 0].tolist() == [[11], [100]] and tails.grad[:, 0, 0].tolist() == [1, 10, 100]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 6e-2)])
def test_attention_by_hand_is_what_autograd_makes_of_it(dtype, tolerance):
    """2 rows, 3 key heads with 2 query heads each, 4 queries, the first of which sees 3 of 6 slots; row 1 has 2 of
    padding."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8, 16), (2, 3, 6, 16), (2, 3, 6, 16), (2, 3, 8, 16))
    q, k, v, grad = (torch.randn(s, generator=generator).to(dtype).double() for s in shapes)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    mask = causal_mask(valid, 4)

    def plain(q, k, v, bias):
        scores = (q @ k.mT).view(2, 3, 2, 4, 6) + bias
        return scores.softmax(-1).view(2, 3, 8, 6) @ v

    pairs = []
    for attend, kind in ((plain, torch.float64), (Attend.apply, dtype)):
        leaves = [m.to(kind, copy=True).requires_grad_() for m in (q, k, v)]
        y = attend(*leaves, additive(mask, kind))
        pairs.append([m.double() for m in (y, *torch.autograd.grad(y, leaves, grad.to(kind)))])
    torch.testing.assert_close(*pairs, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_forks_see_what_their_sequences_see_alone(tiny):
    """Two rows: sequences of 2 and 7 tokens after a head of 3, and one of 5 without a head."""
    ids, lengths = ids_for(tiny, rows=1, length=17), [(3, 2, 7), (0, 5)]
    head, *tails, other = ids[0].split([3, 2, 7, 5])
    pos = torch.tensor([[0, 1, 2, 3, 4, *range(3, 10), *range(5)]])
    forks = Forks(lengths, "cpu")
    together = tiny.head(tiny.run_layers(tiny.embed(ids), pos, forks.masks, rows=forks))[0].split([3, 2, 7, 5])
    for tail, logits in zip(tails, together[1:3]):
        torch.testing.assert_close(logits, tiny(torch.cat([head, tail])[None])[0, 3:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[0], tiny(head[None])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[3], tiny(other[None])[0], atol=1e-5, rtol=1e-4)


def test_ragged_rows_as_documented():
    ragged = Ragged([2, 3], "cpu", multiple=1)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)[..., None]  # (1, N, 1)
    rows = ragged.spread(x)
    assert rows[..., 0].tolist() == [[1, 2, 1], [3, 4, 5]] and torch.equal(ragged.join(rows), x)
    assert Ragged([2, 3], "cpu", multiple=8).shape == (2, 8)


def test_padding_passes_no_gradient_on():
    """A loss that weighs every slot, padding too, reaches the tokens through their own slots only."""
    ragged, x = Ragged([2, 3, 1], "cpu"), torch.arange(6.0).view(1, 6, 1).requires_grad_()
    ragged.join(ragged.spread(x).cumsum(1).square()).sum().backward()
    plain = torch.arange(6.0).requires_grad_()
    sum(part.cumsum(0).square().sum() for part in plain.split([2, 3, 1])).backward()
    torch.testing.assert_close(x.grad.flatten(), plain.grad)


@torch.no_grad()
def test_tokens_end_to_end_give_the_states_of_padded_rows(family_folder):
    model = load_model(family_folder, "cpu", "float32")
    rows = [torch.arange(n) * 7 % 211 for n in (5, 12, 9)]
    ragged, ids = Ragged([5, 12, 9], "cpu"), torch.cat(rows)[None]
    pos = torch.cat([torch.arange(len(r)) for r in rows])[None]
    mask = packed_mask(ragged.spread(torch.zeros_like(ids)))
    together = model.head(model.run_layers(model.embed(ids), pos, mask, rows=ragged))[0]
    torch.testing.assert_close(together, torch.cat([model(r[None])[0] for r in rows]), atol=1e-4, rtol=1e-4)


# -----------------------------------------------------------------------------
# folders that do not fit


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        r"tensor model\.layers\.2\.mlp\.up_proj\.weight is missing",
    ),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.9.oops": torch.zeros(2)})),
        r"unexpected tensor model\.layers\.9\.oops",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(65)})),
        r"model\.norm\.weight has shape \(65,\), config\.json asks for \(64,\)",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"model\.safetensors is damaged",
    ),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"oops"), r"model\.safetensors is damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors are missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), r"must hold a JSON object"),
    "architecture": (lambda f: edit_config(f, model_type="gpt2"), r"unknown architecture 'gpt2'"),
    "missing field": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        r"config\.json: field 'num_hidden_layers' is missing",
    ),
    "rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), r"rope_scaling"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_ends_in_one_clear_line(case, tmp_path):
    folder = write_checkpoint(tmp_path / "model", "smollm2")
    breakage, message = BROKEN[case]
    breakage(folder)
    with pytest.raises(SystemExit, match=message) as e:
        load_model(folder, "cpu")
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_unknown_device():
    with pytest.raises(SystemExit, match="--device"):
        pick_device("abacus")


def test_what_compiles_is_loaded_only_when_it_is_used():
    """It takes longer than the rest of a start."""
    code = "import sys, quiz; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
