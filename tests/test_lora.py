"""lora.py and lm/adapters.py: attaching, merging, and PEFT's format in both directions."""

import json
from dataclasses import fields

import peft
import pytest
import torch
import transformers
from conftest import dies_at, write_checkpoint
from safetensors.torch import load_file, save_file

from lm.adapters import WITHOUT_EFFECT, load_adapter, peft_name, save_adapter
from lm.checkpoint import load_model
from lm.files import digest
from lora import PROJECTIONS, Adapters, LoRAConfig, attached, merged

ADAPTER = "adapter_model.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"
CONFIGS = [
    LoRAConfig(4, 8.0, tuple(PROJECTIONS), 0, 4),
    LoRAConfig(3, 16.0, ("q_proj", "v_proj"), 2, 4),
    LoRAConfig(2, 1.0, ("down_proj",), 1, 3),
]


def random_adapters(model, config, n=3):
    adapters = Adapters.init(model, config, n, seed=0)
    generator = torch.Generator().manual_seed(1)
    adapters.flat += 0.1 * torch.randn(adapters.flat.shape, generator=generator)
    return adapters


def ids_for(rows=3, length=12):
    return torch.randint(0, 211, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "base", "qwen2")


@pytest.fixture
def model(folder):
    return load_model(folder, "cpu", "float32")


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_fresh_adapters_change_nothing(model, config):
    plain = model(ids_for())
    with attached(model, Adapters.init(model, config, 3, seed=0)):
        assert torch.equal(model(ids_for()), plain)


def test_fresh_adapters_are_drawn_as_in_peft(model):
    """A uniform in +-1/sqrt(in), the same for all candidates; B zero."""
    fresh = Adapters.init(model, CONFIGS[0], 2, seed=0)
    for path in fresh.places:
        a, b = fresh.views(fresh.flat, path)
        most = model.get_submodule(path).in_features ** -0.5
        assert 0.95 * most < a.abs().max() <= most
        assert a.std() == pytest.approx(most / 3**0.5, rel=0.1)
        assert torch.equal(a[0], a[1]) and not b.any()


@torch.no_grad()
def test_each_row_runs_under_its_own_adapter_and_detaching_restores_the_model(model):
    ids, adapters = ids_for(rows=6), random_adapters(model, CONFIGS[0])
    plain, names = model(ids), [n for n, _ in model.named_modules()]
    with attached(model, adapters):
        together = model(ids)
    for p in range(3):
        with attached(model, adapters.pick([p])):
            both = slice(2 * p, 2 * p + 2)
            torch.testing.assert_close(together[both], model(ids[both]), atol=1e-5, rtol=1e-4)
    assert (together - plain).abs().max() > 1e-2
    assert torch.equal(model(ids), plain) and [n for n, _ in model.named_modules()] == names


def test_attaching_twice_is_refused(model):
    adapters = random_adapters(model, CONFIGS[0])
    with attached(model, adapters):
        with pytest.raises(RuntimeError, match="already"), attached(model, adapters):
            pass
        assert any("base" in n for n, _ in model.named_modules())  # the first ones are still there


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_ours(model, folder, config, tmp_path):
    adapters = random_adapters(model, config)
    save_adapter(adapters, tmp_path / "adapter", folder, row=1)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with attached(model, adapters.pick([1])):
        assert (model(ids_for()) - theirs(ids_for()).logits).abs().max() <= 1e-4


def test_an_adapter_without_tensors_has_no_config(model, folder, tmp_path, monkeypatch):
    """A resumed run takes the config for a sign that the adapter was written."""
    dies_at(monkeypatch, "lm.adapters.save_file", 1)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(random_adapters(model, CONFIGS[0]), tmp_path / "adapter", folder)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1, 2], [0, 2], 3])  # 0 and 2: none between
def test_we_load_pefts(model, folder, layers, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": layers}
    config = peft.LoraConfig(r=5, lora_alpha=7, **options)
    theirs = peft.get_peft_model(base, config, adapter_name="default").eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "adapter")
    with attached(model, load_adapter(model, tmp_path / "adapter")):
        assert (model(ids_for()) - theirs(ids_for()).logits).abs().max() <= 1e-4


def test_merging_leaves_the_checkpoint_as_it_is(folder):
    """Its weights may lie in the file, as far as the process can tell."""
    model, before = load_model(folder, "cpu", "float32"), digest(folder / "model.safetensors")
    with merged(model, random_adapters(model, CONFIGS[0]).pick([2])):
        assert digest(folder / "model.safetensors") == before


