"""Self-edits on passages that say how they are to be studied: --settings."""

import json
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script

import selfedit
import train_outer
from data.qa import Passage, Question
from inner import inner_update
from lm.files import read_jsonl
from lora import PROJECTIONS, Adapters, LoRAConfig
from quiz import ask
from reward import credit, edit_candidate, select, settings_candidate
from selfedit import (
    DATA,
    KEYS,
    MAX_EPOCHS,
    TOOLS,
    WORKED,
    Part,
    SelfEdit,
    note_prompts,
    note_reader,
    parse_settings,
    settings_of,
    settings_prompts,
)

pytestmark = pytest.mark.usefixtures("brief_answers")

TEXT = "Ada Quell cast the bell. Bo Larn rang it in Rolm."
PASSAGE = Passage("p", "Rolm", TEXT, ())
GOOD = settings_of(["passage", "questions"], 2, 1, 3, "answers", 0.004, 8)
ARGS = SimpleNamespace(
    style="questions",
    shots=1,
    settings=True,
    budget=10_000,
    row_len=256,
    lr=0.004,
    epochs=8,
    steps=16,
)


def saying(**changes) -> str:
    return json.dumps(GOOD | changes)


def test_what_is_read():
    assert parse_settings(saying(), True) == (GOOD, "")
    assert parse_settings(f"Sure:\n```json\n{saying()}\n``` That is all", False) == (GOOD, "")
    for _, _, settings in WORKED:
        assert parse_settings(json.dumps(settings), True) == (settings, "")
    most = settings_of(list(DATA), *(most for _, most in TOOLS.values()), "all", 0.03, MAX_EPOCHS)
    assert parse_settings(json.dumps(most), True) == (most, "")
    assert parse_settings(saying(data=[], orders=0, masked=0), True)[1] == ""  # clozes are left
    assert parse_settings(saying(learning_rate=1e-5, epochs=1), True)[1] == ""


@pytest.mark.parametrize(
    "text, flaw",
    [
        ("  \n", "empty"),
        ("Sure!", "malformed"),
        (saying()[:-1], "malformed"),
        ("[" + saying(), ""),  # what is around an object is ignored
        ('{"a":' * 100_000, "malformed"),
        (saying(data={}), "malformed"),
        (saying(data=["passage", "passage"]), "malformed"),
        (saying(data=["songs"]), "malformed"),
        (saying(data=[["passage"]]), "malformed"),
        (saying(loss="none"), "malformed"),
        (saying(loss=["all"]), "malformed"),
        (saying(sing=3), "malformed"),  # a tool that is not there
        (saying().replace('"masked"', '"orders"'), "malformed"),  # a key twice, and one missing
        (saying()[:-1] + ', "epochs": 3}', "malformed"),
        (saying(epochs=2.0), "malformed"),
        (saying(epochs=True), "malformed"),
        (saying(orders=None), "malformed"),
        (saying(learning_rate="fast"), "malformed"),
        (saying(learning_rate=True), "malformed"),
        (saying().replace("0.004", "1" * 5000), "malformed"),
        (saying(learning_rate=float("nan")), "out of bounds"),
        (saying(learning_rate=float("inf")), "out of bounds"),
        (saying(learning_rate=-0.004), "out of bounds"),
        (saying(learning_rate=9e-6), "out of bounds"),
        (saying(learning_rate=0.031), "out of bounds"),
        (saying(epochs=0), "out of bounds"),
        (saying(epochs=MAX_EPOCHS + 1), "out of bounds"),
        (saying(epochs=1_000_000), "out of bounds"),
        (saying(orders=-1), "out of bounds"),
        (saying(orders=9), "out of bounds"),
        (saying(masked=9), "out of bounds"),
        (saying(clozes=4), "out of bounds"),
        (saying(data=[], orders=0, masked=0, clozes=0), "out of bounds"),
    ],
)
def test_what_is_a_flaw(text, flaw):
    settings, found = parse_settings(text, True)
    assert found == flaw and bool(settings) is (not flaw)


def test_an_endless_one_takes_no_longer_than_its_length():
    took = []
    for length in (100_000, 800_000):
        start = time.perf_counter()
        assert parse_settings("{" + '"a": 1, ' * length, False) == ({}, "endless")
        took.append(time.perf_counter() - start)
    assert took[1] < 20 * took[0] + 0.1  # a square would be 64 times


