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
from lm.ranks import gather_once, share_of, split_layers
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
    if quantised := hf.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise SystemExit(
            f"error: {path}: weights quantised by {method or quantised!s:.60} are not supported; "
            "take the model's bfloat16 or float32 folder"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise SystemExit(f"error: {path}: the rope parameters must be an object, not {rope!r:.40}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layers = hf.get("layer_types") or []
    unsupported = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")) and family != "qwen2",
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "layer_types": not isinstance(layers, list) or {*map(str, layers)} - {"full_attention"},
        "rope_scaling": rope_type not in ("default", "llama3"),
    }
    for key in (k for k, bad in unsupported.items() if bad):
        raise SystemExit(f"error: {path}: {key} = {hf.get(key, rope_type)!r:.80} is not supported")

    def size(key: str, most: int, default=None) -> int:
        """A whole number up to `most`, far above any model's: a slip ends here, not in memory."""
        found = default if default and hf.get(key) is None else hf[key]
        if type(found) is not int or not 1 <= found <= most:
            raise SystemExit(
                f"error: {path}: {key} must be a whole number from 1 to {most}, not {found!r:.40}"
            )
        return found

    def number(spec: dict, key: str, default=None) -> float:
        found = spec.get(key, default) if default else spec[key]
        if type(found) not in (int, float) or not 0 < found < 1e38:
            raise SystemExit(f"error: {path}: {key} must be a number above 0, not {found!r:.40}")
        return float(found)

    try:
        n_layer = size("num_hidden_layers", 1_000)
        n_head, n_embd = size("num_attention_heads", 10_000), size("hidden_size", 1_000_000)
        if rope_type == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            _, low, high = (number(rope, name) for name in names)
            number(rope, "original_max_position_embeddings")
            if low >= high:
                raise SystemExit(f"error: {path}: low_freq_factor must be below high_freq_factor")
        tied = hf.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise SystemExit(f"error: {path}: tie_word_embeddings must be true or false")
        config = Config(
            n_layer=n_layer,
            n_head=n_head,
            n_kv_head=size("num_key_value_heads", 10_000, n_head),
            head_dim=size("head_dim", 10_000, n_embd // n_head),
            n_embd=n_embd,
            n_inner=size("intermediate_size", 1_000_000),
            vocab_size=size("vocab_size", 10_000_000),
            max_seq_len=size("max_position_embeddings", 2**24),
            norm_eps=number(hf, "rms_norm_eps", 1e-6),
            rope_theta=number(rope if rope.get("rope_theta") else hf, "rope_theta", 10000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            tie_embeddings=tied,
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            hf=hf,
        )
    except KeyError as e:
        raise SystemExit(f"error: {path}: field {e} is missing") from e
    if n_head % config.n_kv_head or config.head_dim % 2:
        raise SystemExit(
            f"error: {path}: head_dim = {config.head_dim} must be even, and num_attention_heads = "
            f"{n_head} a multiple of num_key_value_heads = {config.n_kv_head}"
        )
    return config


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


def unreadable(file, e: Exception) -> SystemExit:
    """The one line to raise for a safetensors file that safetensors cannot read."""
    with open(file, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs.github.com/"):
            return SystemExit(
                f"error: {file} is a Git LFS pointer, not the weights: fetch them (git lfs pull)"
            )
    return SystemExit(f"error: {file} is damaged or not a safetensors file: {e}")


def weight_files(folder: Path) -> dict:
    """{tensor name: file} for one safetensors file or for shards listed in
    model.safetensors.index.json."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise SystemExit(f"error: {index}: weight_map must say in which file each tensor is")
        for shard in listed.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise SystemExit(f"error: {index}: {shard!r:.80} is not a file of this folder")
        shards = sorted({*listed.values()})
    names = {}
    for file in (folder / shard for shard in shards):
        if not file.is_file():
            raise SystemExit(f"error: weights {file} are missing")
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    if name in names:
                        raise SystemExit(f"error: {file}: {name} is in {names[name].name} as well")
                    names[name] = file
        except (SafetensorError, OSError) as e:
            raise unreadable(file, e) from e
    return names


def numbers(file, name: str, tensor, dtype, device):
    """`tensor`, of `file`, as `dtype` on `device`. Exits if it does not hold finite numbers."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise SystemExit(f"error: {file}: {name} holds {kind}, not float32, float16 or bfloat16")
    tensor = tensor.to(device=device, dtype=dtype)
    # The least and the largest are NaN if any is; 20 times faster than to ask each number.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise SystemExit(f"error: {file}: {name} holds infinities or NaN")
    return tensor


def read_tensors(files: dict, expected: dict, dtype, device) -> dict:
    """Read the weights `expected` {name: meta tensor} out of `files` {name: file}; of one that is
    shared out, this process's rows. Exits on the first misfit."""
    folder = next(iter(files.values())).parent if files else "the checkpoint"
    for name in sorted(expected.keys() - files.keys()):
        raise SystemExit(f"error: {folder}: tensor {name} is missing")
    for name in sorted(files.keys() - expected.keys()):
        raise SystemExit(
            f"error: {folder}: unexpected tensor {name}; config.json describes a different model"
        )
    tensors = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                if name not in files:
                    continue
                shape, needed = tuple(f.get_slice(name).get_shape()), tuple(expected[name].shape)
                if shape != needed:
                    raise SystemExit(
                        f"error: {file}: {name} has shape {shape}, config.json asks for {needed}"
                    )
                found = numbers(file, name, f.get_tensor(name), dtype, device)
                tensors[name] = share_of(expected[name], found)
    return tensors


def load_model(folder, device="auto", dtype="auto") -> Transformer:
    """The model in a Hugging Face folder, frozen (no parameter requires grad), in eval mode."""
    folder = Path(folder)
    config = read_config(folder)
    device = pick_device(device)
    with torch.device("meta"):
        model = Transformer(config)
    split_layers(model)
    prefix = {
        name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()
    }
    expected = {prefix[name]: p for name, p in model.state_dict().items()}
    files = {n: f for n, f in weight_files(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:  # some files store the tied matrix twice
        files.pop("lm_head.weight", None)
        del expected["lm_head.weight"]
    tensors = read_tensors(files, expected, pick_dtype(device, dtype), device)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict({name: tensors[full] for name, full in prefix.items()}, assign=True)
    gather_once(model.requires_grad_(False))
    return model.eval()


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
        config = dict(model.config.hf)  # transformers 5 says dtype, before it was torch_dtype
        name = "dtype" if "dtype" in config else "torch_dtype"
        config.pop("torch_dtype", None)
        config[name] = str(model.dtype).removeprefix("torch.")
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
