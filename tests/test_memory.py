"""A memory of documents: what is found for a question, and what is left after a kill or damage."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lm.memory import Document, Memory, Router
from lora import Adapters, LoRAConfig


def document(name: str, **changes) -> Document:
    passages = [{"title": name, "text": f"{name} fell.", "notes": []}]
    about = {"title": name, "sha256": "0", "passages": passages, "learnt": [], "missed": []}
    return Document(**{"name": name, "settings": {}} | about | changes)


@pytest.fixture
def adapters(tiny):
    return Adapters.init(tiny, LoRAConfig(2, 4.0, ("q_proj",), 2, 4), 1, seed=0)


@pytest.fixture
def memory(tmp_path, adapters):
    """With two documents, a and b."""
    memory = Memory(tmp_path / "me")
    memory.open_to_write("base")
    for name in "ab":
        memory.add(document(name), adapters, "checkpoint")
    return memory


# -----------------------------------------------------------------------------
# the router


def test_bm25_by_hand():
    """Two texts of 3 and 5 words; both have "salt", the second twice, and only that "coast"."""
    router = Router(["rolm sells salt".split(), "salt salt on the coast".split()])
    both, one = math.log(1 + 0.5 / 2.5), math.log(1 + 1.5 / 1.5)
    long, short = (1.5 * (0.25 + 0.75 * n / 4) for n in (5, 3))
    expected = [both * 2.5 / (1 + short), both * 2 * 2.5 / (2 + long) + one * 2.5 / (1 + long)]
    assert router.scores("salt coast coast gold".split()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "question, found",
    [("salt", 0), ("coast", 1), ("coast gold", 1), ("coast gold gulls", None), ("gold", None)],
)
def test_a_question_is_about_the_best_text_or_about_none(question, found):
    """The half of its words must stand there; one that no text has counts like one that one has."""
    router = Router(["rolm sells salt".split(), "gates guard the coast".split()])
    assert router.best(question.split(), 0.5) == found


def test_no_texts_and_no_words():
    assert Router([]).best(["salt"], 0.5) is None
    assert Router([["salt"]]).best([], 0.5) is None
    assert Router([["salt"]]).best(["salt"], 0.5) == 0


# -----------------------------------------------------------------------------
# what is kept


def test_what_is_added_is_read_again(memory, adapters, tiny):
    again = Memory(memory.folder, "base")
    assert again.documents == memory.documents and list(again.documents) == ["a", "b"]
    kept = again.adapter(tiny, "a")
    assert torch.equal(kept.flat, adapters.flat.bfloat16().float())


@pytest.mark.parametrize("dies", ["lm.memory.write_json", "lm.memory.save_adapter", "os.replace"])
def test_killed_while_adding_nothing_is_added(dies, memory, adapters, monkeypatch):
    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dies, die)
        # As after kill -9: nothing is tidied up.
        patch.setattr("lm.files.remove", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            memory.add(document("c"), adapters, "checkpoint")
    assert list(Memory(memory.folder).documents) == ["a", "b"]
    memory.add(document("c"), adapters, "checkpoint")
    assert list(Memory(memory.folder).documents) == ["a", "b", "c"]
    assert names_in(memory) == [".lock", "a", "b", "c", "memory.json"]


def names_in(memory) -> list:
    return sorted(p.name for p in memory.folder.iterdir())


def test_killed_while_forgetting_it_is_forgotten(memory, monkeypatch):
    """Its folder's name goes first; what is left is removed when the memory is next written."""

    def die(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lm.memory.remove", die)
        with pytest.raises(KeyboardInterrupt):
            memory.forget("a")
    assert ".a.forgotten" in names_in(memory)
    again = Memory(memory.folder)
    assert list(again.documents) == ["b"]
    again.open_to_write("base")
    assert names_in(memory) == [".lock", "b", "memory.json"]


def test_damaged_documents_are_left_out_and_named(memory, capsys):
    about = memory.folder / "a" / "document.json"
    sound = json.loads(about.read_text())
    passage = {"title": "a", "text": 5, "notes": []}
    for damage, said in (
        ("{", "not valid JSON"),
        (json.dumps({k: v for k, v in sound.items() if k != "missed"}), "'missed' is missing"),
        (json.dumps(sound | {"passages": "x"}), "'passages' is missing or of another kind"),
        (json.dumps(sound | {"passages": [passage]}), "a passage without title, text and notes"),
        (json.dumps(sound | {"more": 1}), "or of a newer version"),
        (json.dumps(sound | {"name": "other"}), "is of another document"),
    ):
        about.write_text(damage)
        assert list(Memory(memory.folder).documents) == ["b"]
        said_lines = capsys.readouterr().err.splitlines()
        assert len(said_lines) == 1 and said_lines[0].startswith("note: a is left out: ")
        assert said in said_lines[0]


def test_a_copy_without_its_adapter_is_one_line(memory, tiny):
    (memory.folder / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="cannot read .*adapter_model.safetensors"):
        Memory(memory.folder).adapter(tiny, "a")


def test_what_is_no_memory_is_refused(memory, tmp_path):
    with pytest.raises(SystemExit, match="was learnt by another base model"):
        Memory(memory.folder, "another")
    (memory.folder / "memory.json").write_text('{"format": 2, "base": "base"}')
    with pytest.raises(SystemExit, match="is a memory of format 2"):
        Memory(memory.folder)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with pytest.raises(SystemExit, match="is no memory: it has no memory.json"):
        Memory(tmp_path / "docs")
    assert Memory(tmp_path / "nothing").documents == {} and not (tmp_path / "nothing").exists()


def test_two_cannot_write_at_once(memory):
    code = f"from lm.memory import Memory\nMemory({str(memory.folder)!r}).open_to_write('base')"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 1 and "another process is at work in" in second.stderr
