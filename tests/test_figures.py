"""experiments/figures.py: figures from results made up here, and one clear line when there are
none."""

import json
import sys

import numpy as np
import pytest

from experiments import figures


def rows(shift: float):
    found = []
    for n, method in enumerate(["base", "passage", "passage+self-edit", "seal-1", "in-context"]):
        row = {"method": method, "accuracy": 0.1 * n + shift, "ci95": [0.1 * n, 0.1 * n + 0.1]}
        found.append(row | {"forward": 0.1 * n, "reversed": 0.05 * n})
    return found


@pytest.fixture
def results(tmp_path):
    for name, protocol in (
        ("qa_settings_all", "steps"),
        ("qa_ladder_best", "steps"),
        ("qa_ladder", "steps"),
        ("qa_ladder_epochs", "epochs"),
    ):
        settings = {"epochs": 6, "steps": 9, "recipes": None, "budget": 77}
        settings["settings"] = name == "qa_settings_all"
        value = {"rows": rows(0.05), "protocol": protocol, "n_passages": 48, "settings": settings}
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    metrics = []
    for k in (1, 2):
        metrics.append({"round": k, "reward_mean": 0.3, "reward_kept": None if k == 2 else 0.5})
    (tmp_path / "qa_rounds.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    return tmp_path


@pytest.fixture
def arc_results(tmp_path):
    """Two tasks, of which seal-2 solves the first; its self-edits are all alike, those before are
    not, and one is no use."""
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    task, data = {"train": [pair, pair], "test": [pair]}, tmp_path / "arc.json"
    data.write_text(json.dumps({"train": {}, "eval": {"t1": task, "t2": task}}))
    groups = ["use_size_augmentations"]
    sound = {"groups": groups, "every_token": True, "lr": 1e-3, "epochs": 30}
    tasks, configs = [], {"icl": [None], "self-edit": [sound, {}]}
    configs |= {"seal-1": [sound], "seal-2": [sound, sound]}
    for method, of_method in configs.items():
        for i in ("t1", "t2"):
            right = method == "seal-2" and i == "t1"
            record = {"id": i, "method": method, "solved": float(right)}
            record["prediction"] = ["21\n" if right else "not a grid"]
            tasks += [record | {"config": config} for config in of_method]
    found = []
    for method in ("icl", "self-edit", "seal-2"):
        found.append({"method": method, "solved": 1.0, "n": 2, "rate": 0.5, "ci95": [0.2, 0.9]})
    value = {"n_tasks": 2, "settings": {"data": str(data)}, "rows": found, "tasks": tasks}
    (tmp_path / "arc_ladder.json").write_text(json.dumps(value))
    return tmp_path


def draw(monkeypatch, folder) -> dict:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--results", str(folder)])
    figures.main()
    return {p.stem: p.read_text() for p in folder.glob("*.svg")}


def test_the_figures_of_arc(arc_results, monkeypatch):
    drawn = draw(monkeypatch, arc_results)
    assert set(drawn) == {"arc_ladder", "arc_tasks", "arc_settings"}
    assert "% of 2" in drawn["arc_ladder"] and ">1.0<" in drawn["arc_ladder"]
    page = drawn["arc_tasks"]
    assert page.index(">t1<") < page.index(">t2<") and ">seal-2<" in page and "seal-1" not in page
    assert page.count("<image") == 2 * 4 + 1
    assert page.count(">not<") == 5  # every prediction but the right one
    assert ">seal-2<" in drawn["arc_settings"] and ">repeat<" in drawn["arc_settings"]


def test_every_figure_is_drawn_the_same_each_time(results, monkeypatch):
    drawn = draw(monkeypatch, results)
    assert set(drawn) == {"ladder", "ladder_proxy", "directions", "rounds"}
    ladder, proxy = drawn["ladder"], drawn["ladder_proxy"]
    assert all(row["method"] in ladder and row["method"] in proxy for row in rows(0))
    assert "within 77" in ladder and "equal epochs" in proxy and "within 77" not in proxy
    assert "9 optimiser steps in every row" in proxy
    assert ">35.0<" in ladder and "reversed" in drawn["directions"]
    assert draw(monkeypatch, results) == drawn


def bars(axes) -> dict:
    """{name at the x axis: heights of the bars that stand there, from left to right}."""
    names = [t.get_text() for t in axes.get_xticklabels()]
    found = {name: [] for name in names}
    for bar in sorted(axes.patches, key=lambda bar: bar.get_x()):
        found[names[round(bar.get_x() + bar.get_width() / 2)]].append(bar.get_height())
    return {name: pytest.approx(heights) for name, heights in found.items()}


def test_a_row_stands_beside_its_name():
    """The first one on top; its bar, its whisker and what is written there are its own."""
    result = {"rows": rows(0.05), "protocol": "steps", "n_passages": 48}
    result["settings"] = {"epochs": 6, "steps": 9, "recipes": None}
    [axes] = figures.draw_ladder([result]).axes
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["in-context", "seal-1", "passage+self-edit", "passage", "base"]
    for n, (bar, whisker, text) in enumerate(zip(axes.patches, axes.lines, axes.texts)):
        assert bar.get_y() < n < bar.get_y() + bar.get_height()
        assert bar.get_width() == pytest.approx(45 - 10 * n)
        assert whisker.get_xydata() == pytest.approx(np.array([[40 - 10 * n, n], [50 - 10 * n, n]]))
        assert (text.get_position()[1], text.get_text()) == (n, f"{45 - 10 * n:.1f}")


def test_a_direction_has_its_own_bars():
    [axes] = figures.draw_directions({"rows": rows(0.0)}).axes
    expected = {"base": [0, 0], "passage": [10, 5], "passage\n+ self-edit": [20, 10]}
    expected |= {"seal-1": [30, 15], "in-context": [40, 20]}
    assert bars(axes) == expected
    for container, step in zip(axes.containers, (10, 5)):
        heights = [bar.get_height() for bar in container]
        assert heights == pytest.approx([n * step for n in range(5)])
    assert [c.get_label() for c in axes.containers] == ["forward", "reversed"]


def test_a_line_is_that_of_its_name():
    metrics = [
        {"round": 1, "reward_mean": 0.3, "reward_kept": 0.5},
        {"round": 2, "reward_mean": 0.4, "reward_kept": None},
    ]
    [axes] = figures.draw_rounds(metrics).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {"reinforced": [[1, 0.5]], "all": [[1, 0.3], [2, 0.4]]}


def test_a_matrix_is_that_of_its_way_of_learning():
    """Downwards what was learnt, across what is asked."""
    found = [{"method": "base", "matrix": [[0.0, 0.0]] * 2, "retained": 0.0}]
    found += [{"method": "seal", "matrix": [[0.5, 0.0], [0.1, 0.6]], "retained": 0.35}]
    found += [{"method": "separate", "matrix": [[0.5, 0.0], [0.5, 0.8]], "retained": 0.65}]
    figure = figures.draw_stream({"rows": found})
    titles = ["seal: 35 % at the end", "separate: 65 % at the end"]
    assert [axes.get_title() for axes in figure.axes[:2]] == titles
    for axes, row in zip(figure.axes, found[1:]):
        drawn = np.array(axes.images[0].get_array())
        assert drawn == pytest.approx(100 * np.array(row["matrix"]))
        assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2"]


def test_settings_before_and_after():
    """Three self-edits before, one of them no use; and one after."""
    one = {"groups": ["use_size_augmentations"], "every_token": True, "lr": 1e-3, "epochs": 30}
    two = one | {"groups": [], "lr": 2e-3, "epochs": 2}
    tasks = []
    for method, config in (
        ("self-edit", one),
        ("self-edit", two),
        ("self-edit", {}),
        ("seal-1", {}),
        ("seal-2", one | {"every_token": False}),
    ):
        tasks.append({"method": method, "config": config})
    left, middle, right = figures.draw_arc_settings({"tasks": tasks}).axes
    expected = {"sound": [200 / 3, 100], "basic": [0, 0], "size": [50, 100], "chain": [0, 0]}
    expected |= {"repeat": [0, 0], "every token": [100, 0]}
    assert bars(left) == expected
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["self-edit", "seal-2"]
    for axes, before, after in ((middle, [1e-3, 2e-3], 1e-3), (right, [2, 10], 10)):
        first, second = (line.get_xydata().tolist() for line in axes.lines)
        assert first == [[value, 50] for value in before] and second == [[after, 100]]


def test_what_is_missing_or_malformed(results, tmp_path, monkeypatch):
    (results / "qa_ladder_best.json").write_text(json.dumps({"rows": [{}]}))
    complaint = r"^error: .*qa_ladder_best.json is not as its script writes it"
    with pytest.raises(SystemExit, match=complaint):
        draw(monkeypatch, results)
    with pytest.raises(SystemExit, match="no results there to draw"):
        draw(monkeypatch, tmp_path / "nowhere")


def test_the_budget_curve():
    """A line for each method, through the points that were trained on anything; the last policy
    stands out."""
    rows = []
    methods = [*map(str, range(8)), "seal-1", "seal-2"]  # more than there are colours
    for method in methods:
        for tokens, accuracy in ((0, 0.0), (1000, 0.25), (2000, 0.5)):
            ci = [accuracy - 0.1 * bool(tokens), accuracy + 0.1 * bool(tokens)]
            rows.append({"method": method, "tokens": tokens, "accuracy": accuracy, "ci95": ci})
    [axes] = figures.draw_budget({"rows": rows, "n_passages": 3}).axes
    drawn = {c.get_label(): c for c in axes.containers}
    assert list(drawn) == methods
    for container in drawn.values():
        assert container.lines[0].get_xydata().tolist() == [[1000, 25], [2000, 50]]
        [whiskers] = container.lines[2]
        ends = [segment[:, 1].tolist() for segment in whiskers.get_segments()]
        assert ends == [pytest.approx([15, 35]), pytest.approx([40, 60])]
    paints = [container.lines[0].get_color() for container in drawn.values()]
    assert paints[-1] == figures.ORANGE and figures.ORANGE not in paints[:-1]


def test_the_ways_to_reinforce():
    """Each panel has the lines of its measure, and the last one the rows with their intervals."""
    rounds, n = {}, iter(range(99))
    for way in ("restem", "grpo"):
        rounds[way] = []
        for k in (1, 2):
            row = {name: 0.01 * next(n) for name in figures.PANELS}
            rounds[way].append(row | {"round": k})
    found = []
    for k, name in enumerate(("untrained", "restem", "grpo")):
        found.append({"row": name, "accuracy": 0.1 * k, "ci95": [0.1 * k - 0.05, 0.1 * k + 0.05]})
    figure = figures.draw_outer({"rounds": rounds, "rows": found, "n_passages": 7})
    for axes, (name, label) in zip(figure.axes, figures.PANELS.items()):
        assert axes.get_title() == label
        scale = 100 if "%" in label else 1
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert list(drawn) == ["restem", "grpo"]
        for way, values in drawn.items():
            assert values == pytest.approx([scale * r[name] for r in rounds[way]])
    last = figure.axes[-2]
    assert "7 others" in last.get_title()
    assert [t.get_text() for t in last.get_yticklabels()] == ["grpo", "restem", "untrained"]
    points = [line.get_xydata().tolist() for line in last.lines]
    assert points[1] == [[20, 0]] and points[5] == [[0, 2]]
    assert points[0] == [pytest.approx([15, 0]), pytest.approx([25, 0])]
