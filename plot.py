"""Draw the figures of the README from the JSON in results/ (needs matplotlib, see requirements-dev.txt).

    python plot.py                              # every figure whose results are there
    python plot.py --results my/results         # yours

Each figure is written beside its JSON:
    ladder.svg        qa_ladder.json and qa_ladder_epochs.json (eval_qa.py): accuracy of each row, 95 % intervals
    directions.svg    qa_ladder.json: questions along the passage's sentences, and against them
    rounds.svg        qa_rounds.jsonl (metrics.jsonl of train_outer.py): reward of all and of the reinforced self-edits
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from common import read_json, read_jsonl
from eval_qa import protocol_title
from quiz import HelpFormatter, Parser

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # told apart with any colour vision (Okabe and Ito)
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "seal",  # the same file every time
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def colour(method: str) -> str:
    return ORANGE if method.startswith("seal") else GREY if method in ("base", "in-context") else BLUE


def draw_ladder(results: list[dict]):
    """One panel for each result; a row's bar is its accuracy in percent, its whisker the interval."""
    height = 0.45 * max(len(r["rows"]) for r in results) + 1.4
    figure, panels = plt.subplots(1, len(results), figsize=(6 * len(results), height), squeeze=False)
    for axes, result in zip(panels[0], results):
        rows = result["rows"][::-1]  # the first one on top
        for n, r in enumerate(rows):
            low, high = (100 * v for v in r["ci95"])
            axes.barh(n, 100 * r["accuracy"], color=colour(r["method"]))
            axes.plot([low, high], [n, n], color="black", linewidth=1.2)
            axes.text(max(high, 0) + 1.5, n, f"{100 * r['accuracy']:.1f}", va="center")
        axes.set_yticks(range(len(rows)), [r["method"] for r in rows])
        axes.set_xlim(0, 1.12 * max(100 * r["ci95"][1] for r in rows) + 4)
        axes.set_xlabel("quiz accuracy without the passage, %")
        axes.set_title(f"{protocol_title(result)}\n{result['n_passages']} passages", fontsize=11)
    return figure


def draw_directions(result: dict):
    """Two bars for each row that has both: forward and reversed questions."""
    rows = [r for r in result["rows"] if "forward" in r and "reversed" in r]
    figure, axes = plt.subplots(figsize=(1.3 * len(rows) + 2, 3.8))
    for shift, key, paint in ((-0.2, "forward", BLUE), (0.2, "reversed", ORANGE)):
        bars = axes.bar([n + shift for n in range(len(rows))], [100 * r[key] for r in rows], 0.38, color=paint, label=key)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks(range(len(rows)), [r["method"].replace("+", "\n+ ") for r in rows])
    axes.set_ylabel("quiz accuracy, %")
    axes.legend(frameon=False, title="question against the sentence")
    return figure


def draw_rounds(metrics: list[dict]):
    """Mean reward by outer round: of all sampled self-edits and of those that were reinforced."""
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for key, label, paint, mark in (("reward_kept", "reinforced", ORANGE, "o"), ("reward_mean", "all", BLUE, "s")):
        points = [(m["round"], m[key]) for m in metrics if m[key] is not None]
        axes.plot(*zip(*points), color=paint, marker=mark, label=label)
    axes.set_xticks([m["round"] for m in metrics])
    axes.set_xlabel("outer round")
    axes.set_ylabel("mean reward")
    axes.legend(frameon=False, title="self-edits")
    return figure


def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--results", default="results", help="folder with the JSON; the figures go there too")
    return parser.parse_args()


def main() -> None:
    folder = Path(parse_arguments().results)
    ladders = [folder / name for name in ("qa_ladder.json", "qa_ladder_epochs.json")]
    figures = {
        "ladder": ([p for p in ladders if p.is_file()], lambda *paths: draw_ladder([read_json(p) for p in paths])),
        "directions": (ladders[:1], lambda path: draw_directions(read_json(path))),
        "rounds": ([folder / "qa_rounds.jsonl"], lambda path: draw_rounds(read_jsonl(path))),
    }
    drawn = []
    with plt.rc_context(STYLE):
        for name, (sources, draw) in figures.items():
            if sources and all(p.is_file() for p in sources):
                try:
                    figure = draw(*sources)
                except (KeyError, TypeError, ValueError) as e:
                    raise SystemExit(f"error: {sources[0]} is not as its script writes it: {e!r}") from e
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                plt.close(figure)
                drawn.append(f"{name}.svg")
    if not drawn:
        raise SystemExit(f"error: {folder}: no results there to draw (see plot.py -h)")
    print(f"{folder}: {' '.join(drawn)}")


if __name__ == "__main__":
    main()
