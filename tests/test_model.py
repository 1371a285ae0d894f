"""model.py and lm/checkpoint.py against transformers, and all that can be wrong with a folder."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import LLAMA3_ROPE, ROOT, SMOLLM2, write_checkpoint
from safetensors.torch import load_file, save_file

from lm.checkpoint import load_model, pick_device, read_config, save_model
from model import CachedLayer, additive, causal_mask


def ids_for(model, rows=2, length=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_same_logits_as_transformers(family_folder):
    model = load_model(family_folder, "cpu", "float32")
    ids = ids_for(model)
    assert (model(ids) - reference(family_folder)(ids).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_same_logits_as_transformers_on_smollm2(smollm2, tok):
    """Plain, and as the scripts run it."""
    text = "The bell was cast in 1742 by a potter from Quill Bay; sailors rubbed its rim for luck."
    ids = torch.tensor([tok.encode(text)])
    expected = reference(SMOLLM2)(ids).logits
    for model in (load_model(SMOLLM2, "cpu", "float32"), smollm2):
        assert (model(ids) - expected).abs().max() <= 5e-4  # logits here go up to 30


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france(smollm2, tok):
    ids = tok.chat([{"role": "user", "content": "What is the capital of France?"}])
    cache, answer = [CachedLayer() for _ in smollm2.layers], []
    for _ in range(8):
        read = ids if not answer else answer[-1:]
        answer.append(int(smollm2(torch.tensor([read]), cache)[0, -1].argmax()))
    assert "Paris" in tok.decode(answer)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[17] + [1] * 23, [1, 2, 16, 1, 20]], ids=["tokens", "pieces"])
def test_cached_and_uncached_decoding_agree(family_folder, pieces):
    """A prompt and then token by token, or several tokens at a time."""
    model = load_model(family_folder, "cpu", "float32")
    ids, cache = ids_for(model), [CachedLayer() for _ in model.layers]
    parts = [model(piece, cache) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-4)
    assert {layer.length for layer in cache} == {40}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(tiny, side):
    """An `attend` written here: what a token may look at is the caller's business."""
    ids = ids_for(tiny, rows=1, length=20)
    pad = torch.full((1, 7), 5)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    valid = torch.ones(1, 27, dtype=torch.bool)
    valid[:, :7] = False if side == "left" else True
    valid[:, 20:] = True if side == "left" else False
    pos = (valid.cumsum(1) - 1).clamp(min=0)
    bias = additive(causal_mask(27, 27) & valid[:, None, :], tiny.dtype)
    attend = lambda q, k, v: tiny.attention(q, k, v, bias)  # noqa: E731
    out = tiny.head(tiny.run_layers(tiny.embed(padded), pos, attend))
    torch.testing.assert_close(out[valid][None], tiny(ids), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_any_range_of_layers_with_any_attend(tiny):
    """Stage by stage it is the same, also with an `attend` for each layer."""
    ids, seen = ids_for(tiny), []
    pos = torch.arange(40).expand(2, 40)
    bias = additive(causal_mask(40, 40), tiny.dtype)[None]

    def attend_in(layer):
        return lambda q, k, v: seen.append(layer) or tiny.attention(q, k, v, bias)

    attend = [attend_in(layer) for layer in range(4)]
    below = tiny.run_layers(tiny.embed(ids), pos, attend, stop=2)
    above = tiny.run_layers(below, pos, attend, start=2)
    torch.testing.assert_close(tiny.head(above), tiny(ids), atol=1e-5, rtol=1e-4)
    assert seen == [0, 1, 2, 3]


def test_masks_as_documented():
    assert causal_mask(2, 3).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 2).int().tolist() == [[1, 0], [1, 1]]
    for dtype in (torch.float32, torch.bfloat16):
        bias = additive(causal_mask(2, 2), dtype)
        assert bias.dtype == dtype and bias.tolist() == [[0, torch.finfo(dtype).min], [0, 0]]


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
# folders that do not fit


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def spoil(value):
    """Put `value` into one tensor."""
    return lambda f: edit_tensors(f, lambda t: t["model.norm.weight"].__setitem__(3, value))


