"""A memory of documents: what is found for a question, and what is left after a kill or damage."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMOLLM2

from experiments import router as experiment
from lm.memory import ADAPTER, Document, Memory, Router
from lora import Adapters, LoRAConfig
from quiz import general_quiz


def document(name: str, **changes) -> Document:
    passages = [{"title": name, "text": f"{name} fell.", "notes": [], "quiz": []}]
    about = {"title": name, "digest": "0", "passages": passages, "learnt": [], "missed": []}
    return Document(**{"name": name, "settings": {"seed": 0}} | about | changes)


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


def alike(word: str) -> float:
    return 1.0


def test_bm25_by_hand():
    """Two texts of 3 and 5 words; both have "salt", the second twice, and only that "coast"."""
    router = Router(["rolm sells salt".split(), "salt salt on the coast".split()], alike)
    both, one = math.log(1 + 0.5 / 2.5), math.log(1 + 1.5 / 1.5)
    long, short = (1.5 * (0.25 + 0.75 * n / 4) for n in (5, 3))
    expected = [both * 2.5 / (1 + short), both * 2 * 2.5 / (2 + long) + one * 2.5 / (1 + long)]
    assert router.scores("salt coast coast gold".split()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "question, found",
    [
        ("salt", 0),
        ("coast", 1),
        ("coast gold", 1),
        ("coast gates guard gold gulls masts", 1),
        ("coast gold gulls", None),
        ("gold", None),
    ],
)
def test_a_question_is_about_the_best_text_or_about_none(question, found):
    """The half of its words must stand there; one that no text has counts like one that one has."""
    router = Router(["rolm sells salt".split(), "gates guard the coast".split()], alike)
    assert router.best(question.split(), 0.5) == found


def test_the_half_is_the_half():
    """Whatever the sums of rarities are rounded to."""
    for n in range(2, 60):
        texts = [[f"{k}-{word}" for word in "abcdef"] for k in range(n)]
        router = Router(texts, alike)
        for count in range(1, 6):
            question = [*texts[1][:count], *[f"other{k}" for k in range(count)]]
            assert router.best(question, 0.5) == 1


def test_no_texts_and_no_words():
    assert Router([], alike).best(["salt"], 0.5) is None
    assert Router([["salt"]], alike).best([], 0.5) is None
    assert Router([["salt"]], alike).best(["salt"], 0.5) == 0


def test_what_is_common_anywhere_tells_little():
    """Of two words that one text each has, the one of more bits decides."""
    texts = ["rolm capital".split(), "lighthouse coast".split()]
    bits = {"capital": 1.0, "lighthouse": 3.0}
    router = Router(texts, lambda word: bits.get(word, 1.0))
    assert router.scores(["lighthouse"])[1] == pytest.approx(3 * router.scores(["capital"])[0])
    assert router.best("capital lighthouse".split(), 0.5) == 1
    assert router.best("capital japan".split(), 0.5) == 0
    assert (
        Router(texts, lambda word: 3.0 if word == "japan" else 1.0).best(
            "capital japan".split(), 0.3
        )
        is None
    )


# -----------------------------------------------------------------------------
# what is kept


def test_what_is_added_is_read_again(memory, adapters, tiny):
    again = Memory(memory.folder)
    again.refuse_other_base("base")
    assert again.documents == memory.documents and list(again.documents) == ["a", "b"]
    kept = again.adapter(tiny, "a")
    assert torch.equal(kept.flat, adapters.flat.bfloat16().float())


@pytest.mark.parametrize("dies", ["lm.memory.write_json", "lm.memory.save_adapter", "os.replace"])
def test_killed_while_adding_nothing_is_added(dies, memory, adapters, monkeypatch, capsys):
    """Also just before the whole folder gets its name; what is left is no document to be named."""
    replace = os.replace

    def die(*args, **options):
        if dies == "os.replace" and args[1] != memory.folder / "c":
            return replace(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dies, die)
        # As after kill -9: nothing is tidied up.
        patch.setattr("lm.files.remove", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            memory.add(document("c"), adapters, "checkpoint")
    assert list(Memory(memory.folder).documents) == ["a", "b"]
    assert (".c.partial" in names_in(memory)) is (dies != "lm.memory.write_json")
    assert capsys.readouterr().err == ""
    Memory(memory.folder).open_to_write("base")
    assert names_in(memory) == [".lock", "a", "b", "memory.json"]
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
    passage = {"title": "a", "text": 5, "notes": [], "quiz": []}
    asked = {"question": "Who fell?", "answer": "a", "right": 1}
    fine = passage | {"text": "", "quiz": [asked]}

    def quiz_of(*questions) -> str:
        return json.dumps(sound | {"passages": [fine | {"quiz": questions}]})

    about.write_text(quiz_of(asked))
    assert Memory(memory.folder)["a"].passages == [fine]
    for damage, said in (
        ("{", "not valid JSON"),
        (json.dumps({k: v for k, v in sound.items() if k != "missed"}), "'missed' is missing"),
        (json.dumps(sound | {"passages": "x"}), "'passages' is missing or of another kind"),
        (json.dumps(sound | {"passages": [passage]}), "a passage without title, text and notes"),
        (json.dumps(sound | {"more": 1}), "or of a newer version"),
        (json.dumps(sound | {"name": "other"}), "is of another document"),
        (json.dumps(sound | {"passages": [passage | {"text": "", "notes": 5}]}), "a passage w"),
        (json.dumps(sound | {"passages": [passage | {"text": "", "notes": "abc"}]}), "a passage w"),
        (json.dumps(sound | {"learnt": [3]}), "a statement that is no text"),
        (json.dumps(sound | {"settings": {}}), "settings without a seed"),
        (json.dumps(sound | {"settings": {"seed": -1}}), "settings without a seed"),
        (json.dumps(sound | {"settings": {"seed": True}}), "settings without a seed"),
        (json.dumps(sound | {"passages": [fine | {"quiz": 5}]}), "of another form"),
        (quiz_of(asked, 5), "a question that is of another form"),
        (quiz_of(asked | {"more": 1}), "a question that is of another form"),
        (quiz_of(asked | {"right": 2}), "a question that is of another form"),
        (quiz_of(asked | {"answer": 5}), "a question that is of another form"),
    ):
        about.write_text(damage)
        assert list(Memory(memory.folder).documents) == ["b"]
        said_lines = capsys.readouterr().err.splitlines()
        assert len(said_lines) == 1 and said_lines[0].startswith("note: a is left out: ")
        assert said in said_lines[0]
    again = Memory(memory.folder)
    assert again.is_damaged("a") and not again.is_damaged("b") and not again.is_damaged("c")
    again.forget("a")
    assert not Memory(memory.folder).is_damaged("a")
    for name in ("a", "memory.json", ".lock", "../other"):
        with pytest.raises(SystemExit, match="it has b"):
            again.forget(name)


def test_a_link_is_no_document(memory, tmp_path, capsys):
    """What it points to could not be forgotten, so nothing is answered out of it."""
    (memory.folder / "a").rename(tmp_path / "elsewhere")
    (memory.folder / "a").symlink_to(tmp_path / "elsewhere")
    again = Memory(memory.folder)
    assert list(again.documents) == ["b"] and "a is left out: " in capsys.readouterr().err
    again.forget("a")
    assert names_in(again) == [".lock", "b", "memory.json"] and (tmp_path / "elsewhere").is_dir()


def test_what_cannot_be_removed_is_told(memory, monkeypatch):
    monkeypatch.setattr("lm.memory.remove", lambda path: None)
    with pytest.raises(SystemExit, match="a is forgotten, but .*a.forgotten cannot be removed"):
        memory.forget("a")


@pytest.mark.parametrize("file", ["document.json", *ADAPTER])
def test_a_half_copied_document_is_left_out(file, memory, capsys):
    (memory.folder / "a" / file).unlink()
    assert list(Memory(memory.folder).documents) == ["b"] and Memory(memory.folder).is_damaged("a")
    assert f"{file}" in capsys.readouterr().err


def test_what_is_no_memory_is_refused(memory, tmp_path):
    with pytest.raises(SystemExit, match="was learnt by another base model"):
        Memory(memory.folder).refuse_other_base("another")
    for head in ('{"format": 2, "base": "base"}', '{"format": 3, "base": "base", "more": 1}'):
        (memory.folder / "memory.json").write_text(head)
        with pytest.raises(SystemExit, match="is a memory of format .* study its documents again"):
            Memory(memory.folder)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with pytest.raises(SystemExit, match="is no memory: it has no memory.json"):
        Memory(tmp_path / "docs")
    assert Memory(tmp_path / "nothing").documents == {} and not (tmp_path / "nothing").exists()
    with pytest.raises(SystemExit, match="is no memory"):
        Memory(tmp_path / "nothing", must_exist=True)
    with pytest.raises(SystemExit, match="is no memory"):
        Memory(tmp_path / "docs/LOG.md")


def test_an_empty_memory_belongs_to_nobody_yet(tmp_path):
    """As one is whose first study was killed, or all of which was forgotten."""
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / ".DS_Store").touch()
    for base in ("one", "two"):
        memory = Memory(tmp_path / "me")
        memory.refuse_other_base(base)
        memory.open_to_write(base)
        assert json.loads((tmp_path / "me/memory.json").read_text())["base"] == base


def test_a_memory_whose_documents_are_all_damaged_keeps_its_base(memory):
    """They may be mended, and would be another model's."""
    for name in "ab":
        (memory.folder / name / "document.json").rename(memory.folder / name / "kept.json")
    for use in (Memory.refuse_other_base, Memory.open_to_write):
        with pytest.raises(SystemExit, match="was learnt by another base model"):
            use(Memory(memory.folder), "another")
    Memory(memory.folder).open_to_write("base")
    assert json.loads((memory.folder / "memory.json").read_text())["base"] == "base"