def test_the_prompt_shows_the_range(tok):
    [ids] = settings_prompts(tok, "Rolm", TEXT)
    shown = tok.decode(ids)
    assert shown.count('"learning_rate"') == len(WORKED) == 6
    assert shown.rstrip().endswith("assistant") and TEXT in shown
    rates = [settings["learning_rate"] for _, _, settings in WORKED]
    epochs = [settings["epochs"] for _, _, settings in WORKED]
    assert (min(rates), max(rates)) == (0.002, 0.012) and (min(epochs), max(epochs)) == (3, 20)
    told = {name for _, _, settings in WORKED for name in settings["data"]}
    assert told == set(DATA) and {s["loss"] for _, _, s in WORKED} == {"all", "answers"}
    for tool in TOOLS:
        assert {0} < {settings[tool] for _, _, settings in WORKED}
    [ids] = settings_prompts(tok, "Rolm", TEXT, shots=0)
    form = tok.decode(ids)
    assert form.count('"learning_rate"') == 1 and all(f'"{key}"' in form for key in KEYS)
    assert all(f'"{name}"' in form for name in DATA)


def test_a_self_edit_has_settings_and_then_notes(tok):
    passage = Passage("p", "Rolm", TEXT, ())
    prompts = note_prompts(tok, [passage], ARGS)["p"]
    assert len(prompts) == 1 + 2 + 1 + 1 and prompts[0] == settings_prompts(tok, "Rolm", TEXT)[0]

    def read(style, *texts):
        return note_reader([passage], style, 1)("p", [(text, True) for text in texts])

    e = read("settings", saying())
    assert (e.flaw, e.settings) == ("", GOOD)
    assert json.loads(e.parts[0].target) == GOOD and e.parts[0].notes == []
    e = read("settings", "{")
    assert e.flaw == "malformed" and e.settings == {} and e.parts[0].target == ""
    e = read("questions", "Who cast it?", "Who rang it?")
    assert [part.style for part in e.parts] == ["questions"] * 2
    assert e.parts[1].notes == ["Question: Who rang it?\nAnswer: Bo Larn rang it in Rolm."]
    [part] = read("rewrite", "Ada cast it.\n\nYes.").parts
    assert part.notes == ["Ada cast it.", "Yes."] and part.style == "rewrite"


SAID = [["questions"], ["passage"], ["rewritings", "questions"], None]  # None: malformed
WRITTEN = [[0, 1, 2], [0], [0, 1, 2, 4], [0]]  # which parts of each are sampled


def write(tiny, tok, log=None, copies=4, given=None):
    args = SimpleNamespace(**vars(ARGS), max_new=5, temperature=1.0, top_p=1.0)
    two = [PASSAGE, Passage("q", "Tarn", "Mills grind. Oats fall.", ())]
    return selfedit.write_self_edits(tiny, tok, two, copies, args, 1, log, given=given)


def say(monkeypatch):
    """Every passage's self-edits say SAID, in turns."""
    turns = iter(SAID * 9)

    def said(text, ended):
        data = next(turns)
        return ({}, "malformed") if data is None else (GOOD | {"data": data}, "")

    monkeypatch.setattr(selfedit, "parse_settings", said)


def test_only_notes_that_are_asked_for_are_written(tiny, tok, tmp_path, monkeypatch):
    say(monkeypatch)
    edits = write(tiny, tok, tmp_path / "sampled.jsonl")
    assert [e.passage for e in edits] == ["p"] * 4 + ["q"] * 4
    for e, parts in zip(edits, WRITTEN * 2):
        assert [k for k, part in enumerate(e.parts) if part.text] == parts
        styles = ["settings", "questions", "questions", "implications", "rewrite"]
        assert [part.style for part in e.parts] == styles
    assert [e.flaw for e in edits] == ["", "", "", "malformed"] * 2
    logs = sorted(path.name for path in tmp_path.iterdir())
    assert logs == [f"sampled-{style}.jsonl" for style in ("questions", "rewrite", "settings")]
    # Whoever asks gets the prompt's next copy: the texts are those that all would have got.
    notes = write(tiny, tok, copies=2, given={"data": ["questions"]})
    texts = [(e.parts[1].text, e.parts[2].text) for e in edits]
    assert texts[::2] == [(e.parts[1].text, e.parts[2].text) for e in notes]
    assert len(set(texts)) == 5


