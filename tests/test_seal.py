"""seal.py, the lesson, and the engine give the same adapters, answers, rewards and selection."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import seal
import train_outer
from lm.checkpoint import load_model
from lm.files import read_jsonl
from lm.tokenizer import Tokenizer


@pytest.fixture
def cpu_float32(monkeypatch):
    """On any machine: what the lesson picks by itself would be bfloat16 or a GPU where there is one."""
    load = lambda folder: load_model(folder, "cpu", "float32")  # noqa: E731
    monkeypatch.setattr(seal, "load_model", load)


def questions_of(tok, ids):
    """A tiny random model writes no questions: whatever it wrote is one, so that there are notes."""
    text = " ".join(tok.decode(ids).split())
    return [f"{text[:20]}?"] if any(c.isalnum() for c in text[:20]) else ["x?"]


def one_note(text, style, ended, about):
    """questions_of(), for the engine's parse()."""
    text = " ".join(text.split())
    question = f"{text[:20]}?" if any(c.isalnum() for c in text[:20]) else "x?"
    return [f"Question: {question}\nAnswer: {about}"], ""


def test_the_lesson_is_the_engine(
    tiny_folder, passages_file, tmp_path, monkeypatch, cpu_float32, capsys
):
    """Three passages of two sentences, two self-edits each, all layers but one adapted."""
    options = {"passages": 3, "samples": 2, "max_new": 6, "top_layers": 3, "steps": 5}
    settings = seal.Settings(str(tiny_folder), str(passages_file), **options, temperature=0.9)
    monkeypatch.setattr(seal, "read_questions", questions_of)
    monkeypatch.setattr("selfedit.parse", one_note)
    # A random model answers nothing right: a deterministic stand-in, by the answer's own letters.
    right = lambda text, answers: len(text) % 3 == 0  # noqa: E731
    monkeypatch.setattr(seal, "contains", right)
    score = train_outer.quiz_candidates.__globals__["ask"].__globals__["score_answer"]
    graded = lambda a, golds: score(a, golds) | {"accuracy": float(right(a, golds))}  # noqa: E731
    monkeypatch.setattr("quiz.score_answer", graded)

    lesson = seal.main(settings)
    adapters, update = {}, train_outer.inner_update

    def spy(model, population, examples, configs, seed, tick=None):
        outcomes = update(model, population, examples, configs, seed, tick)
        for own, flat in zip(examples, population.flat):
            adapters[tuple(e.ids for e in own)] = flat.clone()
        return outcomes

    monkeypatch.setattr(train_outer, "inner_update", spy)
    flags = ["--data", passages_file, "--out", tmp_path / "run", "--rounds", 1, "--samples", 2]
    flags += ["--max-new", 6, "--top-layers", 3, "--steps", 5, "--temperature", 0.9, "--shots", 0]
    flags += ["--row-len", 0, "--select", "improving", "--outer-row-len", 0]
    run_script(monkeypatch, train_outer, tiny_folder, "qa", *flags)
    records = read_jsonl(tmp_path / "run" / "round-1" / "candidates.jsonl")
    scored = read_jsonl(tmp_path / "run" / "round-1" / "scored.jsonl")

    candidates = [c for of_passage in lesson["candidates"] for c in of_passage]
    edits = [edit for of_passage in lesson["edits"] for edit in of_passage]
    assert len(records) == len(candidates) == 6 and len(adapters) == 9  # and three passages alone
    for edit, c, record, result in zip(edits, candidates, records, scored):
        assert [part["target"] for part in record["parts"]] == ["\n".join(q) for q in edit]
        assert [a for a, _ in c["answers"]] == [a["answer"] for a in result["answers"]]
        assert c["reward"] == record["reward"]
        assert c["kept"] == any(part["kept"] for part in record["parts"])
        assert c["losses"][-1] == pytest.approx(result["loss"], rel=1e-4)
        closest = min(float((c["adapter"] - flat).norm()) for flat in adapters.values())
        assert closest <= 1e-4 * float(c["adapter"].norm())
    assert 0 < sum(c["kept"] for c in candidates) < 6  # the selection is a real one
    alone = [result["answers"] for result in scored[6:]]
    assert lesson["ladder"]["passage"] == [np.mean([a["accuracy"] for a in own]) for own in alone]

    from lm.adapters import load_adapter

    policy = load_adapter(load_model(tiny_folder, "cpu", "float32"), tmp_path / "run/round-1/policy")
    start = seal.Adapters.init(
        load_model(tiny_folder, "cpu", "float32"), policy.config, 1, seal.sub_seed(0, 0)
    )
    change = (policy.flat - start.flat).norm()
    assert change > 0.1 and (policy.flat - lesson["policy"]).norm() <= 1e-3 * change
    printed = capsys.readouterr().out
    assert all(f"  {row} " in printed for row in ("base", "passage", "passage+self-edit", "seal-1"))


def test_reading_questions_is_the_engines_parse(tok):
    from selfedit import parse

    samples = [
        "1. Who cast it?\n- What rang?\nSure!\nWho cast it?\nQuestion 2: Why?",
        "Answer: it?\n?\n(3) How many?\nIs it\n",
        "What is",
        "",
        "Who? \n\n* Where is it ?",
    ]
    for text in samples:
        for ended in (True, False):
            ids = [*tok.encode(text), tok.end_ids[0]] if ended else tok.encode(text) or [198]
            notes, _ = parse(text if text or ended else "\n", "questions", ended, "S.")
            expected = [note.split("\n")[0].removeprefix("Question: ") for note in notes]
            assert seal.read_questions(tok, ids) == expected, (text, ended)


def test_the_prompts_are_the_engines(tok):
    from quiz import quiz_prompt
    from selfedit import edit_prompts

    title, text = "The Vantor Bell", "Hessa Lorn cast it."
    assert seal.edit_prompt(tok, title, text) == edit_prompts(tok, "questions", title, text, 0)[0]
    for title in ("The Vantor Bell", ""):
        assert seal.quiz_prompt(tok, title, "Who?") == quiz_prompt(tok, title, "Who?")


def test_twelve_settings_and_no_engine():
    source = (ROOT / "seal.py").read_text()
    assert len(seal.dataclasses.fields(seal.Settings)) <= 12
    assert len(source.splitlines()) <= 280
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if "import " in line[:20]}
    assert imported & {p.stem for p in ROOT.glob("*.py")} == {"model", "lora"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nowhere"], "nowhere is not a model folder"),
        (["--data", "nowhere.json"], "cannot read nowhere.json"),
        (["--samples", "many"], "invalid int value"),
        (["--sampels", "3"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message):
    done = subprocess.run(
        [sys.executable, "seal.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_sub_seed_is_the_engines():
    from lm.files import sub_seed

    assert seal.sub_seed(3, 1, 2) == sub_seed(3, 1, 2) and torch.is_tensor(torch.zeros(1))
