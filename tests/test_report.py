"""report.py: the page of small run folders written here, also in a browser if there is one."""

import json
import re
import shutil
import subprocess
import sys
from html import escape
from itertools import product

import pytest

import report
from data.qa import Passage, Question
from eval_qa import answer_record
from selfedit import Part, SelfEdit

EVIL = "<script>alert(1)</script> & <b>"
SENTENCES = ["Ada Rolm cast the bell.", f"It rang {EVIL} twice.", "Nobody liked it."]
LONG = "unbroken" * 60  # wider than any screen
RIGHT, WRONG = "12\n34", "12\n30"


def write(path, *records):
    """One JSON object, or a line for each record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")


def change(path, edit, n=0):
    """Apply edit() to the n-th record of a file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    edit(records[n])
    write(path, *records)


QUESTIONS = (Question("Who cast it?", ("Ada Rolm", "x&y")), Question("How often?", ("twice",)))
BELL = Passage("p1", "The bell", " ".join(SENTENCES), QUESTIONS)


def answers_of(method, right, notes=()):
    """A line of answers.jsonl, as eval_qa.py makes it: the first `right` questions are answered."""
    answers = []
    for n, question in enumerate(QUESTIONS):
        given = question.answers[0] if n < right else f"no {EVIL}"
        scores = {"accuracy": float(n < right), "em": 0.0, "f1": 0.0, "logprob": -1.0}
        answers.append({"answer": given} | scores)
    return answer_record(method, BELL, notes, answers)


def asks(question, sentence):
    return f"Question: {question}\nAnswer: {sentence}"


def rows_of(methods, key):
    """Rows that rise by 20 points each, and the step of each from the row above it."""
    rows, steps = [], []
    for n, method in enumerate(methods):
        rows.append(
            {"method": method, key: 0.2 * n, "ci95": [0.2 * n - 0.05 * (n > 0), 0.2 * n + 0.071]}
        )
    for a, b in zip(methods, methods[1:]):
        steps.append({"from": a, "to": b, "delta": 0.2, "ci95": [-0.011, 0.432]})
    return rows, steps


def new_edit(passage, parts, **fields):
    """A line of candidates.jsonl, as train_outer.py makes it."""
    fields = {
        "style": "questions",
        "config": {"lr": 0.004},
        "reward": 0.5,
        "why": "not the best",
    } | fields
    return SelfEdit(passage, parts, **fields).record()


def new_run(run, domain, data):
    settings = {
        "domain": domain,
        "model": f"a&b {LONG}",
        "seed": 7,
        "samples": 3,
        "reward": "accuracy",
    }
    write(run / "settings.json", settings | {"select": "parts", "data": str(data)})
    metrics = {
        "round": 1,
        "reward_mean": 0.25,
        "reward_kept": None,
        "accuracy_mean": 0.25,
        "kept": 1,
    }
    metrics |= {
        "total": 5,
        "kept_parts": 2,
        "flaws": {"repeats": 3, "endless": 1},
        "notes_mean": 2.5,
    }
    write(run / "metrics.jsonl", metrics | {"outer_loss": 0.125, "seconds": 61.7})