@torch.no_grad()
def test_merging_equals_attaching_and_unmerging_is_exact(model):
    adapters = random_adapters(model, CONFIGS[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    with attached(model, adapters.pick([2])):
        expected = model(ids_for())
    memory = {p.data_ptr() for p in model.parameters()}
    with pytest.raises(ZeroDivisionError), merged(model, adapters.pick([2])):
        torch.testing.assert_close(model(ids_for()), expected, atol=1e-4, rtol=1e-4)
        _ = 1 / 0  # whatever happens within
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert {p.data_ptr() for p in model.parameters()} == memory


def edit(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    name = peft_name("layers.2.self_attn.q_proj", "A")
    tensors[name] = change(tensors[name])
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / ADAPTER)


def rewrite(folder, text):
    (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize(
    "breakage, message",
    [
        (lambda f: edit(f, use_dora=True), "use_dora = True is not supported"),
        (lambda f: edit(f, use_rslora=True), "use_rslora = True is not supported"),
        (lambda f: edit(f, modules_to_save=["lm_head"]), "modules_to_save = .* is not supported"),
        (lambda f: edit(f, rank_pattern={"q_proj": 8}), "rank_pattern = .* is not supported"),
        (lambda f: edit(f, alpha_pattern={"q_proj": 8}), "alpha_pattern = .* is not supported"),
        (lambda f: edit(f, bias="all"), "not a plain LoRA"),
        (lambda f: edit(f, peft_type="IA3"), "not a plain LoRA"),
        (lambda f: edit(f, r=7), "shape"),
        (lambda f: edit(f, r=10**9), "shape"),
        (lambda f: rewrite(f, '{"peft_type": "LORA"}'), "field 'r' is missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot read"),
        (lambda f: (f / ADAPTER).write_text(LFS_POINTER), "Git LFS pointer"),
        (lambda f: edit_tensors(f, lambda t: None), r"q_proj\.lora_A\.weight is missing"),
        (lambda f: edit_tensors(f, lambda t: t.long()), r"lora_A\.weight holds int64"),
        (lambda f: edit_tensors(f, lambda t: t / 0), r"lora_A\.weight holds infinities or NaN"),
        (
            lambda f: edit(f, layers_to_transform=[3]),
            r"layers\.2\.self_attn\.q_proj is adapted, but",
        ),
        (lambda f: edit(f, target_modules=["v_proj"]), r"q_proj is adapted, but not by"),
        (lambda f: edit(f, target_modules=5), "target_modules = 5 is not a list"),
        (lambda f: (f / "adapter_config.json").unlink(), "cannot read"),
    ],
)
def test_broken_adapter_folders(model, folder, breakage, message, tmp_path):
    save_adapter(random_adapters(model, CONFIGS[1]), tmp_path / "adapter", folder)
    breakage(tmp_path / "adapter")
    with pytest.raises(SystemExit, match=message):
        load_adapter(model, tmp_path / "adapter")


HARMLESS = {  # other than PEFT's own values, and yet the same computation
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "x",
    "lora_dropout": 0.1,
    "init_lora_weights": "gaussian",
    "inference_mode": True,
    "exclude_modules": ["o_proj"],
}
FIELDS = {  # name -> a value that asks for something else
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "new"],
    "r": ["4", 0, -1, 2.0, True, None, [], float("nan")],
    "lora_alpha": ["8", None, {}, float("nan"), float("inf"), -1, True],
    "alora_invocation_tokens": [[1, 2]],
    "use_rslora": [True],
    "fan_in_fan_out": [True],
    "bias": ["all"],
    "a_later_version's": [1],
}
DECIDED = {"peft_type", "target_modules", "layers_to_transform"}  # tested above


@pytest.mark.parametrize("name", sorted({f.name for f in fields(peft.LoraConfig)} | {*FIELDS}))
def test_each_field_of_pefts_config(name, model, folder, tmp_path):
    """Without effect and loaded, or refused by name; one that PEFT adds is refused."""
    save_adapter(random_adapters(model, CONFIGS[1]), tmp_path / "adapter", folder)
    before = (tmp_path / "adapter" / "adapter_config.json").read_text()
    load_adapter(model, tmp_path / "adapter")
    edit(tmp_path / "adapter", **{name: HARMLESS.get(name, json.loads(before).get(name))})
    load_adapter(model, tmp_path / "adapter")
    if name in DECIDED or name in WITHOUT_EFFECT:
        return
    for value in FIELDS.get(name, [True, {"a": 1}, ["a"]]):
        rewrite(tmp_path / "adapter", before)
        edit(tmp_path / "adapter", **{name: value})
        message = r"bias none" if name == "bias" else rf"adapter_config\.json: {name} = "
        with pytest.raises(SystemExit, match=message) as e:
            load_adapter(model, tmp_path / "adapter")
        assert "\n" not in str(e.value)


def test_an_adapter_of_no_effect_is_read_again(model, folder, tmp_path):
    nothing = Adapters.init(model, LoRAConfig(2, 0.0, ("q_proj",), 0, 4), 1, seed=0)
    save_adapter(nothing, tmp_path / "adapter", folder)
    assert load_adapter(model, tmp_path / "adapter").config.alpha == 0.0


def test_an_adapter_that_would_take_much_more_than_its_file(model, folder, tmp_path, monkeypatch):
    save_adapter(random_adapters(model, CONFIGS[1]), tmp_path / "adapter", folder)
    monkeypatch.setattr("lm.adapters.ROOM", -(1 << 20))
    with pytest.raises(SystemExit, match="tensors are of modules so far apart"):
        load_adapter(model, tmp_path / "adapter")


def test_bad_settings_are_refused(model):
    for rank, target, stop in ((0, "q_proj", 4), (2, "q_proj", 5), (2, "qq", 4)):
        with pytest.raises(SystemExit, match="LoRA"):
            Adapters(model, LoRAConfig(rank, 1, (target,), 0, stop))
