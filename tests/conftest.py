"""Tiny random checkpoints of every family, written by transformers, and the real SmolLM2.

The scripts and the fixtures `tiny` and `smollm2` run on the attention of lm/kernels.py, which is to
make things faster and nothing else. So `pytest --plain`, which leaves it out, passes as well.
"""

import json
import pkgutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lm.flags
import lm.kernels
from lm.checkpoint import load_model
from lm.tokenizer import Tokenizer
from quiz import ask

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "checkpoints" / "smollm2-135m-instruct"
torch.set_num_threads(1)  # the models are tiny: more threads cost more than they bring
# A shell's background job ignores Ctrl-C, and so would the runs that tests, and torture.py, stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
swap_in = lm.kernels.swap_in  # with --plain too: tests/test_kernels.py tests it


def pytest_addoption(parser):
    parser.addoption("--plain", action="store_true", help="leave out lm/kernels.py")


def pytest_configure(config):
    if config.getoption("plain"):
        lm.kernels.swap_in = lm.flags.swap_in = lambda model: None


def pytest_collection_modifyitems(items):
    """The slow ones first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0}
LLAMA3_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32}
FAMILIES = {  # name -> (transformers config class, options)
    "llama2": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "smollm2": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
}


def write_checkpoint(
    folder, family: str, vocab_size: int = 211, shard: str = "50GB", **options
) -> Path:
    """A random model of `family` as a folder: 4 layers, 64 wide, 4 heads, and 2 key heads unless
    the family says otherwise."""
    make, own = FAMILIES[family]
    base = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    base |= {"eos_token_id": 2, "bos_token_id": 1, "vocab_size": vocab_size}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(**base | own | options))
    with torch.no_grad():  # random norms and biases too, or a swapped one would go unseen
        for name, p in model.named_parameters():
            p.normal_(0, 0.02 if "embed" in name or "lm_head" in name else 0.1)
            p.add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(folder, max_shard_size=shard)
    return Path(folder)


def load_swapped(folder, dtype="float32"):
    """The model in `folder` on the attention of the scripts."""
    model = load_model(folder, "cpu", dtype)
    lm.kernels.swap_in(model)
    return model


def one_note(text, style, ended, about):
    """For selfedit.parse: whatever was sampled is one note."""
    return [f"Question: {' '.join(text.split()) or 'x'}\nAnswer: {about or 'x'}"], ""


SUBCOMMANDS = "qa arc study ask list show forget check consolidate export".split()


def run_script(monkeypatch, script, folder, *args):
    """script.main() as from the command line, on the model in `folder`, in float32 whatever the
    machine prefers; without a folder on none. A subcommand, as "qa" or "ask", comes first in
    `args`.
    """
    command = [a for a in args[:1] if a in SUBCOMMANDS]
    model = ["--model", folder, "--device", "cpu", "--dtype", "float32"] if folder else []
    rest = args[len(command) :]
    command = [script.__name__.replace(".", "/") + ".py", *command, *model, *rest]
    monkeypatch.setattr(sys, "argv", [str(a) for a in command])
    script.main()


def dies_at(monkeypatch, target: str, call: int) -> list:
    """Make "module.name" raise KeyboardInterrupt at its n-th call, as if killed; returns the
    arguments of every call."""
    real, calls = pkgutil.resolve_name(target), []

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(target, dies)
    return calls


def watch_weights(monkeypatch, target: str, tiny, seen: list) -> None:
    """Make "module.name" add to `seen`, before it does its work, (name, has its model other weights
    than `tiny`?)."""
    real, name = pkgutil.resolve_name(target), target.partition(".")[2]

    def watched(*args, **kwargs):
        model = next(a for a in args if isinstance(a, torch.nn.Module))
        pairs = zip(model.parameters(), tiny.parameters(), strict=True)
        seen.append((name, any(not torch.equal(a, b) for a, b in pairs)))
        return real(*args, **kwargs)

    monkeypatch.setattr(target, watched)


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def write_tiny(folder) -> Path:
    """A tiny Llama with the real SmolLM2 tokenizer: every script runs on it in seconds."""
    write_checkpoint(folder, "smollm2", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SMOLLM2 / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def student_folder(tiny_folder, tmp_path_factory):
    """A tiny model of another family, whose tokenizer has other ids for some words."""
    folder = write_checkpoint(tmp_path_factory.mktemp("student"), "qwen2", vocab_size=49152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    place = {"".join(m.split() if isinstance(m, str) else m): i for i, m in enumerate(merges)}
    for a, b in (("Ġthe", "Ġof"), ("Ġwas", "Ġis")):
        vocab[a], vocab[b] = vocab[b], vocab[a]
        i, j = place[a], place[b]
        merges[i], merges[j] = merges[j], merges[i]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def tiny(tiny_folder):
    return load_swapped(tiny_folder)


@pytest.fixture
def folder(tmp_path):
    """A random SmolLM2 of 211 words, and no tokenizer."""
    return write_checkpoint(tmp_path / "base", "smollm2")


@pytest.fixture
def model(folder):
    return load_swapped(folder)


@pytest.fixture(scope="session")
def smollm2():
    return load_swapped(SMOLLM2)


@pytest.fixture(scope="session")
def tok():
    return Tokenizer(SMOLLM2)


@pytest.fixture
def brief_answers(monkeypatch):
    """For where it makes no difference that an answer may have 48 tokens."""
    monkeypatch.setattr("reward.ask", partial(ask, max_new=4))


@pytest.fixture
def brief_general(tmp_path, monkeypatch):
    """Short answers, and data/general.json with one text, three questions and two anchors."""
    about = json.loads((ROOT / "data" / "general.json").read_text())
    short = {"texts": ["Bread rises slowly."], "questions": about["questions"][:3]}
    short["anchors"] = ["Rain falls on the sea.", "A hen lays eggs."]
    (tmp_path / "general.json").write_text(json.dumps(short))
    monkeypatch.setattr("quiz.GENERAL", tmp_path / "general.json")
    for name in ("quiz.ask", "reward.ask"):
        monkeypatch.setattr(name, partial(ask, max_new=4))


def write_passages(path) -> Path:
    """Three passages to train on and two held out, each with two questions."""
    entries = []
    for n in range(5):
        founded = f"Town {n} was founded by Person {n} in the year {1800 + n}."
        forward = {"question": f"Who founded Town {n}?", "answers": [f"Person {n}"]}
        reverse = {"question": f"What did Person {n} found?", "answers": [f"Town {n}"]}
        entry = {"title": f"Town {n}", "split": "train" if n < 3 else "heldout"}
        entry["passage"] = f"{founded} It sells red bricks."
        entry["questions"] = [
            {**forward, "direction": "forward"},
            {**reverse, "direction": "reversed"},
        ]
        entries.append(entry)
    path.write_text(json.dumps({"passages": entries}))
    return path


@pytest.fixture
def passages_file(tmp_path):
    return write_passages(tmp_path / "passages.json")


def write_tasks(path) -> Path:
    """Two small training tasks, t1 and t2, and one for evaluation: outputs equal their inputs."""
    grids = [[[a, b], [b, a]] for a, b in ((1, 2), (3, 4), (5, 6), (7, 8))]
    task = {
        "train": [{"input": g, "output": g} for g in grids[:3]],
        "test": [{"input": grids[3], "output": grids[3]}],
    }
    train = {"t1": task, "t2": {**task, "train": task["train"][::-1]}}
    path.write_text(json.dumps({"train": train, "eval": {"t3": task}}))
    return path


@pytest.fixture
def tasks_file(tmp_path):
    return write_tasks(tmp_path / "arc.json")
