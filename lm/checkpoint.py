"""Reading and writing models as Hugging Face folders: config.json and model.safetensors, sharded or
not.

Whatever does not fit (an architecture that model.py does not know, a missing, extra or mis-shaped
tensor, a truncated file) ends in one line that names the tensor or the file.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lm.files import read_json, write_atomic
from model import Config, Transformer


def read_config(folder) -> Config:
    """Read folder/config.json. Exits with one line if the architecture or one of its options is not
    supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise SystemExit(
            f"error: {folder} is not a model folder: no config.json (run `make model`, or give "
            "--model PATH)"
        )
    hf = read_json(path)
    family = hf.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise SystemExit(
            f"error: {path}: unknown architecture {family!r}; supported: llama, qwen2, qwen3"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")) and family != "qwen2",
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "rope_scaling": rope_type not in ("default", "llama3"),
    }
    for key in (k for k, bad in unsupported.items() if bad):
        raise SystemExit(f"error: {path}: {key} = {hf.get(key, rope_type)!r} is not supported")
    try:
        return Config(
            n_layer=hf["num_hidden_layers"],
            n_head=hf["num_attention_heads"],
            n_kv_head=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            n_embd=hf["hidden_size"],
            n_inner=hf["intermediate_size"],
            vocab_size=hf["vocab_size"],
            max_seq_len=hf["max_position_embeddings"],
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            tie_embeddings=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            hf=hf,
        )
    except KeyError as e:
        raise SystemExit(f"error: {path}: field {e} is missing") from e


def pick_device(name: str = "auto") -> torch.device:
    """'auto' takes CUDA, else MPS, else the CPU. Exits if the named device is not there."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise SystemExit(f"error: --device {name}: {str(e).splitlines()[0]}") from e


def pick_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """'auto' takes bfloat16 where the hardware multiplies it fast, else float32 (a CPU without bf16
    units is 10x slower)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = any(has.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def weight_files(folder: Path) -> dict:
    """{tensor name: file} for one safetensors file or for shards listed in
    model.safetensors.index.json."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / f for f in read_json(index).get("weight_map", {}).values()})
    else:
        files = [folder / "model.safetensors"]
    names = {}
    for file in files:
        if not file.is_file():
            raise SystemExit(f"error: weights {file} are missing")
        try:
            with safe_open(file, framework="pt") as f:
                names |= dict.fromkeys(f.keys(), file)
        except (SafetensorError, OSError) as e:
            raise SystemExit(f"error: {file} is damaged or not a safetensors file: {e}") from e
    return names


def read_tensors(files: dict, expected: dict, dtype, device) -> dict:
    """Read the tensors named in `expected` {name: shape} out of `files` {name: file}. Exits on the
    first misfit."""
    folder = next(iter(files.values())).parent if files else "the checkpoint"
    for name in expected.keys() - files.keys():
        raise SystemExit(f"error: {folder}: tensor {name} is missing")
    for name in files.keys() - expected.keys():
        raise SystemExit(
            f"error: {folder}: unexpected tensor {name}; config.json describes a different model"
        )
    tensors = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                if name not in files:
                    continue
                if (shape := tuple(f.get_slice(name).get_shape())) != expected[name]:
                    raise SystemExit(
                        f"error: {file}: {name} has shape {shape}, config.json asks for "
                        f"{expected[name]}"
                    )
                tensors[name] = f.get_tensor(name).to(device=device, dtype=dtype)
    return tensors


def load_model(folder, device="auto", dtype="auto") -> Transformer:
    """The model in a Hugging Face folder, frozen (no parameter requires grad), in eval mode."""
    folder = Path(folder)
    config = read_config(folder)
    device = pick_device(device)
    with torch.device("meta"):
        model = Transformer(config)
    prefix = {
        name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()
    }
    expected = {prefix[name]: tuple(p.shape) for name, p in model.state_dict().items()}
    files = {n: f for n, f in weight_files(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:  # some files store the tied matrix twice
        files.pop("lm_head.weight", None)
        del expected["lm_head.weight"]
    tensors = read_tensors(files, expected, pick_dtype(device, dtype), device)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict({name: tensors[full] for name, full in prefix.items()}, assign=True)
    return model.requires_grad_(False).eval()


def save_model(model: Transformer, folder, source) -> None:
    """Write `model` as a Hugging Face folder; the tokenizer's files are copied from folder
    `source`. Atomic."""
    tensors = {
        n if n.startswith("lm_head") else f"model.{n}": p.contiguous()
        for n, p in model.state_dict().items()
    }
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    if Path(folder).exists():
        raise SystemExit(f"error: {folder} exists already; choose another folder")

    def write(scratch: Path):
        scratch.mkdir()
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        config = {**model.config.hf, "torch_dtype": str(model.dtype).removeprefix("torch.")}
        (scratch / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ):
            if (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, scratch / name)

    write_atomic(folder, write)