def test_what_is_written_is_not_written_again(tiny, tok, tmp_path, monkeypatch):
    say(monkeypatch)
    log = tmp_path / "sampled.jsonl"
    edits = write(tiny, tok, log)
    path = tmp_path / "sampled-rewrite.jsonl"
    kept = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(selfedit, "parse_settings", None)  # never called
    assert write(tiny, tok, log) == edits and path.read_bytes() == kept
    monkeypatch.setattr(selfedit, "generate", None)
    assert write(tiny, tok, log) == edits


def test_each_style_has_its_own_length(tiny, tok, monkeypatch):
    lengths = {}

    def generate(model, prompts, max_new, *_, copies, **__):
        kind = "settings" if "masked" in tok.decode(prompts[0]) else len(prompts)
        lengths[kind] = max_new
        return [tok.encode(saying(data=["questions", "facts"])) for _ in range(sum(copies))]

    monkeypatch.setattr(selfedit, "generate", generate)
    args = SimpleNamespace(**vars(ARGS), max_new=0, temperature=1.0, top_p=1.0)
    assert selfedit.settle(args).max_new == 320
    for most in (320, 100, 600):
        args.max_new = most
        selfedit.write_self_edits(tiny, tok, [PASSAGE], 2, args, 0)
        # Two prompts ask about a sentence each, one for facts.
        assert lengths == {"settings": min(most, 128), 2: 80, 1: min(most, 320)}
    alone = SimpleNamespace(style="rewrite", max_new=0)
    assert selfedit.settle(alone).max_new == 320
    alone = SimpleNamespace(style="questions", max_new=0)
    assert selfedit.settle(alone).max_new == 80


def test_a_prompt_of_any_style_that_is_too_long_is_refused_at_once(tiny, tok, monkeypatch):
    """Also of a style that nobody asked for yet."""
    monkeypatch.setattr(selfedit, "generate", None)
    long = [1] * (tiny.config.max_seq_len - 4)
    monkeypatch.setattr(selfedit, "edit_prompts", lambda *_: [long])
    monkeypatch.setattr(selfedit, "settings_prompts", lambda *_: [[1]])
    with pytest.raises(SystemExit, match="'p' makes a prompt of .* tokens; with --max-new 5 that"):
        write(tiny, tok)
    long.pop()
    with pytest.raises(TypeError):  # that is None, called
        write(tiny, tok)


def test_given_settings_are_not_asked_for(tiny, tok, monkeypatch):
    monkeypatch.setattr(selfedit, "parse_settings", None)  # never called
    given = GOOD | {"data": ["facts"]}
    edits = write(tiny, tok, copies=2, given=given)
    assert [e.settings for e in edits] == [given] * 4 and [e.flaw for e in edits] == [""] * 4
    for e in edits:
        assert [bool(part.text) for part in e.parts] == [False, False, False, True, False]
    for e in write(tiny, tok, given={"data": []}):
        assert not any(part.text for part in e.parts)


def parts():
    note = "Question: Who rang it?\nAnswer: Bo Larn rang it in Rolm."
    return [
        Part("{}", style="settings"),
        Part("x", [note], style="questions"),
        Part("x", ["Ada Quell lived.", "Bo rang."], style="implications"),
        Part("x", ["Bells were cast."], style="rewrite"),
    ]


def studied_as(tok, settings, args=ARGS):
    c, flaw = settings_candidate(
        tok, 0, PASSAGE, SelfEdit("p", parts(), settings=settings), args, 0
    )
    assert flaw == ""
    return c


def texts_of(tok, c):
    return [tok.decode(list(e.ids)) for e in c.examples]


@pytest.mark.parametrize(
    "data, expected",
    [
        (["passage"], [TEXT]),
        (["questions"], ["Who rang it?"]),
        (["facts"], ["Ada Quell lived.", "Bo rang."]),
        (["rewritings", "passage"], [TEXT, "Bells were cast."]),
    ],
)
def test_the_data_that_is_asked_for_is_studied(tok, data, expected):
    settings = settings_of(data, 0, 0, 0, "answers", 0.002, 3)
    c = studied_as(tok, settings)
    found = texts_of(tok, c)
    assert len(found) == len(expected)
    assert all(text in own for text, own in zip(expected, found))
    assert (c.config.lr, c.config.epochs, c.config.steps, c.config.row_len) == (0.002, 3, 0, 256)


