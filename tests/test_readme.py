"""Every command in README, docs/ and the scripts' headers is one that they accept; every file that
they name is there; every table is the committed result."""

import re
import shlex
import sys

import pytest
from conftest import ROOT

import eval_arc
import eval_qa
import learn
import report
import seal
import train_outer
from bench import cost, gpu, memory, scaling, speed
from data import prepare
from experiments import (
    budget,
    choice,
    chosen,
    credits,
    distill,
    exercises,
    figures,
    grid,
    many,
    noise,
    notes,
    outer,
    proxy,
    ranks,
    recipes,
    rewards,
    ship,
    shown,
    stream,
    walkthrough,
    warm,
)
from lm.files import digest, read_json

SCRIPTS = {f"{s.__name__.replace('.', '/')}.py": s for s in (eval_arc, eval_qa, learn, report)}
SCRIPTS |= {"train_outer.py": train_outer, "bench/speed.py": speed, "seal.py": seal}
for script in (exercises, figures, notes, proxy, recipes, rewards, walkthrough, warm):
    SCRIPTS[f"{script.__name__.replace('.', '/')}.py"] = script
for script in (credits, memory, outer, ranks):
    SCRIPTS[f"{script.__name__.replace('.', '/')}.py"] = script
for script in (budget, choice, chosen, cost, distill, gpu, grid, many, noise, ship, shown, stream):
    SCRIPTS[f"{script.__name__.replace('.', '/')}.py"] = script
DOCS = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
SOURCES = [*DOCS, "data/README.md", "Makefile", *SCRIPTS, "bench/scaling.py", "data/prepare.py"]


def expanded(source: str) -> str:
    """A file's text with the Makefile's variables and continued lines written out."""
    text = (ROOT / source).read_text().replace("$(PY)", "python")
    text = re.sub(r"\\?\\\n\s*", "", text)
    for name, value in re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE):
        text = text.replace(f"$({name})", value)
    return text


def commands():
    for source in SOURCES:
        text = expanded(source)
        for line in re.findall(r"^(?:[ \t]*)(python (?:\w+/)?\w+\.py .*)$", text, re.MULTILINE):
            yield source, line.replace("$(notdir $@)", "arc").split("->")[0]


@pytest.mark.parametrize("source, line", list(commands()))
def test_command(source, line, monkeypatch):
    _, script, *arguments = shlex.split(line, comments=True)
    if script == "data/prepare.py":
        assert arguments[0] in prepare.TARGETS
        return
    if script in ("seal.py", "experiments/walkthrough.py"):  # their parsers stand in their main()
        known = {f"--{f.name}" for f in seal.dataclasses.fields(seal.Settings)}
        assert {a for a in arguments if a.startswith("--")} <= known
        return
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    SCRIPTS[script].parse_arguments()


def test_there_are_commands_of_every_script():
    assert {line.split()[1] for _, line in commands()} == {*SCRIPTS, "data/prepare.py"}


