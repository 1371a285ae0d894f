"""Draw the figures of docs/ from the JSON in results/ (needs matplotlib, see requirements-dev.txt).

    python experiments/figures.py                              # every figure whose results are
                                                               there
    python experiments/figures.py --results my/results         # yours

Each figure is written beside its JSON:
    ladder.svg        qa_settings_all.json (eval_qa.py --settings): accuracy of each row, with 95 %
                      intervals
    ladder_proxy.svg  qa_ladder_best, qa_ladder and qa_ladder_epochs.json (eval_qa.py): the same
    directions.svg    qa_ladder_best.json: questions along the passage's sentences, and against them
    budget.svg        qa_budget.json (experiments/budget.py): accuracy against trained tokens, with
                      95 % intervals
    settings.svg      settings_chosen.json (experiments/chosen.py): learning rates that self-edits
                      ask for, round by round, and what they earn
    rounds.svg        qa_rounds.jsonl (metrics.jsonl of train_outer.py): reward of all and of the
                      reinforced self-edits
    outer.svg         outer.json (experiments/outer.py): ways to reinforce, round by round, and what
                      their policies are worth in the end, with 95 % intervals
    agents.svg        agents.json, and keep.svg keep.json: the same of other ways
    stream.svg        stream.json (experiments/stream.py): what is known of each passage after each
                      update
    arc_ladder.svg    arc_ladder.json (eval_arc.py): share of tasks that each row solves, 95 %
                      intervals
    arc_tasks.svg     the same: first tasks that the last seal-K row solves, and that it does not,
                      with each row's prediction
    arc_settings.svg  the same: what the self-edits ask for, before and after the last round
"""

import math
import sys
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from arc import read_grid
from data.arc import GROUPS, load_tasks
from experiments.chosen import BINS
from lm.files import read_json, read_jsonl, run_main, write_atomic
from lm.flags import Parser
from lm.intervals import protocol_title

# Told apart with any colour vision (Okabe and Ito).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
LINES = (GREY, BLUE, "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
# The ten colours of ARC's own pages.
ARC_COLOURS = (
    "#000000 #0074D9 #FF4136 #2ECC40 #FFDC00 #AAAAAA #F012BE #FF851B #7FDBFF #870C25".split()
)
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "seal",  # the same file every time
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def colour(method: str) -> str:
    return (
        ORANGE if method.startswith("seal") else GREY if method in ("base", "in-context") else BLUE
    )


def draw_rows(axes, rows: list[dict], key: str, written) -> None:
    """A bar for each row, the first one on top: row[key] in percent, its interval as a whisker,
    written(row) beside it."""
    for n, r in enumerate(rows[::-1]):
        low, high = (100 * v for v in r["ci95"])
        axes.barh(n, 100 * r[key], color=colour(r["method"]))
        axes.plot([low, high], [n, n], color="black", linewidth=1.2)
        axes.text(max(high, 0) + 1.5, n, written(r), va="center")
    axes.set_yticks(range(len(rows)), [r["method"] for r in rows[::-1]])


def draw_ladder(results: list[dict]):
    """One panel for each result, with every row's accuracy."""
    height = 0.45 * max(len(r["rows"]) for r in results) + 1.4
    figure, panels = plt.subplots(
        1, len(results), figsize=(6 * len(results), height), squeeze=False
    )
    for axes, result in zip(panels[0], results):
        draw_rows(axes, result["rows"], "accuracy", lambda r: f"{100 * r['accuracy']:.1f}")
        axes.set_xlim(0, 1.12 * max(100 * r["ci95"][1] for r in result["rows"]) + 4)
        axes.set_xlabel("quiz accuracy without the passage, %")
        title = fill(protocol_title(result), 50)
        axes.set_title(f"{title}\n{result['n_passages']} passages", fontsize=11)
    return figure


def draw_directions(result: dict):
    """Two bars for each row that has both: forward and reversed questions."""
    rows = [r for r in result["rows"] if "forward" in r and "reversed" in r]
    figure, axes = plt.subplots(figsize=(1.3 * len(rows) + 2, 3.8))
    for shift, key, paint in ((-0.2, "forward", BLUE), (0.2, "reversed", ORANGE)):
        bars = axes.bar(
            [n + shift for n in range(len(rows))],
            [100 * r[key] for r in rows],
            0.38,
            color=paint,
            label=key,
        )
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks(range(len(rows)), [r["method"].replace("+", "\n+ ") for r in rows])
    axes.set_ylabel("quiz accuracy, %")
    axes.legend(frameon=False, title="question against the sentence")
    return figure


def draw_budget(result: dict):
    """A line for each way of learning: accuracy against the trained tokens."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    methods = list(dict.fromkeys(r["method"] for r in result["rows"]))
    last = [m for m in methods if m.startswith("seal")][-1:]
    looks = zip([m for m in methods if m not in last], cycle(LINES), cycle("os^vDP"))
    for method, paint, mark in looks:
        draw_line(axes, result["rows"], method, color=paint, marker=mark, linewidth=1.2)
    for method in last:
        draw_line(axes, result["rows"], method, color=ORANGE, marker="*", linewidth=2.4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("trained tokens for each passage")
    axes.set_ylabel("quiz accuracy, %")
    axes.set_title(f"{result['n_passages']} passages", fontsize=11)
    axes.legend(frameon=False)
    return figure


def draw_line(axes, rows: list[dict], method: str, **look) -> None:
    """The points of one method that trained on anything, each with its interval."""
    own = [r for r in rows if r["method"] == method and r["tokens"]]
    values = [100 * r["accuracy"] for r in own]
    error = [[v - 100 * r["ci95"][0] for v, r in zip(values, own)]]
    error += [[100 * r["ci95"][1] - v for v, r in zip(values, own)]]
    tokens = [r["tokens"] for r in own]
    axes.errorbar(tokens, values, error, label=method, capsize=2, elinewidth=0.7, **look)


def draw_rounds(metrics: list[dict]):
    """Mean reward by outer round: of all sampled self-edits and of those that were reinforced."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for key, label, paint, mark in (
        ("reward_kept", "reinforced", ORANGE, "o"),
        ("reward_mean", "all", BLUE, "s"),
    ):
        points = [(m["round"], m[key]) for m in metrics if m[key] is not None]
        axes.plot(*zip(*points), color=paint, marker=mark, label=label)
    axes.set_xticks([m["round"] for m in metrics])
    axes.set_xlabel("outer round")
    axes.set_ylabel("mean reward")
    axes.legend(frameon=False, title="self-edits")
    return figure