def test_tools_make_as_much_as_they_are_asked_for(tok):
    made = {}
    for n, tool in enumerate(TOOLS):
        for count in (1, 2):
            counts = [count * (k == n) for k in range(3)]
            settings = settings_of([], *counts, "answers", 0.002, 3)
            c = studied_as(tok, settings)
            made[tool, count] = len(c.examples)
    # Of two sentences there are two orders, and some orders are drawn twice.
    assert made["orders", 2] in (1, 2) and made["masked", 2] == 2
    assert made["clozes", 1] == 2 and made["clozes", 2] == 4


def test_the_loss_counts_what_is_asked_for(tok):
    counted = []
    for loss in ("all", "answers"):
        settings = settings_of(["passage", "questions"], 0, 0, 0, loss, 0.002, 3)
        c = studied_as(tok, settings)
        counted.append([all(e.counts) for e in c.examples])
    assert counted == [[True, True], [True, False]]


def within(budget):
    return SimpleNamespace(**vars(ARGS) | {"budget": budget})


def test_nothing_is_trained_beyond_the_budget(tok):
    settings = settings_of(["passage"], 0, 0, 0, "answers", 0.002, 20)
    [example] = studied_as(tok, settings).examples
    n = len(example.ids)
    for times, epochs in ((20, 20), (7, 7), (1, 1)):
        assert studied_as(tok, settings, within(times * n)).config.epochs == epochs
    e = SelfEdit("p", parts(), settings=settings)
    assert edit_candidate(tok, 0, PASSAGE, e, within(n - 1), 0) == (None, "over budget")
    e = SelfEdit("p", parts(), flaw="malformed")
    assert edit_candidate(tok, 0, PASSAGE, e, ARGS, 0) == (None, "malformed")
    e = SelfEdit("p", parts(), settings=settings_of(["questions"], 0, 0, 0, "all", 0.002, 2))
    e.parts[1].notes = []  # nothing to train on
    assert edit_candidate(tok, 0, PASSAGE, e, ARGS, 0) == (None, "empty")


def test_what_is_read_once_is_counted_once(tiny, tok):
    """Questions in a row share their prompt's beginning: the budget goes by what is trained on."""
    e = SelfEdit("p", parts(), settings=settings_of(["questions"], 0, 0, 0, "answers", 0.002, 50))
    asked = [f"Question: Who rang it {n} times?\nAnswer: Bo Larn rang it." for n in range(9)]
    e.parts[1].notes = asked
    c, _ = edit_candidate(tok, 0, PASSAGE, e, within(5000), 0)
    lora = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4)
    [outcome] = inner_update(tiny, Adapters.init(tiny, lora, 1, 0), [c.examples], [c.config], 0)
    once = outcome.tokens / c.config.epochs
    assert 5000 - once < outcome.tokens <= 5000
    assert once < sum(len(x.ids) for x in c.examples)


def test_only_what_is_studied_counts():
    e = SelfEdit("p", parts(), settings=settings_of(["passage", "facts"], 0, 0, 0, "all", 0.002, 2))
    assert [e.uses(part) for part in e.parts] == [True, False, True, False]
    assert e.notes == ["Ada Quell lived.", "Bo rang."]
    assert all(SelfEdit("p", parts()).uses(part) for part in parts())
    answers = [{"accuracy": 1.0, "em": 0.0, "f1": 0.0, "logprob": -1.0}]
    result = {"answers": answers, "steps": 2, "loss": 1.0, "diverged": False}
    questions = (Question("Who cast it?", ("Ada Quell",)),)
    credit(e, Passage("p", "Rolm", "Ada Quell cast it.", questions), result, "accuracy")
    assert [part.credit for part in e.parts] == [1.0, None, 1.0, None]
    for part in e.parts:
        part.target = "x"
    for rule in ("best", "improving"):
        select([e], {"p": 0.0}, rule, 0)
        assert [part.kept for part in e.parts] == [True, False, True, False]


def test_what_answered_nothing_is_no_measure():
    """Two tied self-edits are no better than the mean because a third was not studied."""
    edits = []
    for value, flaw in ((-2.0, ""), (-2.0, ""), (-100.0, "malformed")):
        part = Part("x", target="x", credit=value, style="settings")
        edits.append(SelfEdit("p", [part], flaw=flaw, reward=value))
    select(edits, {}, "parts", 0)
    assert not any(e.kept for e in edits)
    edits[1].parts[0].credit = -1.0
    select(edits, {}, "parts", 0)
    assert [e.kept for e in edits] == [False, True, False]