def test_links_lead_somewhere():
    count = 0
    for source in [*DOCS, "data/README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / source).read_text()):
            assert ((ROOT / source).parent / link).exists(), f"{source}: {link}"
            count += 1
    assert count > 40


def test_minutes_of_reading():
    """25 lines a minute, of the files of a row together."""
    found = re.findall(r"^(\| \[`.*) \| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    for row, minutes in found:
        files = re.findall(r"\]\(([\w/]+\.py)\)", row)
        lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
        assert abs(lines / 25 - int(minutes)) <= 1, (row, lines)
    assert len(found) >= 12


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and all(len(line) <= 100 for line in lines)


# Commands that are recorded in results, as they were on their day (docs/LOG.md has all renames).
RENAMED = {
    "python studies.py reward": "python experiments/rewards.py",
    "python studies.py proxy": "python experiments/proxy.py",
    "python studies.py recipes": "python experiments/recipes.py",
    "python studies.py notes": "python experiments/notes.py",
}


def todays(command: str) -> str:
    for before, now in RENAMED.items():
        command = command.replace(before, now)
    return command


@pytest.mark.parametrize(
    "name",
    "reward_reliability reward_noise proxy recipes notes qa_ladder qa_ladder_best".split(),
)
def test_results_are_written_by_the_makefile(name):
    assert todays(read_json(ROOT / "results" / f"{name}.json")["command"]) in expanded("Makefile")


@pytest.mark.parametrize(
    "name, source",
    [
        ("qa_ladder_best", "Makefile"),
        ("qa_ladder", "Makefile"),
        ("qa_settings", "Makefile"),
        ("qa_settings_all", "Makefile"),
        ("other_hand", "Makefile"),
        ("squad_settings", "docs/RESULTS.md"),
        ("squad_ladder", "docs/RESULTS.md"),
    ],
)
def test_the_ladders_are_the_committed_results(name, source, capsys, monkeypatch):
    result = read_json(ROOT / "results" / f"{name}.json")
    eval_qa.show(result["rows"], result["steps"], "")
    text = (ROOT / "docs" / "RESULTS.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line.strip() in text, line
    assert result["command"] in expanded(source)
    if name.startswith("qa_ladder"):
        data = digest(ROOT / "data" / "passages.json")
        assert result["settings"]["data_sha256"] == data
    monkeypatch.setattr(sys, "argv", shlex.split(result["command"])[1:])
    now = vars(eval_qa.parse_arguments())  # today's defaults are those that it was measured with
    shared = {k: v for k, v in result["settings"].items() if k in now and k != "fixed"}
    assert shared == {k: now[k] for k in shared} and len(shared) > 20


def test_the_readmes_rows_are_the_committed_result():
    rows = {r["method"]: r for r in read_json(ROOT / "results" / "qa_settings_all.json")["rows"]}
    text, shown = (ROOT / "README.md").read_text(), 0
    for method, accuracy, low, high in re.findall(
        r"\| `([\w+-]+)` \| ([\d.]+) % \| \[([\d.]+), ([\d.]+)\] \|", text
    ):
        written = [accuracy, low, high]
        values = [rows[method]["accuracy"], *rows[method]["ci95"]]
        assert written == [f"{100 * v:.1f}" for v in values], method
        shown += 1
    assert shown == 7


def test_the_arc_table_is_the_committed_result(capsys, monkeypatch):
    result = read_json(ROOT / "results" / "arc_ladder.json")
    eval_arc.show(result["rows"], result["steps"])
    text = (ROOT / "docs" / "ARC.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line.strip() in text, line
    chosen = read_json(ROOT / "results" / "arc_tasks_warm.json")
    assert result["settings"]["ids"] == chosen["heldout"] and chosen["grid"] == eval_arc.GRID
    for of in (result, chosen):
        assert of["command"] in expanded("Makefile")
        monkeypatch.setattr(sys, "argv", shlex.split(of["command"])[1:])
        now = vars(eval_arc.parse_arguments())
        shared = {k: v for k, v in of["settings"].items() if k in now}
        assert shared == {k: now[k] for k in shared} and len(shared) > 15


def test_the_speed_table_is_the_committed_result():
    text = (ROOT / "docs" / "SPEED.md").read_text()
    for line in scaling.table(read_json(ROOT / "results" / "bench.json")["rows"]):
        assert line in text, line


def test_the_passages_gates():
    """With the figures of the committed command (data/README.md)."""
    result = read_json(ROOT / "results" / "passages.json")
    assert result["settings"]["data_sha256"] == digest(ROOT / "data" / "passages.json")
    base, shown = result["rows"]
    assert (base["method"], shown["method"]) == ("base", "in-context")
    assert base["accuracy"] <= 0.08 and shown["accuracy"] >= 0.70 and result["n_passages"] == 208


def test_how_notes_are_asked_for_by_default_did_best_in_the_recipe_study(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_qa.py"])
    args = eval_qa.parse_arguments()
    rows = read_json(ROOT / "results" / "recipes.json")["rows"]
    alike = [r for r in rows if r["method"] == "passage+self-edit"]
    same = (args.lr, args.steps, args.top_layers)
    alike = [r for r in alike if (r["lr"], r["steps"], r["top_layers"]) == same]
    best = max(alike, key=lambda r: r["accuracy"])
    assert len(alike) > 6
    assert (best["style"], best["temperature"]) == (args.style, args.temperature)