@pytest.fixture
def qa_run(tmp_path):
    run = tmp_path / "runs" / "small qa"
    new_run(run, "qa", tmp_path / "nowhere.json")
    rows, steps = rows_of(
        ["base", "passage", "passage+self-edit", "seal-2", "in-context"], "accuracy"
    )
    gap = {"by": "seal-2", "share": 0.625, "ci95": [0.5, 0.75]}
    steps.append({"from": "passage", "to": "seal-2", "delta": 0.4, "ci95": [0.3, 0.5]})
    result = {"n_passages": 1, "protocol": "steps", "rows": rows, "steps": steps, "gap_closed": gap}
    write(run / "ladder.json", result)
    before = [asks("Who cast it?", SENTENCES[0]), asks(f"What {EVIL}?", SENTENCES[0])]
    after = [asks("How often did it ring?", SENTENCES[1]), asks("Who cast the bell?", SENTENCES[0])]
    records = [answers_of("base", 0), answers_of("in-context", 2), answers_of("passage", 1)]
    records += [
        answers_of("passage+self-edit", 1, before),
        answers_of("passage+self-edit", 0, ["another"]),
    ]
    write(
        run / "ladder" / "answers.jsonl",
        *records,
        answers_of("seal-1", 0),
        answers_of("seal-2", 2, after),
    )
    notes = [asks("Who cast it?", "Ada & co."), asks("What is it?", "Ada & co.")]
    credits = {"Who cast it?": [0.1, 0.67]}
    good = Part("as it was said", notes, credit=1.0, kept=True, note_credits=credits)
    bad = Part(f"Sure! {EVIL}", flaw="malformed")
    edits = [new_edit("t0", [good, bad, Part("")], why="some parts are the best", reward=0.75)]
    edits += [new_edit(f"t{n}", [bad], why="no sound part is the best") for n in range(1, 5)]
    write(run / "round-1" / "candidates.jsonl", *edits)
    return run


@pytest.fixture
def arc_run(tmp_path):
    """Task t1: three demonstrations of 2 x 2, one of 3 x 30; two tests of 2 x 2."""
    small, wide = [[1, 2], [3, 4]], [[n % 10 for n in range(30)]] * 3
    pairs = [{"input": small, "output": small}] * 3 + [{"input": wide, "output": wide}]
    tests = [{"input": small, "output": small}, {"input": small, "output": [[5, 6], [7, 8]]}]
    write(tmp_path / "arc.json", {"train": {}, "eval": {"t1": {"train": pairs, "test": tests}}})
    run = tmp_path / "runs" / "arc"
    new_run(run, "arc", tmp_path / "arc.json")
    config = {"groups": ["use_size_augmentations"], "every_token": True, "lr": 0.002, "epochs": 4}
    attempts = [("icl", 0.0, None, "", [WRONG, "endless"]), ("self-edit", 0.0, {}, "malformed", [])]
    attempts += [
        ("seal-1", 1.0, config, "", [RIGHT, "56\n78\n"]),
        ("seal-1", 0.0, config, "", ["1", "1"]),
    ]
    records = []
    for method, solved, settings, flaw, prediction in attempts:
        record = {"id": "t1", "method": method, "solved": solved, "cells": 0.75, "flaw": flaw}
        records.append(record | {"config": settings, "prediction": prediction})
    rows, steps = rows_of(["icl", "self-edit", "seal-1"], "rate")
    rows = [r | {"solved": 5 * r["rate"], "n": 5, "attempts": 1} for r in rows]
    rows[2] |= {"sound": 0.875, "copied": 0.125}
    result = {"n_tasks": 5, "rows": rows, "steps": steps, "tasks": records}
    write(run / "ladder.json", result | {"settings": {"data": str(tmp_path / "arc.json")}})
    edits = [new_edit("t7", [Part("as it was said", kept=True)], style="settings", config=config)]
    bad = Part("as it was said", flaw="endless")
    edits += [new_edit("t7", [bad], style="settings", config={}, flaw="endless")]
    write(run / "round-1" / "candidates.jsonl", *edits)
    return run


def make(monkeypatch, run, *options):
    """The page of report.main(), as from the command line."""
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), *map(str, options)])
    report.main()
    return (options[1] if options else run / "report.html").read_text(encoding="utf-8")