def retype(dtype):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    return lambda f: edit_tensors(f, change)


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"
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
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        r"model\.safetensors is damaged",
    ),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"oops"),
        r"model\.safetensors is damaged",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors are missing"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "bad config": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json is not valid JSON",
    ),
    "list config": (lambda f: (f / "config.json").write_text("[]"), r"must hold a JSON object"),
    "architecture": (lambda f: edit_config(f, model_type="gpt2"), r"unknown architecture 'gpt2'"),
    "missing field": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        r"config\.json: field 'num_hidden_layers' is missing",
    ),
    "rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), r"rope_scaling"),
    "window": (
        lambda f: edit_config(f, model_type="qwen2", use_sliding_window=True),
        r"use_sliding_window = True is not supported",
    ),
    "activation": (
        lambda f: edit_config(f, hidden_act="gelu"),
        r"hidden_act = 'gelu' is not supported",
    ),
    "attention bias": (
        lambda f: edit_config(f, attention_bias=True),
        r"attention_bias = True is not supported",
    ),
    "mlp bias": (lambda f: edit_config(f, mlp_bias=True), r"mlp_bias = True is not supported"),
    "lfs pointer": (
        lambda f: (f / "model.safetensors").write_text(LFS_POINTER),
        r"model\.safetensors is a Git LFS pointer",
    ),
    "an index without a map": (lambda f: write_index(f, None), "weight_map must say"),
    "a shard elsewhere": (
        lambda f: write_index(f, {"model.norm.weight": "../other/model.safetensors"}),
        r"'\.\./other/model\.safetensors' is not a file of this folder",
    ),
    "a shard at a path": (
        lambda f: write_index(f, {"model.norm.weight": str(f / "model.safetensors")}),
        "is not a file of this folder",
    ),
    "a shard without a name": (lambda f: write_index(f, {"a": 5}), "5 is not a file of this"),
    "a tensor twice": (
        lambda f: (
            (f / "copy.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
            write_index(f, {"a": "model.safetensors", "b": "copy.safetensors"}),
        ),
        r"is in copy\.safetensors as well",
    ),
    "integers": (retype(torch.int64), r"model\.norm\.weight holds int64"),
    "bools": (retype(torch.bool), r"model\.norm\.weight holds bool"),
    "complex numbers": (retype(torch.complex64), r"model\.norm\.weight holds complex64"),
    "fp8": (retype(torch.float8_e4m3fn), r"model\.norm\.weight holds float8_e4m3fn"),
    "nan": (spoil(float("nan")), r"model\.norm\.weight holds infinities or NaN"),
    "infinity": (spoil(-float("inf")), r"model\.norm\.weight holds infinities or NaN"),
}
CONFIGS = [  # fields of config.json, and what is said of them
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq are"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantised by {'load_in_4bit'"),
    ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers must be .* not 1000000000"),
    ({"num_hidden_layers": -1}, "num_hidden_layers must be .* not -1"),
    ({"hidden_size": 1.5}, "hidden_size must be .* not 1.5"),
    ({"vocab_size": 1e18}, r"vocab_size must be .* not 1e\+18"),
    ({"vocab_size": 10**18}, "vocab_size must be .* not 1000000000000000000"),
    ({"intermediate_size": "96"}, "intermediate_size must be .* not '96'"),
    ({"max_position_embeddings": 10**9}, "max_position_embeddings must be"),
    ({"num_attention_heads": True}, "num_attention_heads must be"),
    ({"num_attention_heads": 0}, "num_attention_heads must be"),
    ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads = 3"),
    ({"head_dim": 15}, "head_dim = 15 must be even"),
    ({"head_dim": []}, r"head_dim must be .* not \[\]"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0, not 'small'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be"),
    ({"rope_parameters": {"rope_theta": 10**60}}, "rope_theta must be"),
    ({"rope_parameters": [1]}, r"rope parameters must be an object, not \[1\]"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "'low_freq_factor' is missing"),
    ({"rope_parameters": LLAMA3_ROPE | {"factor": 0}}, "factor must be"),
    ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4}}, "must be below"),
    (
        {"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if "original" not in k}},
        "'original_max_position_embeddings' is missing",
    ),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_ends_in_one_clear_line(case, tmp_path):
    folder = write_checkpoint(tmp_path / "model", "smollm2")
    breakage, message = BROKEN[case]
    breakage(folder)
    with pytest.raises(SystemExit, match=message) as e:
        load_model(folder, "cpu")
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("fields, message", CONFIGS)
def test_a_config_that_cannot_be_is_refused_at_once(fields, message, tmp_path):
    """Before weights are looked at: there are none."""
    transformers.LlamaConfig(vocab_size=211, num_hidden_layers=4).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(SystemExit, match=message) as e:
        read_config(tmp_path)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("given", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_a_saved_config_names_its_dtype_once(given, tmp_path):
    folder = write_checkpoint(tmp_path / "model", "smollm2")
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if "dtype" not in k} | dict.fromkeys(given, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    save_model(load_model(folder, "cpu", "bfloat16"), tmp_path / "saved", folder)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    name = "dtype" if "dtype" in given else "torch_dtype"
    assert {k: v for k, v in saved.items() if "dtype" in k} == {name: "bfloat16"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.dtype == torch.bfloat16


def test_unknown_device():
    with pytest.raises(SystemExit, match="--device"):
        pick_device("abacus")


def test_what_compiles_is_loaded_only_when_it_is_used():
    """It takes longer than the rest of a start."""
    code = "import sys, train_outer; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
