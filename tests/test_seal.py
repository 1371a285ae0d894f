"""seal.py, the lesson, and the engine give the same adapters, answers, rewards and selection."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script

import seal
import selfedit
import train_outer
from lm.adapters import load_adapter
from lm.checkpoint import load_model
from lm.files import read_jsonl, sub_seed
from lora import Adapters
from quiz import ANSWER_LEN, quiz_prompt, score_answer
from selfedit import edit_prompts, parse


@pytest.fixture
def cpu_float32(monkeypatch):
    """What the lesson picks by itself would be bfloat16, or a GPU, where there is one."""
    load = lambda folder: load_model(folder, "cpu", "float32")  # noqa: E731
    monkeypatch.setattr(seal, "load_model", load)


def test_the_lesson_is_the_engine(
    tiny_folder, passages_file, tmp_path, monkeypatch, cpu_float32, capsys
):
    """Three passages, two self-edits each, all layers but one adapted. The temperature is low,
    since a random model's tokens are nearly alike: their order would hang on rounding."""
    sizes = {"passages": 3, "samples": 2, "max_new": 12, "top_layers": 3, "epochs": 2}
    sizes |= {"outer_epochs": 2}
    settings = seal.Settings(str(tiny_folder), str(passages_file), **sizes, temperature=0.05)
    # A random model never ends its reply nor writes lines, and answers nothing right. So that there
    # are notes and rewards: every two words are a note, and right is what a letter count says.
    notes_in = lambda text: re.findall(r"\w+ \w+", text) or ["a note"]  # noqa: E731
    monkeypatch.setattr(seal, "read_notes", lambda tok, ids: notes_in(tok.decode(ids)))
    monkeypatch.setattr("selfedit.parse", lambda text, *_: (notes_in(text), ""))
    is_right = lambda answer, accepted: len(answer) % 3 == 0  # noqa: E731
    monkeypatch.setattr(seal, "is_right", is_right)
    nothing = {"em": 0.0, "f1": 0.0}
    scores = lambda a, golds: nothing | {"accuracy": float(is_right(a, golds))}  # noqa: E731
    monkeypatch.setattr("quiz.score_answer", scores)

    monkeypatch.setattr(seal, "ANSWER_LEN", ANSWER_LEN)
    lesson = seal.main(settings)
    adapters, update = {}, train_outer.inner_update

    def spy(model, population, examples, configs, seed, tick=None):
        outcomes = update(model, population, examples, configs, seed, tick)
        for own, flat in zip(examples, population.flat):
            adapters[tuple(e.ids for e in own)] = flat.clone()
        return outcomes

    monkeypatch.setattr(train_outer, "inner_update", spy)
    flags = ["--data", passages_file, "--out", tmp_path / "run", "--rounds", 1, "--samples", 2]
    flags += ["--max-new", 12, "--top-layers", 3, "--steps", 0, "--epochs", 2, "--row-len", 0]
    flags += ["--style", "implications", "--temperature", 0.05, "--select", "improving"]
    run_script(monkeypatch, train_outer, tiny_folder, "qa", *flags, "--outer-row-len", 0)
    records = read_jsonl(tmp_path / "run" / "round-1" / "candidates.jsonl")
    scored = read_jsonl(tmp_path / "run" / "round-1" / "scored.jsonl")

    candidates = [c for of_passage in lesson["candidates"] for c in of_passage]
    edits = [notes for of_passage in lesson["edits"] for notes in of_passage]
    assert len(records) == len(candidates) == 6 and len(scored) == 9  # and three passages alone
    for notes, c, record, result in zip(edits, candidates, records, scored):
        assert record["parts"][0]["notes"] == notes
        assert [a for a, _ in c["answers"]] == [a["answer"] for a in result["answers"]]
        assert c["reward"] == record["reward"] and c["kept"] == record["parts"][0]["kept"]
        assert len(c["losses"]) == result["steps"]
        assert c["losses"][-1] == pytest.approx(result["loss"], rel=1e-4)
        nearest = min(float((c["adapter"] - flat).norm()) for flat in adapters.values())
        assert nearest <= 1e-4 * float(c["adapter"].norm())
    assert 0 < sum(c["kept"] for c in candidates) < 6  # the selection is a real one
    alone = [[a["accuracy"] for a in result["answers"]] for result in scored[6:]]
    assert lesson["ladder"]["passage"] == [np.mean(own) for own in alone]

    model = load_model(tiny_folder, "cpu", "float32")
    policy = load_adapter(model, tmp_path / "run" / "round-1" / "policy")
    start = Adapters.init(model, policy.config, 1, seal.sub_seed(0, 0))
    change = (policy.flat - start.flat).norm()
    assert change > 0.1 and (policy.flat - lesson["policy"]).norm() <= 1e-3 * change
    printed = capsys.readouterr().out
    assert all(f"  {row} " in printed for row in ("base", "passage", "passage+self-edit", "seal-1"))