def test_two_cannot_write_at_once(memory):
    code = f"from lm.memory import Memory\nMemory({str(memory.folder)!r}).open_to_write('base')"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 1 and "another process is at work in" in second.stderr


def test_the_router_was_not_chosen_by_the_general_quiz():
    asked = experiment.anything()
    assert len(set(asked)) == 69
    assert not {q.question for q in general_quiz().questions} & set(asked)


def test_the_experiment_on_routing(tmp_path, monkeypatch):
    """Questions on a memory's passages find them, others are refused; with a threshold above all
    words, all are."""
    out = tmp_path / "router.json"

    def measure(*flags):
        flags = ["router.py", *flags, "--draws", 3, "--model", SMOLLM2, "--out", out]
        monkeypatch.setattr("sys.argv", list(map(str, flags)))
        experiment.main()
        return json.loads(out.read_text())

    result = measure("--sizes", 2, "--least", 0.3, 1.01)
    usual, all_refused = result["rows"]
    assert (usual["size"], usual["n_found"], usual["n_refused"]) == (2, 6, 8)
    assert usual["found"] > 0.95 and min(usual["refused"], usual["anything"]) > 0.85
    assert (all_refused["found"], all_refused["refused"]) == (0.0, 1.0)
    assert usual["n_anything"] == 69 and all_refused["anything"] == 1.0
    usual, all_refused = result["own_texts"]
    assert usual["size"] == 6 and usual["found"] > 0.7 and all_refused["found"] == 0.0
    with pytest.raises(SystemExit, match="there are 146 passages"):
        measure("--sizes", 999)
