"""Every command in the README and in the scripts' headers is one that they accept; every file it names is there."""

import re
import shlex
import sys

import pytest
from conftest import ROOT

import bench
import eval_arc
import eval_qa
import learn
import plot
import studies
import train_outer
import warm
from common import digest, read_json
from data import prepare

SCRIPTS = {s.__name__ + ".py": s for s in (bench, eval_arc, eval_qa, learn, plot, studies, train_outer, warm)}
SOURCES = ["README.md", "Makefile", *SCRIPTS, "scaling.py", "data/prepare.py"]


def expanded(source: str) -> str:
    """A file's text with the Makefile's variables and continued lines written out."""
    text = (ROOT / source).read_text().replace("$(PY)", "python").replace("\\\\\n", " ").replace("\\\n", " ")
    for name, value in re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE):
        text = text.replace(f"$({name})", value)
    return text


def commands():
    for source in SOURCES:
        text = expanded(source)
        for line in re.findall(r"^(?:[ \t]*)(python (?:data/)?\w+\.py .*)$", text, re.MULTILINE):
            yield source, line.replace("$(notdir $@)", "arc").split("->")[0]


@pytest.mark.parametrize("source, line", list(commands()))
def test_command(source, line, monkeypatch):
    _, script, *arguments = shlex.split(line, comments=True)
    if script == "data/prepare.py":
        assert arguments[0] in prepare.TARGETS
        return
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    SCRIPTS[script].parse_arguments()


def test_there_are_commands_of_every_script():
    assert {line.split()[1] for _, line in commands()} == {*SCRIPTS, "data/prepare.py"}


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)


def test_only_the_four_packages_are_imported_at_run_time():
    allowed = {"torch", "numpy", "tiktoken", "safetensors", "data", *sys.stdlib_module_names}
    allowed |= {p.stem for p in ROOT.glob("*.py")}
    for path in ROOT.glob("*.py"):
        imported = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        assert set(imported) <= allowed | ({"matplotlib"} if path.name == "plot.py" else set()), path.name


def test_files_stay_short():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        assert len(path.read_text().splitlines()) <= 380, path.name


@pytest.mark.parametrize(
    "name, source", [("qa_ladder_best", "Makefile"), ("qa_ladder", "Makefile"), ("squad_ladder", "README.md")]
)
def test_the_readmes_table_is_the_committed_result(name, source, capsys, monkeypatch):
    result = read_json(ROOT / "results" / f"{name}.json")
    eval_qa.show(result["rows"], result["steps"], "")
    for line in capsys.readouterr().out.splitlines():
        assert line.strip() in (ROOT / "README.md").read_text(), line
    assert result["command"] in expanded(source)
    if name.startswith("qa_ladder"):
        assert result["settings"]["data_sha256"] == digest(ROOT / "data" / "passages.json")
    monkeypatch.setattr(sys, "argv", shlex.split(result["command"])[1:])
    now = vars(eval_qa.parse_arguments())  # the defaults of today are those that it was measured with
    assert {k: v for k, v in result["settings"].items() if k in now} == {k: now[k] for k in result["settings"] if k in now}


def test_the_readmes_arc_table_is_the_committed_result(capsys, monkeypatch):
    result = read_json(ROOT / "results" / "arc_ladder.json")
    eval_arc.show(result["rows"], result["steps"])
    for line in capsys.readouterr().out.splitlines():
        assert line.strip() in (ROOT / "README.md").read_text(), line
    chosen = read_json(ROOT / "results" / "arc_tasks_warm.json")
    assert result["settings"]["ids"] == chosen["heldout"] and chosen["grid"] == eval_arc.GRID
    for command, settings in ((result["command"], result["settings"]), (chosen["command"], chosen["settings"])):
        assert command in expanded("Makefile")
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        now = vars(eval_arc.parse_arguments())
        assert {k: v for k, v in settings.items() if k in now} == {k: now[k] for k in settings if k in now}


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
    alike = [r for r in alike if (r["lr"], r["steps"], r["top_layers"]) == (args.lr, args.steps, args.top_layers)]
    best = max(alike, key=lambda r: r["accuracy"])
    assert len(alike) > 6 and (best["style"], best["temperature"]) == (args.style, args.temperature)