def plain(html):
    """What a reader sees, blanks made one."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("&nbsp;", " ").split())


def section(page, title):
    return re.search(rf"<h2>{title}</h2>(.*?)</section>\n(?=<section id|</main>)", page, re.S)[1]


# -----------------------------------------------------------------------------
# what every page has


@pytest.mark.parametrize("name", ["qa_run", "arc_run"])
def test_one_sound_file_that_needs_nothing_else(request, monkeypatch, name):
    page = make(monkeypatch, request.getfixturevalue(name))
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<meta charset="utf-8">' in page and '<meta name="viewport"' in page
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(|\bsrc=|https?:", page)
    levels = [int(n) for n in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    for tag in (
        "section",
        "article",
        "div",
        "table",
        "tr",
        "td",
        "p",
        "ul",
        "details",
        "figure",
        "svg",
    ):
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), tag
    assert re.findall(r'href="(.*?)"', page) == [
        f"#{i}" for i in re.findall(r'<section id="(.*?)"', page)
    ]


def test_the_run_and_a_line_for_each_round(monkeypatch, qa_run):
    text = plain(make(monkeypatch, qa_run))
    assert "SEAL run small qa" in text
    assert f"domain qa model a&amp;b {LONG} seed 7 samples 3 reward accuracy select parts" in text
    head = "round total kept kept parts reward mean reward kept accuracy mean notes mean "
    head += "outer loss seconds flaws"
    assert f"{head} 1 5 1 2 0.250 – 0.250 2.5 0.125 62 3 repeats, 1 endless" in text


def test_what_passages_and_models_say_is_escaped(monkeypatch, qa_run):
    change(qa_run / "ladder/answers.jsonl", lambda r: r.update(title=EVIL))
    change(qa_run / "ladder/answers.jsonl", lambda r: r["answers"][0].update(question=EVIL))
    change(qa_run / "ladder/answers.jsonl", lambda r: r.update(method=f'seal-"{EVIL}'), 6)
    change(qa_run / "round-1/candidates.jsonl", lambda r: r.update(why=EVIL, passage=EVIL))
    change(qa_run / "metrics.jsonl", lambda r: r.update(flaws={EVIL: 1}))
    change(qa_run / "settings.json", lambda r: r.update(select=EVIL))
    page = make(monkeypatch, qa_run)
    assert "<script" not in page and "<b> " not in page and "& " not in page
    assert 'data-row="seal-&quot;&lt;script&gt;' in page
    run, held_out, method, training = 3, 10, 4, 7  # how often it stands where
    assert page.count(escape(EVIL)) == run + held_out + method + training


def test_the_ladder(monkeypatch, qa_run):
    page = section(make(monkeypatch, qa_run), "The ladder")
    text = plain(page)
    assert "1 held-out passages" in text
    assert "base 0.0 % [0.0, 7.1] passage 20.0 % [15.0, 27.1] +20.0 [-1.1, +43.2]" in text
    assert "in-context 80.0 % [75.0, 87.1] +20.0 [-1.1, +43.2]" in text
    assert '<i style="width:60.00%"></i><b style="left:55.00%;width:12.10%">' in page  # seal-2
    assert page.count('<tr class="seal">') == 1
    assert "seal-2 goes 62.5 % [50.0 %, 75.0 %] of the way from passage to in-context." in text
    assert "Other steps, in points passage to seal-2: +40.0 [+30.0, +50.0]" in text


def test_no_gap_is_closed_where_there_is_none(monkeypatch, qa_run):
    change(qa_run / "ladder.json", lambda r: r["gap_closed"].update(share=None, ci95=None))
    assert "of the way" not in make(monkeypatch, qa_run)


def test_both_ladders_of_match_both(monkeypatch, qa_run):
    (qa_run / "ladder.json").rename(qa_run / "ladder_steps.json")
    shutil.copy(qa_run / "ladder_steps.json", qa_run / "ladder_epochs.json")
    assert make(monkeypatch, qa_run).count("<h2>The ladder</h2>") == 2


@pytest.mark.parametrize("name", ["qa_run", "arc_run"])
def test_without_a_ladder_the_page_says_how_to_add_it(request, monkeypatch, name):
    run = request.getfixturevalue(name)
    (run / "ladder.json").unlink()
    page = make(monkeypatch, run)
    assert f"<code>python eval_{name[:-4]}.py --run {run}</code>" in page
    assert "Held-out" not in page and "Training, round 1" in page


# -----------------------------------------------------------------------------
# passages


def columns(page):
    """The notes before RL, and those after it."""
    return re.findall(r"<section><h4>Notes (.*?)</section>", page, re.S)


def test_notes_stand_under_their_sentence_with_what_it_earned(monkeypatch, qa_run):
    before, after = map(plain, columns(make(monkeypatch, qa_run)))
    evil = escape(EVIL)
    first, second, third = map(escape, SENTENCES)
    assert before == (
        f"before RL passage+self-edit: 2 notes {first} earned 100.0 % Who cast it? What {evil}? "
        f"{second} earned 0.0 % no note {third} not asked no note"
    )
    assert after == (
        f"after RL seal-2: 2 notes {first} earned 100.0 % Who cast the bell? "
        f"{second} earned 100.0 % How often did it ring? {third} not asked no note"
    )


def test_other_notes_are_listed_with_the_mean_of_the_quiz(monkeypatch, qa_run):
    def mixed(record):
        record["notes"] = [
            asks("Who cast it?", SENTENCES[0]),
            "The bell is old.",
            asks("Who?", "Ada"),
        ]

    change(qa_run / "ladder" / "answers.jsonl", lambda r: r.update(notes=["A.", "B."]), 3)
    change(qa_run / "ladder" / "answers.jsonl", mixed, 6)
    before, after = map(plain, columns(make(monkeypatch, qa_run)))
    assert before == "before RL passage+self-edit: 2 notes All together earned 50.0 % A. B."
    assert after.endswith(
        "not asked no note All together earned 100.0 % The bell is old. Question: Who? Answer: Ada"
    )


def test_every_answer_is_marked_right_or_wrong(monkeypatch, qa_run):
    page = make(monkeypatch, qa_run)
    table = re.search(r'<table class="quiz">(.*?)</table>', page, re.S)[1]
    wrong = f'<span class="wrong">✗ no {escape(EVIL)}</span>'
    cells = re.findall(r'<td data-row="(.*?)">(.*?)</td>', table)
    assert [m for m, _ in cells] == ["base", "passage", "passage+self-edit", "seal-2"] * 2
    right = ['<span class="right">✓ Ada Rolm</span>', '<span class="right">✓ twice</span>']
    assert [told for _, told in cells] == [wrong, *right[:1] * 3, wrong, wrong, wrong, right[1]]
    assert "passage+self-edit 1 of 2 right seal-2 2 of 2 right" in plain(
        table
    )  # not of the second sample
    assert "Who cast it? accepted: Ada Rolm / x&amp;y" in plain(table)
    assert "another" not in page


def test_an_empty_answer_is_shown_as_one(monkeypatch, qa_run):
    change(qa_run / "ladder" / "answers.jsonl", lambda r: r["answers"][0].update(answer="\n"))
    assert "✗ (nothing)" in make(monkeypatch, qa_run)


def test_a_ladder_without_study_shows_what_there_is(monkeypatch, qa_run):
    path = qa_run / "ladder" / "answers.jsonl"
    write(path, answers_of("base", 1), answers_of("in-context", 2))
    page = make(monkeypatch, qa_run)
    assert columns(page) == [] and "base 1 of 2 right" in plain(page)


def test_training_shows_what_was_imitated_and_why(monkeypatch, qa_run):
    page = section(make(monkeypatch, qa_run), "Training, round 1")
    text = plain(page)
    assert "t0 Self-edit, reward 0.75 ✓ reinforced : some parts are the best" in text
    assert "Ada &amp; co. ✓ reinforced , credit 1.00 Who cast it? (0.67) What is it?" in text
    sampled = f"As sampled ✗ not reinforced , malformed, no credit Sure! {escape(EVIL)}"
    assert (
        f"t1 Self-edit, reward 0.50 ✗ not reinforced : no sound part is the best {sampled}" in text
    )
    shown, rest = page.split("<details><summary>2 more</summary>")
    assert re.findall(r"<h3>(.*?)</h3>", shown) == ["t0", "t1", "t2"]
    assert re.findall(r"<h3>(.*?)</h3>", rest) == ["t3", "t4"]


def test_training_passages_have_titles_if_the_data_is_there(monkeypatch, qa_run, tmp_path):
    question = {"question": "What?", "answers": ["this"]}
    entry = {"id": "t0", "title": "Tea & Co.", "passage": "This is tea.", "questions": [question]}
    write(tmp_path / "nowhere.json", {"passages": [entry]})
    page = make(monkeypatch, qa_run)
    assert "<h3>Tea &amp; Co.</h3>\n<p>This is tea.</p>" in page and "<h3>t1</h3>" in page


# -----------------------------------------------------------------------------
# ARC


def grids(html):
    """[(caption, colours of the cells)]."""
    found = []
    for caption, cells in re.findall(r"<figcaption>(.*?)</figcaption><svg.*?>(.*?)</svg>", html):
        found.append((caption, "".join(re.findall(r'<rect [^>]*class="c(\d)"/>', cells))))
    return found


def test_grids_have_every_cell(monkeypatch, arc_run):
    page = section(make(monkeypatch, arc_run), "Held-out tasks")
    shown = grids(page.partition("Predictions")[0])
    assert shown[:6] == [("input 2×2", "1234"), ("output 2×2", "1234")] * 3
    assert shown[6:8] == [("input 3×30", "0123456789" * 9), ("output 3×30", "0123456789" * 9)]
    tests = [
        ("input 2×2", "1234"),
        ("truth 2×2", "1234"),
        ("input 2×2", "1234"),
        ("truth 2×2", "5678"),
    ]
    assert shown[8:] == tests
    assert page.count('x="1" y="1" width="1" height="1"') == page.count("<svg")


def test_colours_are_those_of_arc(monkeypatch, arc_run):
    page = make(monkeypatch, arc_run)
    colours = "#000000 #0074D9 #FF4136 #2ECC40 #FFDC00 #AAAAAA #F012BE #FF851B #7FDBFF #870C25"
    assert " ".join(re.findall(r"\.c\d { fill: (#\w+) }", page)) == colours


def test_the_first_attempt_of_each_row(monkeypatch, arc_run):
    page = section(make(monkeypatch, arc_run), "Held-out tasks")
    icl, edit, seal = re.findall(r'<section class="card">(.*?)</section>', page, re.S)
    assert grids(icl) == [("prediction 2×2", "1230")]
    assert plain(icl).startswith(
        "icl ✗ not solved, 75.0 % of the cells right prediction 2×2 endless"
    )
    assert plain(icl).endswith("endless nothing is trained")
    told = "self-edit ✗ not solved, 75.0 % of the cells right malformed malformed no settings: "
    assert plain(edit) == f"{told}malformed" and not grids(edit)
    assert grids(seal) == [("prediction 2×2", "1234"), ("prediction 2×2", "5678")]
    assert "✓ solved ; 1 of 2 attempts solve it" in plain(seal)
    assert plain(seal).endswith(
        "augmentations: size; loss on all tokens; learning rate 0.002; epochs 4"
    )


@pytest.mark.parametrize("text", ["12\n3", "1a\n22", "", "not a grid", "12\n\n34", "١٢"])
def test_what_is_no_grid_is_shown_as_its_reason(monkeypatch, arc_run, text):
    change(arc_run / "ladder.json", lambda r: r["tasks"][0].update(prediction=[text, RIGHT]))
    page = section(make(monkeypatch, arc_run), "Held-out tasks")
    icl = re.findall(r'<section class="card">(.*?)</section>', page, re.S)[0]
    assert len(grids(icl)) == 1 and f"<p>{text or 'no prediction'}</p>" in icl


def test_the_ladder_of_arc(monkeypatch, arc_run):
    text = plain(section(make(monkeypatch, arc_run), "The ladder"))
    assert "5 held-out tasks" in text
    assert (
        "seal-1 2.0 of 5, 87.5 % sound, 12.5 % copied 40.0 % [35.0, 47.1] +20.0 [-1.1, +43.2]"
        in text
    )


def test_training_on_arc_shows_the_settings(monkeypatch, arc_run):
    text = plain(section(make(monkeypatch, arc_run), "Training, round 1"))
    settings = "augmentations: size; loss on all tokens; learning rate 0.002; epochs 4"
    assert f"✓ reinforced : not the best {settings} Self-edit" in text
    assert (
        "no settings: endless As sampled ✗ not reinforced , endless, no credit as it was said"
        in text
    )


# -----------------------------------------------------------------------------
# errors


def refusal(monkeypatch, run, *options):
    """The one line with which report.py ends; nothing has been written."""
    files = sorted(run.parent.rglob("*"))
    with pytest.raises(SystemExit) as e:
        make(monkeypatch, run, *options)
    assert sorted(run.parent.rglob("*")) == files
    text = str(e.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


def test_a_folder_that_is_no_run(monkeypatch, tmp_path):
    for run in (tmp_path / "missing", tmp_path):
        assert f"{run} is no run folder" in refusal(monkeypatch, run)


def test_no_finished_round(monkeypatch, qa_run):
    path = qa_run / "metrics.jsonl"
    path.write_text("")
    assert f"{qa_run} has no finished round" in refusal(monkeypatch, qa_run)
    path.unlink()
    assert f"{qa_run} has no finished round" in refusal(monkeypatch, qa_run)


def test_records_of_an_older_version(monkeypatch, qa_run):
    old = f"error: {qa_run} was written by an older version; train it anew"
    change(qa_run / "round-1" / "candidates.jsonl", lambda r: r.update(parts=["a text"]))
    assert refusal(monkeypatch, qa_run) == old
    change(qa_run / "settings.json", lambda r: r.pop("domain"))
    assert refusal(monkeypatch, qa_run) == old


FILES = [
    "settings.json",
    "metrics.jsonl",
    "ladder.json",
    "ladder/answers.jsonl",
    "round-1/candidates.jsonl",
]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(monkeypatch, qa_run, name):
    path = qa_run / name
    path.write_bytes(path.read_bytes()[:-9])
    text = refusal(monkeypatch, qa_run)
    assert str(path) in text and "is not valid JSON" in text


@pytest.mark.parametrize(
    "name, field", [*zip(FILES, ["model", "flaws", "rows", "answers", "parts"])]
)
def test_a_missing_field_is_named_with_its_file(monkeypatch, qa_run, name, field):
    change(qa_run / name, lambda r: r.pop(field))
    assert refusal(monkeypatch, qa_run) == f"error: {qa_run / name}: '{field}' is missing"


@pytest.mark.parametrize("name, field", [*zip(FILES[1:], ["flaws", "rows", "answers", "parts"])])
@pytest.mark.parametrize("value", [7, None, [[]]])
def test_a_field_of_another_type_is_named_with_its_file(monkeypatch, qa_run, name, field, value):
    change(qa_run / name, lambda r: r.update({field: value}))
    assert refusal(monkeypatch, qa_run).startswith(f"error: {qa_run / name}: ")


def test_candidates_or_tasks_that_are_missing(monkeypatch, arc_run, tmp_path):
    (tmp_path / "arc.json").rename(tmp_path / "other.json")  # all else can be shown
    page = section(make(monkeypatch, arc_run), "Held-out tasks")
    assert f"{tmp_path / 'arc.json'} is not there" in page and "<article>" not in page
    (tmp_path / "other.json").rename(tmp_path / "arc.json")
    (arc_run / "round-1" / "candidates.jsonl").unlink()
    assert "candidates.jsonl" in refusal(monkeypatch, arc_run)


def test_an_error_leaves_the_page_that_is_there(monkeypatch, qa_run):
    before = make(monkeypatch, qa_run)
    (qa_run / "round-1" / "candidates.jsonl").write_text("{")
    refusal(monkeypatch, qa_run)
    assert (qa_run / "report.html").read_text(encoding="utf-8") == before


def test_out_says_where(monkeypatch, qa_run, tmp_path):
    page = make(monkeypatch, qa_run, "--out", tmp_path / "new" / "page.html")
    assert page.endswith("</html>\n") and not (qa_run / "report.html").exists()
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(monkeypatch, qa_run, "--out", tmp_path / "file" / "page.html")


def test_half_a_character_does_not_stop_it(monkeypatch, qa_run):
    change(
        qa_run / "ladder" / "answers.jsonl", lambda r: r["answers"][0].update(answer="half \ud83d")
    )
    assert "✗ half ?" in make(monkeypatch, qa_run)


# -----------------------------------------------------------------------------
# in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
OPTIONS += (
    " --disable-background-networking --disable-component-update --enable-logging=stderr --v=0"
)
# The page stands in a frame of the width that is asked for: a window has at least 500 pixels.
FRAME = """<!DOCTYPE html><html style="color-scheme: light dark"><title>frame</title>
<iframe srcdoc="{}" style="width:{}px;height:900px;border:0"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const boxes = [...page.querySelectorAll(".scroll")];
  document.documentElement.dataset.measured = JSON.stringify({{
    wide: root.scrollWidth, inner: page.defaultView.innerWidth,
    scrolls: boxes.some(b => b.scrollWidth > b.clientWidth),
    cells: [...page.querySelectorAll(".quiz td, svg")].map(c => c.getBoundingClientRect().width),
    colour: page.defaultView.getComputedStyle(page.body).backgroundColor }});
}})</script>"""


def measure(folder, page, width, scheme):
    """What the frame's script says of the page, and what the console says."""
    folder.mkdir()
    file = folder / "frame.html"
    file.write_text(FRAME.format(escape(page), width), encoding="utf-8")
    command = [
        CHROMIUM,
        *OPTIONS.split(),
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width + 40},1000",
    ]
    command += [
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-measured="(.*?)"', done.stdout)
    console = [text for text in done.stderr.splitlines() if "CONSOLE" in text]
    return json.loads(found[1].replace("&quot;", '"')), console


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
@pytest.mark.parametrize("name", ["qa_run", "arc_run"])
def test_the_page_fits_phones_and_desks_in_light_and_dark(request, monkeypatch, tmp_path, name):
    run = request.getfixturevalue(name)
    if name == "qa_run":
        notes = [LONG, asks(LONG, SENTENCES[0])]
        change(run / "ladder" / "answers.jsonl", lambda r: r.update(title=LONG, text=LONG))
        change(
            run / "ladder" / "answers.jsonl",
            lambda r: r["answers"][0].update(answer=LONG, question=LONG),
        )
        change(run / "ladder" / "answers.jsonl", lambda r: r.update(notes=notes), 3)
        change(run / "round-1" / "candidates.jsonl", lambda r: r.update(why=LONG, passage=LONG))
        change(run / "round-1" / "candidates.jsonl", lambda r: r["parts"][1].update(text=LONG))
        change(run / "metrics.jsonl", lambda r: r.update(flaws={LONG: 1}))
    else:
        wide = "0123456789" * 3
        change(run / "ladder.json", lambda r: r["tasks"][0].update(prediction=[wide, wide]))
    page = make(monkeypatch, run)
    colours = {}
    for width, scheme in [(320, "light"), *product((390, 1280), ("light", "dark"))]:
        found, console = measure(tmp_path / f"{width}-{scheme}", page, width, scheme)
        assert found["inner"] == width and found["wide"] <= width, (width, scheme, found)
        assert min(found["cells"]) >= (40 if name == "arc_run" else 100)
        assert found["scrolls"] or width > 390  # the rounds' table, in its own box
        assert not console
        colours.setdefault(scheme, set()).add(found["colour"])
    assert colours == {"light": {"rgb(251, 250, 248)"}, "dark": {"rgb(22, 24, 27)"}}


def test_a_prediction_longer_than_any_grid():
    r = {"method": "x", "solved": 0, "cells": 0.0, "config": {}, "flaw": ""}
    for said in ("1" * 5000, "11\n" * 5000, "no " * 5000):
        text = report.attempt(r | {"prediction": [said]}, 1, [False])
        assert text.count("<rect") <= 1000 and len(text) < 100_000
