"""Tiny random checkpoints of every family, written by transformers, and the real SmolLM2 that `make model` prepares."""

import json
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMOLLM2 = ROOT / "checkpoints" / "smollm2-135m-instruct"

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
FAMILIES = {  # name -> (transformers config class, options)
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "smollm2": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
}


def write_checkpoint(folder, family: str, vocab_size: int = 211, shard: str = "50GB", **options) -> Path:
    """A random model of `family` as a folder: 4 layers, 64 wide, 4 heads, 2 key heads unless the family says otherwise."""
    make, own = FAMILIES[family]
    base = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    base |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(vocab_size=vocab_size, **{**base, **own, **options}))
    with torch.no_grad():  # random norms and biases too, or a swapped one would go unseen
        for name, p in model.named_parameters():
            p.normal_(0, 0.02 if "embed" in name or "lm_head" in name else 0.1)
            p.add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(folder, max_shard_size=shard)
    return Path(folder)


def run_script(monkeypatch, script, folder, *args):
    """script.main() as from the command line, on the model in `folder`, in float32 whatever the machine prefers."""
    command = [f"{script.__name__}.py", "--model", folder, "--device", "cpu", "--dtype", "float32", *args]
    monkeypatch.setattr(sys, "argv", [str(a) for a in command])
    script.main()


def dies_at(monkeypatch, target: str, call: int) -> list:
    """Make "module.name" raise KeyboardInterrupt at its n-th call, as if killed; returns the arguments of every call."""
    module, _, name = target.partition(".")
    real, calls = attrgetter(name)(sys.modules[module]), []

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(target, dies)
    return calls


def watch_weights(monkeypatch, target: str, tiny, seen: list) -> None:
    """Make "module.name" add to `seen`, before it does its work, (name, has its model other weights than `tiny`?)."""
    module, _, name = target.partition(".")
    real = attrgetter(name)(sys.modules[module])

    def watched(*args, **kwargs):
        model = next(a for a in args if isinstance(a, torch.nn.Module))
        seen.append((name, any(not torch.equal(a, b) for a, b in zip(model.parameters(), tiny.parameters(), strict=True))))
        return real(*args, **kwargs)

    monkeypatch.setattr(target, watched)


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny Llama with the real SmolLM2 tokenizer: every script runs on it in seconds."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), "smollm2", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SMOLLM2 / name).read_bytes())
    return folder


@pytest.fixture
def tiny(tiny_folder):
    from checkpoint import load_model

    return load_model(tiny_folder, "cpu", "float32")


@pytest.fixture(scope="session")
def smollm2():
    from checkpoint import load_model

    return load_model(SMOLLM2, "cpu", "float32")


@pytest.fixture(scope="session")
def tok():
    from tokenizer import Tokenizer

    return Tokenizer(SMOLLM2)


@pytest.fixture
def passages_file(tmp_path):
    entries = [
        {
            "title": f"Town {n}",
            "split": "train" if n < 3 else "heldout",
            "passage": f"Town {n} was founded by Person {n} in the year {1800 + n}. It sells red bricks.",
            "questions": [
                {"question": f"Who founded Town {n}?", "answers": [f"Person {n}"], "direction": "forward"},
                {"question": f"What did Person {n} found?", "answers": [f"Town {n}"], "direction": "reversed"},
            ],
        }
        for n in range(5)
    ]
    path = tmp_path / "passages.json"
    path.write_text(json.dumps({"passages": entries}))
    return path


@pytest.fixture
def tasks_file(tmp_path):
    """Two small training tasks, t1 and t2, whose outputs are their inputs, and one for evaluation, t3."""
    grids = [[[a, b], [b, a]] for a, b in ((1, 2), (3, 4), (5, 6), (7, 8))]
    task = {"train": [{"input": g, "output": g} for g in grids[:3]], "test": [{"input": grids[3], "output": grids[3]}]}
    path = tmp_path / "arc.json"
    path.write_text(json.dumps({"train": {"t1": task, "t2": {**task, "train": task["train"][::-1]}}, "eval": {"t3": task}}))
    return path