def draw_stream(result: dict):
    """A panel for each way of learning: after each passage (down) the accuracy on each (across)."""
    rows = result["rows"][1:] or result["rows"]  # base, where nothing is learnt, only if alone
    width = min(4, len(rows))
    height = math.ceil(len(rows) / width)
    size = (2.6 * width + 1.2, 2.8 * height)
    figure, panels = plt.subplots(height, width, figsize=size, squeeze=False)
    for axes, r in zip(panels.flat, rows):
        n = len(r["matrix"])
        at = range(0, n, math.ceil(n / 8))
        picture = axes.imshow(100 * np.array(r["matrix"]), cmap="viridis", vmin=0, vmax=100)
        axes.set_xticks(at, [k + 1 for k in at])
        axes.set_yticks(at, [k + 1 for k in at])
        axes.set_title(f"{r['method']}: {100 * r['retained']:.0f} % at the end", fontsize=11)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("passages learnt")
    for axes in panels[-1]:
        axes.set_xlabel("asked about passage")
    figure.colorbar(picture, ax=panels, label="quiz accuracy, %", shrink=0.7)
    return figure


# -----------------------------------------------------------------------------
# ARC


def draw_arc_ladder(result: dict):
    """Every row's share of solved tasks, with their number (a mean over self-edits)."""
    figure, axes = plt.subplots(figsize=(6, 0.45 * len(result["rows"]) + 1.4))
    draw_rows(axes, result["rows"], "rate", lambda r: f"{r['solved']:.1f}")
    axes.set_xlim(0, 112)
    axes.set_xlabel(f"held-out tasks solved, % of {result['n_tasks']}")
    return figure


def arc_methods(result: dict) -> list[str]:
    """The rows that predict, in the ladder's order; of the seal-K only the last."""
    predicted = list(dict.fromkeys(r["method"] for r in result["tasks"]))
    return [m for m in predicted if not m.startswith("seal")] + [
        m for m in predicted if m.startswith("seal")
    ][-1:]