def test_reading_notes_is_the_engines_parse(tok):
    samples = [
        "Facts:\n1. Ada cast it.\n- It rang.\n\nAda cast it.\n(3) It fell.\n10.5 million came.",
        "Implication 2: So it is.\n...\n* \u2022 And\tso on\n",
        "A is",
        "",
        " \n \n",
    ]
    for text in samples:
        for ended in (True, False):
            ids = [*tok.encode(text), tok.end_ids[0]] if ended else tok.encode(text + "\n\nx")
            expected, _ = parse(text if ended else text + "\n\nx", "implications", ended)
            assert seal.read_notes(tok, ids) == expected, (text, ended)


def test_the_prompts_and_scores_are_the_engines(tok):
    title, text = "Rolm", "Ada Quell cast it."
    [prompt] = edit_prompts(tok, "implications", title, text, 1)
    assert seal.edit_prompt(tok, title, text) == prompt
    assert seal.EXAMPLE_NAMES == selfedit.EXAMPLE_NAMES
    for title in ("Rolm", ""):
        assert seal.quiz_prompt(tok, title, "Who?") == quiz_prompt(tok, title, "Who?")
    for answer in ("It was the honey.", "Honeycomb.", "", "AN old, salt-barn"):
        for accepted in (("honey", "x"), ("Old salt barn",)):
            expected = score_answer(answer, accepted)["accuracy"]
            assert seal.is_right(answer, accepted) == expected


def test_an_id_that_no_text_has_is_never_sampled(tiny_folder, cpu_float32):
    model = seal.load_model(tiny_folder)
    model.unused = [i for i in range(49_152) if i not in (7, 8, 9)]
    u = [[0.3] * 6, [0.9] * 6]
    for temperature in (0.0, 50.0):
        rows = seal.generate(model, [[5, 6], [5]], 6, (), temperature, u)
        assert {len(row) for row in rows} == {6} and {*rows[0], *rows[1]} <= {7, 8, 9}


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"passages": 0}, {"outer_epochs": 0}, {"seed": -1}, {"lr": -1.0}]
    + [{"top_layers": 0}, {"top_layers": 5}],
)
def test_settings_that_make_no_sense(wrong, tiny_folder, passages_file):
    settings = seal.Settings(tiny_folder, passages_file, **{"top_layers": 4} | wrong)
    with pytest.raises(SystemExit, match="from 1 up, seed and rates from 0, layers to 4"):
        seal.main(settings)


def test_twelve_settings_and_no_engine():
    source = (ROOT / "seal.py").read_text()
    assert len(seal.dataclasses.fields(seal.Settings)) <= 12
    assert len(source.splitlines()) <= 280
    imported = re.findall(r"^(?:from|import) (\w+)(\.\w+)?", source, re.MULTILINE)
    own = {name + rest for name, rest in imported if (ROOT / name).is_dir()}
    assert own == {"data.qa", "lm.checkpoint", "lm.files", "lm.tokenizer"}
    assert {name for name, _ in imported if (ROOT / f"{name}.py").is_file()} == {"model", "lora"}


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


def test_seeds_are_the_engines():
    assert seal.sub_seed(3, 1, 2) == sub_seed(3, 1, 2)
