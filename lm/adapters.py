"""Reading and writing LoRA adapters as PEFT folders: adapter_config.json and
adapter_model.safetensors."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lm.checkpoint import numbers, unreadable
from lm.files import fingerprint, read_json, warn, write_atomic
from lm.runs import POLICY
from lora import PROJECTIONS, Adapters, LoRAConfig
from model import Transformer


def peft_name(path: str, part: str) -> str:
    """('layers.3.mlp.up_proj', 'A') ->
    'base_model.model.model.layers.3.mlp.up_proj.lora_A.weight'."""
    return f"base_model.model.model.{path}.lora_{part}.weight"


def save_adapter(adapters: Adapters, folder, base: str, row: int = 0, dtype=torch.float32) -> None:
    """Write one adapter as a PEFT folder. Each file is replaced atomically."""
    tensors = {}
    for path in adapters.places:
        for part, m in zip("AB", adapters.views(adapters.flat[row : row + 1], path)):
            tensors[peft_name(path, part)] = m[0].to(dtype).contiguous()
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
    text = json.dumps(config, indent=1)
    folder = Path(folder)
    write_atomic(
        folder / "adapter_model.safetensors",
        lambda p: save_file(tensors, p, metadata={"format": "pt"}),
    )
    write_atomic(folder / "adapter_config.json", lambda p: p.write_text(text, encoding="utf-8"))


# Fields of adapter_config.json that do not change what a trained adapter computes (lora_dropout is
# for training), or that its tensors tell as well.
WITHOUT_EFFECT = """task_type auto_mapping peft_version base_model_name_or_path revision
inference_mode exclude_modules lora_dropout layers_pattern megatron_core loftq_config eva_config
corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying""".split()
# The others of PEFT's ways to begin ("pissa", "olora", ...) change the weights under the adapter.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter_config(path) -> dict:
    """An adapter_config.json of a plain LoRA adapter. Exits with one line that names any field that
    asks for more."""
    config = read_json(path)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise SystemExit(f"error: {path} is not a plain LoRA adapter's (peft_type LORA, bias none)")
    honoured = {"peft_type", "bias", "r", "lora_alpha", "target_modules", "layers_to_transform"}
    for key in config.keys() - honoured - {*WITHOUT_EFFECT}:
        plain = INITS if key == "init_lora_weights" else (None, False, "", [], {})
        if config[key] not in plain:
            raise SystemExit(f"error: {path}: {key} = {config[key]!r:.80} is not supported")
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if key not in config:
            raise SystemExit(f"error: {path}: field {key!r} is missing")
        least = 1 if key == "r" else 0  # alpha 0 is no sense, but PEFT's and ours
        if type(config[key]) not in kinds or not least <= config[key] < 2**31:
            what = "a whole number above 0" if key == "r" else "a number from 0 up"
            raise SystemExit(f"error: {path}: {key} = {config[key]!r:.40} is not {what}")
    for key in ("target_modules", "layers_to_transform"):
        if not isinstance(config.get(key), list | (str if key == "target_modules" else int) | None):
            raise SystemExit(f"error: {path}: {key} = {config[key]!r:.40} is not a list")
        if isinstance(config.get(key), list) and len(config[key]) > 1000:
            raise SystemExit(f"error: {path}: {key} names {len(config[key]):,}, of at most 1,000")
    return config


def aimed_at(config: dict, path: str) -> bool:
    """Does an adapter's config name the module at `path`? (PEFT reads no tensor that it does not;
    a target that is no list, such as "all-linear", is taken at its tensors' word.)"""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if isinstance(targets, list) and not any(f".model.{path}".endswith(f".{t}") for t in targets):
        return False
    return not layers or int(path.split(".")[1]) in layers


# -----------------------------------------------------------------------------
# which base model an adapter belongs to


ROOM = 1 << 30  # bytes that an adapter may take beyond its file's
POLICIES = Path(__file__).resolve().parent.parent / "policies"  # each named as its base's folder


def base_of(model: Transformer) -> str:
    """A fingerprint of the first 256 token embeddings, which no adapter changes: the same for
    float32 and bfloat16, and while a policy is merged."""
    some = model.embed_tokens.weight[:256].to("cpu", torch.bfloat16).contiguous()
    return fingerprint(some.view(torch.int16).numpy().tobytes())


def shipped_policy(model: Transformer, base: str) -> Path | None:
    """The folder in policies/ of the policy for this model, whose own folder is `base`; None if
    there is none."""
    folder = POLICIES / Path(base).resolve().name
    if not (folder / POLICY).is_file():
        return None
    if read_json(folder / POLICY).get("base") == base_of(model):
        return folder
    warn(f"{folder} is not used: it was made for another model of that name")
    return None


def load_adapter(model: Transformer, folder) -> Adapters:
    """Read a PEFT LoRA folder for `model`, as a population of one. Exits with one line if it does
    not fit, or says that it was made for another base."""
    folder = Path(folder)
    shipped = folder / POLICY
    if shipped.is_file() and read_json(shipped).get("base") != base_of(model):
        raise SystemExit(f"error: {folder} is a policy for another base model than this one")
    config = read_adapter_config(folder / "adapter_config.json")
    file, rank = folder / "adapter_model.safetensors", config["r"]
    if not file.is_file():
        raise SystemExit(f"error: cannot read {file}: there is no such file")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as e:
        raise unreadable(file, e) from e
    named = " ".join(tensors)
    layers = sorted({int(n) for n in re.findall(r"\.layers\.(\d{1,6})\.", named)})
    targets = tuple(t for t in PROJECTIONS if f".{t}.lora_" in named)
    if not layers or not targets:
        raise SystemExit(f"error: {file} has no LoRA tensors for {', '.join(PROJECTIONS)}")
    shape = LoRAConfig(rank, config["lora_alpha"], targets, layers[0], layers[-1] + 1)
    adapters = Adapters(model, shape)
    expected = {}  # name -> (module, is it B?, shape)
    for path, (_, a, _, b) in adapters.places.items():
        pair = {peft_name(path, "A"): (path, 0, a), peft_name(path, "B"): (path, 1, b)}
        if pair.keys() & tensors.keys():  # what is not adapted has neither, and stays zero
            expected |= pair
            if not aimed_at(config, path):
                raise SystemExit(
                    f"error: {file}: {path} is adapted, but not by adapter_config.json"
                )
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise SystemExit(
            f"error: {file}: tensor {name} is {'missing' if name in expected else 'unexpected'}"
        )
    for name, (_, _, needed) in expected.items():
        if (shape := tuple(tensors[name].shape)) != needed:
            raise SystemExit(
                f"error: {file}: {name} has shape {shape}, the model and r = {rank} need {needed}"
            )
    # All targets of all layers between the first and the last: most of them may be zero.
    if (size := 4 * adapters.size) > ROOM + 2 * file.stat().st_size:
        told = f"{len(tensors)} tensors are of modules so far apart that they would"
        raise SystemExit(f"error: {file}: its {told} take {size / 1e9:.0f} GB")
    flat = torch.zeros(1, adapters.size)
    for name, (path, part, _) in expected.items():
        values = numbers(file, name, tensors[name], torch.float32, "cpu")
        adapters.views(flat, path)[part][0] = values
    adapters.flat = flat.to(model.device)
    return adapters
