"""What all scripts do: they refuse what they cannot write before the work, and end in one line."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

import eval_arc
import eval_qa
import learn
import train_outer
from bench import cost, gpu, memory, speed
from experiments import (
    budget,
    choice,
    credits,
    distill,
    exercises,
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


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")], ids=lambda p: p.name)
def test_the_last_line_of_a_script(path):
    source = path.read_text()
    if "\nif __name__" in source and path.parent.name != "tests":
        assert source.splitlines()[-1].startswith(
            ("    run_main(main", "    run_main(lambda: main(")
        )


FILES = {"--out": "README.md/x.json"}
SCRIPTS = [  # script, its first arguments, what it writes
    (train_outer, ["qa", "--top-layers", 2], {"--out": "README.md"}),
    (eval_qa, [], FILES | {"--work": "README.md"}),
    (eval_arc, ["--largest", 2], FILES | {"--work": "README.md"}),
    (learn, ["study", "README.md"], {"--memory": "README.md"}),
    (notes, ["--work", "runs"], FILES),
    (proxy, ["--work", "runs"], FILES),
    (recipes, ["--top-layers", 2, "--layers", 2], FILES | {"--work": "README.md"}),
    (rewards, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (exercises, [], FILES),
    (noise, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (credits, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (grid, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (budget, [], FILES | {"--work": "README.md"}),
    (ranks, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (ship, ["--run", "runs"], {"--out": "README.md"}),
    (shown, [], {"--out": "README.md"}),
    (outer, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (stream, ["--top-layers", 2, "--count", 2], FILES | {"--work": "README.md"}),
    (choice, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (distill, ["--top-layers", 2], FILES | {"--work": "README.md"}),
    (many, ["--top-layers", 2, "--counts", 2], FILES | {"--work": "README.md"}),
    (gpu, [], FILES),
    (cost, [], FILES),
    (memory, [], FILES),
    (warm, [], {"--out": "README.md/x", "--work": "README.md"}),
    (speed, [], FILES),
]
CASES = []
for module, first, outputs in SCRIPTS:
    CASES += [(module, first, flag, path) for flag, path in outputs.items()]


@pytest.mark.parametrize("script, first, flag, path", CASES)
def test_what_cannot_be_written_is_refused_before_the_work(
    script, first, flag, path, tiny_folder, tasks_file, tmp_path, monkeypatch
):
    for work in ("write_self_edits", "sample_self_edits", "inner_update", "train_part", "Climb"):
        monkeypatch.setattr(script, work, None, raising=False)
    for work in ("reward.write_self_edits", "arc.sample_self_edits", "eval_qa.without_update"):
        monkeypatch.setattr(work, None)
    monkeypatch.setattr("eval_arc.predict", None)
    extra = ["--data", tasks_file] if script in (eval_arc, warm) else []
    if script is warm and flag == "--work":
        extra += ["--out", tmp_path / "model"]
    with pytest.raises(SystemExit, match=f"cannot write {path}|{path} exists already"):
        run_script(monkeypatch, script, tiny_folder, *first, *extra, flag, path)


def test_the_walkthrough_too(monkeypatch):
    monkeypatch.setattr(walkthrough, "build", None)
    monkeypatch.setattr(sys, "argv", ["walkthrough.py", "--out", "README.md/x"])
    with pytest.raises(SystemExit, match="cannot write README.md/x"):
        walkthrough.main()


@pytest.mark.parametrize(
    "script, first",
    [
        (train_outer, ["qa", "--top-layers", 9]),
        (eval_qa, ["--top-layers", 9]),
        (recipes, ["--top-layers", 9]),
        (recipes, ["--layers", 2, 9]),
        (rewards, ["--top-layers", 9]),
        (exercises, ["--top-layers", 9]),
    ],
)
def test_too_many_layers_are_refused_before_the_work(
    script, first, tiny_folder, passages_file, tmp_path, monkeypatch
):
    for work in ("write_self_edits", "sample_self_edits", "without_update"):
        monkeypatch.setattr(script, work, None, raising=False)
    monkeypatch.setattr("reward.write_self_edits", None)
    flags = ["--data", passages_file, "--out", tmp_path / "out"]
    if script in (eval_qa, recipes, rewards):
        flags += ["--work", tmp_path / "work"]
    if script is recipes and first[0] != "--top-layers":
        flags += ["--top-layers", 2]
    with pytest.raises(SystemExit, match="--top-layers 9: the model has 4 layers"):
        run_script(monkeypatch, script, tiny_folder, *first, *flags)
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


def command(tiny_folder, passages_file, out) -> list[str]:
    """A run of train_outer.py that says something after a second, and would take some more."""
    flags = ["--model", tiny_folder, "--device", "cpu", "--dtype", "float32", "--out", out]
    flags += ["--data", passages_file, "--max-new", 6, "--steps", 2, "--top-layers", 2]
    flags += ["--samples", 3, "--rounds", 30, "--select", "best"]
    return [sys.executable, "train_outer.py", "qa", *map(str, flags)]


def test_an_interrupted_run_says_how_to_go_on(tiny_folder, passages_file, tmp_path):
    """So it does with SIGTERM: tests/torture.py stops runs either way."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    run = command(tiny_folder, passages_file, tmp_path / "run")
    with subprocess.Popen(run, **pipes) as process:
        assert process.stdout.readline().startswith("round-1 sample 9/9")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130
    assert error == "interrupted; the same command goes on where it was\n"


def test_a_run_into_head_ends_quietly(tiny_folder, passages_file, tmp_path):
    run = command(tiny_folder, passages_file, tmp_path / "run")
    head = f'"$@" 2>{tmp_path}/stderr | head -n 1'
    done = subprocess.run(["bash", "-c", head, "bash", *run], cwd=ROOT, capture_output=True)
    assert done.stdout.startswith(b"round-1 sample 9/9") and done.stdout.count(b"\n") == 1
    assert (tmp_path / "stderr").read_text() == ""
