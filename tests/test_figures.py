"""plot.py: figures from results made up here, and one clear line when there is nothing to draw."""

import json
import sys

import pytest

import plot


def rows(shift: float):
    methods = ["base", "passage", "passage+self-edit", "seal-1", "in-context"]
    return [
        {
            "method": m,
            "accuracy": 0.1 * n + shift,
            "ci95": [0.1 * n, 0.1 * n + 0.1],
            "forward": 0.1 * n,
            "reversed": 0.05 * n,
        }
        for n, m in enumerate(methods)
    ]


@pytest.fixture
def results(tmp_path):
    for name, protocol in (
        ("qa_ladder_best", "steps"),
        ("qa_ladder", "steps"),
        ("qa_ladder_epochs", "epochs"),
    ):
        settings = {"epochs": 6, "steps": 9, "recipes": None}
        value = {"rows": rows(0.05), "protocol": protocol, "n_passages": 48, "settings": settings}
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    metrics = [
        {"round": k, "reward_mean": 0.3, "reward_kept": None if k == 2 else 0.5} for k in (1, 2)
    ]
    (tmp_path / "qa_rounds.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    return tmp_path


@pytest.fixture
def arc_results(tmp_path):
    """Two tasks, of which seal-2 solves the first; its self-edits are all alike, those before are not, and one is no use."""
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    data = tmp_path / "arc.json"
    data.write_text(
        json.dumps(
            {
                "train": {},
                "eval": {i: {"train": [pair, pair], "test": [pair]} for i in ("t1", "t2")},
            }
        )
    )
    sound = {"groups": ["use_size_augmentations"], "every_token": True, "lr": 1e-3, "epochs": 30}
    tasks = []
    for method, configs in {
        "icl": [None],
        "self-edit": [sound, {}],
        "seal-1": [sound],
        "seal-2": [sound, sound],
    }.items():
        for i in ("t1", "t2"):
            right = float(method == "seal-2" and i == "t1")
            tasks += [
                {
                    "id": i,
                    "method": method,
                    "solved": right,
                    "config": c,
                    "prediction": ["21\n" if right else "not a grid"],
                }
                for c in configs
            ]
    rows = [
        {"method": m, "solved": 1.0, "n": 2, "rate": 0.5, "ci95": [0.2, 0.9]}
        for m in ("icl", "self-edit", "seal-2")
    ]
    value = {"n_tasks": 2, "settings": {"data": str(data)}, "rows": rows, "tasks": tasks}
    (tmp_path / "arc_ladder.json").write_text(json.dumps(value))
    return tmp_path


def test_the_figures_of_arc(arc_results, monkeypatch):
    draw(monkeypatch, arc_results)
    figures = {p.stem: p.read_text() for p in arc_results.glob("*.svg")}
    assert set(figures) == {"arc_ladder", "arc_tasks", "arc_settings"}
    assert "% of 2" in figures["arc_ladder"] and ">1.0<" in figures["arc_ladder"]
    page = figures["arc_tasks"]
    assert page.index(">t1<") < page.index(">t2<") and ">seal-2<" in page and "seal-1" not in page
    assert (
        page.count("<image") == 2 * 4 + 1 and page.count(">not<") == 5
    )  # every prediction but the right one
    assert ">seal-2<" in figures["arc_settings"] and ">repeat<" in figures["arc_settings"]


def draw(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(folder)])
    plot.main()


def test_every_figure_is_drawn_the_same_each_time(results, monkeypatch):
    draw(monkeypatch, results)
    figures = {p.name: p.read_text() for p in results.glob("*.svg")}
    assert set(figures) == {"ladder.svg", "directions.svg", "rounds.svg"}
    assert (
        all(m["method"] in figures["ladder.svg"] for m in rows(0))
        and "equal epochs" in figures["ladder.svg"]
    )
    assert "9 optimiser steps in every row" in figures["ladder.svg"]
    assert ">35.0<" in figures["ladder.svg"] and "reversed" in figures["directions.svg"]
    draw(monkeypatch, results)
    assert figures == {p.name: p.read_text() for p in results.glob("*.svg")}


def test_what_is_missing_or_malformed(results, tmp_path, monkeypatch):
    (results / "qa_ladder_best.json").write_text(json.dumps({"rows": [{}]}))
    with pytest.raises(
        SystemExit, match=r"^error: .*qa_ladder_best.json is not as its script writes it"
    ):
        draw(monkeypatch, results)
    with pytest.raises(SystemExit, match="no results there to draw"):
        draw(monkeypatch, tmp_path / "nowhere")