def draw_arc_tasks(result: dict, each: int = 3):
    """A line for each of the first tasks that the last row solves at its first attempt, then of
    those that it does not."""
    methods, first = arc_methods(result), {}
    for r in result["tasks"]:
        first.setdefault((r["id"], r["method"]), r)
    ids = list(dict.fromkeys(r["id"] for r in result["tasks"]))
    solved = [i for i in ids if first[i, methods[-1]]["solved"] == 1]
    ids = solved[:each] + [i for i in ids if i not in solved][:each]
    tasks = {t.id: t for t in load_tasks(result["settings"]["data"], ids=ids)}
    heads = ["example", "its output", "test", "truth", *methods]
    figure, panels = plt.subplots(
        len(ids), len(heads), figsize=(1.3 * len(heads), 1.5 * len(ids)), squeeze=False
    )
    for line, i in zip(panels, ids):
        cells = [
            *tasks[i].train[0],
            *tasks[i].test[0],
            *(first[i, m]["prediction"][0] for m in methods),
        ]
        for axes, cell in zip(line, cells):
            grid = read_grid(cell)[0] if isinstance(cell, str) else cell
            axes.set(xticks=[], yticks=[], box_aspect=1)
            axes.spines[:].set_visible(False)
            if grid is None:
                axes.text(
                    0.5,
                    0.5,
                    cell.replace(" ", "\n"),
                    ha="center",
                    va="center",
                    fontsize=8,
                    transform=axes.transAxes,
                )
            else:
                axes.imshow(grid, cmap=ListedColormap(ARC_COLOURS), vmin=0, vmax=9)
        line[0].set_ylabel(i, fontsize=8)
    for axes, head in zip(panels[0], heads):
        axes.set_title(head, fontsize=9)
    return figure


def draw_arc_settings(result: dict):
    """Shares of the self-edits that are sound, ask for each augmentation and count every token;
    learning rates; epochs."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=[2, 1, 1])
    names = ["sound", *(g.split("_")[1] for g in GROUPS), "every token"]
    before, after = "self-edit", arc_methods(result)[-1]
    for shift, method, paint in ((-0.2, before, BLUE), (0.2, after, ORANGE)):
        all_of_it = [r["config"] for r in result["tasks"] if r["method"] == method]
        sound = [c for c in all_of_it if c]
        shares = [len(sound) / len(all_of_it)]
        for group in GROUPS:
            shares.append(np.mean([group in c["groups"] for c in sound] or [0]))
        shares += [np.mean([c["every_token"] for c in sound] or [0])]
        left.bar(
            [n + shift for n in range(len(names))],
            [100 * s for s in shares],
            0.38,
            color=paint,
            label=method,
        )
        for axes, key, top in ((middle, "lr", 1e-2), (right, "epochs", 10)):
            values = [min(c[key], top) for c in sound]
            found, counts = np.unique(values, return_counts=True)
            axes.plot(found, 100 * counts / max(1, len(values)), "o-", color=paint)
            axes.set_ylim(0, 103)
    left.set_xticks(range(len(names)), names, fontsize=9)
    left.set_ylim(0, 103)
    left.set_ylabel("self-edits, %")
    left.legend(frameon=False)
    middle.set_xscale("log")
    middle.set_xticks(
        [5e-4, 1e-3, 2e-3, 5e-3, 1e-2], ["0.0005", "0.001", "0.002", "0.005", "0.01"], fontsize=9
    )
    middle.minorticks_off()
    middle.set_xlabel("learning rate")
    right.set_xlabel("epochs (10: or more)")
    return figure


def draw_chosen(result: dict):
    """For each round: which learning rates the self-edits ask for, and what they earn."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    edges = [f"from {low:g}" for low in BINS["learning_rate"]]
    for n, r in enumerate(result["rounds"]):
        own, paint = r["learning_rate"], plt.cm.Oranges(0.35 + 0.6 * n / len(result["rounds"]))
        at = np.arange(len(edges)) + 0.8 * (n + 0.5) / len(result["rounds"]) - 0.4
        shares = [100 * own.get(edge, {"n": 0})["n"] / r["all"]["n"] for edge in edges]
        label = f"round {r['round']}"
        left.bar(at, shares, 0.75 / len(result["rounds"]), color=paint, label=label)
        seen = [(x, own[edge]) for x, edge in zip(at, edges) if edge in own]
        for x, earned in seen:
            right.plot([x, x], [100 * v for v in earned["ci95"]], color=paint)
        values = [100 * earned["value"] for _, earned in seen]
        right.plot([x for x, _ in seen], values, "o", color=paint)
    for axes in (left, right):
        axes.set_xticks(range(len(edges)), edges, fontsize=9)
        axes.set_xlabel("learning rate that is asked for")
    left.set_ylabel("self-edits, %")
    left.legend(frameon=False)
    right.set_ylabel("what they earn: accuracy, %")
    return figure