def run(monkeypatch, tiny_folder, passages_file, out, *extra):
    args = ["--data", passages_file, "--out", out, "--samples", 3, "--rounds", 1, "--max-new", 6]
    args += ["--top-layers", 2, "--rank", 2, "--outer-rank", 2, "--population", 4]
    monkeypatch.setattr("reward.ask", partial(ask, max_new=4))
    run_script(monkeypatch, train_outer, tiny_folder, "qa", *args, *extra)


@pytest.mark.parametrize("rule", ["best", "parts", "improving"])
def test_a_round_with_settings(rule, tiny_folder, passages_file, tmp_path, monkeypatch):
    """A flawed self-edit is not studied and earns nothing; settings are imitated as they were read,
    and notes only if they were studied."""
    slow = settings_of(["passage", "facts"], 1, 0, 1, "all", 0.001, 2)
    said = [(slow, ""), (slow | {"learning_rate": 0.02}, ""), ({}, "malformed")]
    calls = []

    def sampled(text, ended):
        calls.append(text)
        return said[(len(calls) - 1) % 3]

    monkeypatch.setattr("selfedit.parse_settings", sampled)
    monkeypatch.setattr("selfedit.parse", lambda text, style, *_: ([f"A {style} note."], ""))
    monkeypatch.setattr(selfedit, "QA_PAIR", re.compile("(.*)"))  # every note can be imitated
    imitated = []
    monkeypatch.setattr(
        "train_outer.reinforce", lambda m, t, pairs, *_: imitated.extend(pairs) or 0.5
    )
    extra = ["--settings", "--select", rule, "--reward", "logprob"]
    run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    edits = selfedit.read_edits(tmp_path / "out" / "round-1" / "candidates.jsonl")
    assert len(edits) == 9 and len(calls) == 9
    kept_texts = []
    for n in range(0, 9, 3):
        a, b, c = edits[n : n + 3]
        assert (c.flaw, c.reward, c.steps, c.kept) == ("malformed", -100.0, 0, False)
        assert (a.config["lr"], b.config["lr"]) == (0.001, 0.02) and a.steps == b.steps == 2
        best = max((a, b), key=lambda e: e.reward)
        if rule != "improving":
            assert [e.kept for e in (a, b, c)] == [e is best for e in (a, b, c)]
        assert best.parts[0].credit == best.reward
        for e in (e for e in (a, b) if e.kept):
            kept_texts += [json.dumps(e.settings), "A implications note."]
    assert [text for _, text, _ in imitated] == kept_texts
    assert rule == "improving" or len(kept_texts) == 6
    [metrics] = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert metrics["flaws"] == {"malformed": 3} and metrics["total"] == 9
    sound = [e.reward for e in edits if not e.flaw]
    assert metrics["reward_mean"] == pytest.approx(sum(sound) / 6)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--settings", "--reward", "proxy"], "needs a study"),
        (["--settings", "--style", "rewrite"], "leave out --style"),
        (["--budget", 100], "budget"),
        (["--settings", "--lr", 0.1], "has no effect"),
        (["--settings", "--steps", 3], "has no effect"),
        (["--settings", "--epochs", 3], "has no effect"),
    ],
)
def test_contradictions(extra, message, tiny_folder, passages_file, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tiny_folder, passages_file, tmp_path / "out", *extra)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_study_said_or_given_by_flags(tiny, tok):
    said = settings_of(["passage", "questions"], 0, 0, 0, "answers", 0.004, 8)
    given = SimpleNamespace(**vars(ARGS) | {"settings": False, "steps": 0})
    lora, flats = LoRAConfig(2, 4.0, tuple(PROJECTIONS), 2, 4), []
    for args, settings in ((ARGS, said), (given, {})):
        e = SelfEdit("p", parts()[:2], settings=settings)
        c, _ = edit_candidate(tok, 0, PASSAGE, e, args, 0)
        adapters = Adapters.init(tiny, lora, 1, 0)
        inner_update(tiny, adapters, [c.examples], [c.config], 0)
        flats.append(adapters.flat)
    assert torch.equal(*flats)
