"""Reading and writing LoRA adapters as PEFT folders: adapter_config.json and
adapter_model.safetensors."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lm.files import read_json, write_atomic
from lora import PROJECTIONS, Adapters, LoRAConfig
from model import Transformer


def peft_name(path: str, part: str) -> str:
    """('layers.3.mlp.up_proj', 'A') ->
    'base_model.model.model.layers.3.mlp.up_proj.lora_A.weight'."""
    return f"base_model.model.model.{path}.lora_{part}.weight"


def save_adapter(adapters: Adapters, folder, base: str, row: int = 0) -> None:
    """Write one adapter as a PEFT folder. Each file is replaced atomically."""
    tensors = {}
    for path in adapters.places:
        a, b = adapters.views(adapters.flat[row : row + 1], path)
        tensors[peft_name(path, "A")], tensors[peft_name(path, "B")] = (
            a[0].contiguous(),
            b[0].contiguous(),
        )
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


def load_adapter(model: Transformer, folder) -> Adapters:
    """Read a PEFT LoRA folder for `model`, as a population of one. Exits with one line if it does
    not fit."""
    folder = Path(folder)
    config, file = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    for key in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise SystemExit(f"error: {folder}: {key} = {config[key]!r} is not supported")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise SystemExit(f"error: {folder} is not a plain LoRA adapter (peft_type LORA, bias none)")
    try:
        tensors, rank, alpha = load_file(file), config["r"], config["lora_alpha"]
    except (SafetensorError, OSError) as e:
        raise SystemExit(f"error: cannot read {file}: {e}") from e
    except KeyError as e:
        raise SystemExit(f"error: {folder / 'adapter_config.json'}: field {e} is missing") from e
    layers = sorted({int(n) for name in tensors for n in re.findall(r"\.layers\.(\d+)\.", name)})
    named = " ".join(tensors)
    targets = tuple(t for t in PROJECTIONS if f".{t}.lora_" in named)
    if not layers or not targets:
        raise SystemExit(f"error: {file} has no LoRA tensors for {', '.join(PROJECTIONS)}")
    adapters = Adapters(model, LoRAConfig(rank, alpha, targets, layers[0], layers[-1] + 1))
    flat = torch.zeros(1, adapters.size)
    expected = {}
    for path in adapters.places:
        a, b = adapters.views(flat, path)
        expected |= {peft_name(path, "A"): a, peft_name(path, "B"): b}
    for name in expected.keys() ^ tensors.keys():
        raise SystemExit(
            f"error: {file}: tensor {name} is {'missing' if name in expected else 'unexpected'}"
        )
    for name, view in expected.items():
        shape, needed = tuple(tensors[name].shape), tuple(view.shape[1:])
        if shape != needed:
            raise SystemExit(f"error: {file}: {name} has shape {shape}, the model needs {needed}")
        view[0] = tensors[name]
    adapters.flat = flat.to(model.device)
    return adapters