PANELS = {
    "reward": "what the self-edits earned, %",
    "repeats": "texts that say the same twice, %",
    "endless": "texts that do not end, %",
    "distinct": "unlike pairs of words, %",
    "surprise": "surprise at own words, nats",
    "apart": "likelier than to the base, nats",
}


def draw_outer(result: dict):
    """A panel for each of PANELS, by round, with a line for each way; and one with the accuracy on
    evaluation passages."""
    figure, panels = plt.subplots(2, 4, figsize=(14, 6.4))
    looks = dict(zip(result["rounds"], zip(cycle(LINES[1:]), "os^vDPX")))
    for axes, (key, label) in zip(panels.flat, PANELS.items()):
        scale = 100 if label.endswith("%") else 1
        for way, rounds in result["rounds"].items():
            paint, mark = looks[way]
            values = [scale * r[key] for r in rounds]
            axes.plot([r["round"] for r in rounds], values, color=paint, marker=mark, label=way)
        axes.set_xticks([r["round"] for r in rounds])
        axes.set_xlabel("round")
        axes.set_title(label, fontsize=11)
    panels[1, 3].axis("off")
    panels[1, 3].legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, loc="center")
    axes = panels[1, 2]
    for n, row in enumerate(result["rows"][::-1]):
        paint, mark = looks.get(row["row"], (GREY, "o"))
        axes.plot([100 * v for v in row["ci95"]], [n, n], color=paint)
        axes.plot(100 * row["accuracy"], n, mark, color=paint)
    axes.set_yticks(range(len(result["rows"])), [row["row"] for row in result["rows"][::-1]])
    axes.set_title(f"accuracy on {result['n_passages']} others, %", fontsize=11)
    return figure


def parse_arguments():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--results", default="results", help="folder with the JSON; the figures go there too"
    )
    return parser.parse_args()


def main() -> None:
    folder = Path(parse_arguments().results)
    names = "qa_ladder_best.json", "qa_ladder.json", "qa_ladder_epochs.json"
    proxy = [folder / name for name in names if (folder / name).is_file()]
    arc = [folder / "arc_ladder.json"]
    figures = {
        "ladder": ([folder / "qa_settings_all.json"], lambda path: draw_ladder([read_json(path)])),
        "ladder_proxy": (proxy, lambda *paths: draw_ladder([read_json(p) for p in paths])),
        "directions": (proxy[:1], lambda path: draw_directions(read_json(path))),
        "budget": ([folder / "qa_budget.json"], lambda path: draw_budget(read_json(path))),
        "stream": ([folder / "stream.json"], lambda path: draw_stream(read_json(path))),
        "rounds": ([folder / "qa_rounds.jsonl"], lambda path: draw_rounds(read_jsonl(path))),
        "settings": (
            [folder / "settings_chosen.json"],
            lambda path: draw_chosen(read_json(path)),
        ),
    }
    for name in ("outer", "agents", "keep"):
        figures[name] = ([folder / f"{name}.json"], lambda path: draw_outer(read_json(path)))
    figures |= {
        "arc_ladder": (arc, lambda path: draw_arc_ladder(read_json(path))),
        "arc_tasks": (arc, lambda path: draw_arc_tasks(read_json(path))),
        "arc_settings": (arc, lambda path: draw_arc_settings(read_json(path))),
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, (sources, draw) in figures.items():
            if sources and all(p.is_file() for p in sources):
                try:
                    figure = draw(*sources)
                except (KeyError, TypeError, ValueError) as e:
                    raise SystemExit(
                        f"error: {sources[0]} is not as its script writes it: {e!r}"
                    ) from e
                save = partial(figure.savefig, format="svg", metadata={"Date": None})
                write_atomic(folder / f"{name}.svg", save)
                plt.close(figure)
                drawn.append(f"{name}.svg")
    if not drawn:
        raise SystemExit(f"error: {folder}: no results there to draw (see -h)")
    print(f"{folder}: {' '.join(drawn)}")


if __name__ == "__main__":
    run_main(main)
