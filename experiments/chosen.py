"""What did self-edits ask for, round by round, and what did it earn?

    python experiments/chosen.py --run runs/seal    # -> results/settings_chosen.json

For each round of a train_outer.py qa --settings run: of all its self-edits, how many ask for a
learning rate within each of BINS, and so on, and the mean accuracy after studying as they say; with
a 95 % bootstrap interval over passages. A self-edit without sound settings is "none", and earns
nothing. Round K is written by the policy after round K - 1, the first one by the untrained model.

"worth" is what each setting is worth beside the others: the coefficients of least squares, accuracy
on features(), of all rounds' sound self-edits, within passages; 0.1 is ten points. "n" says how
many have the feature.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

from lm.files import check_output, run_main, write_json
from lm.flags import Parser, command_line
from lm.intervals import of_sums
from lm.runs import Rounds, read_settings
from selfedit import DATA, TOOLS, SelfEdit, read_edits

BINS = {"learning_rate": (0, 0.003, 0.006, 0.009, 0.012), "epochs": (0, 2, 4, 8, 12)}


def parse_arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a train_outer.py qa --settings run")
    parser.add_argument("--out", default="results/settings_chosen.json", help="result file")
    return parser.parse_args()


def kind(e: SelfEdit, key: str) -> str:
    """Which bar of the histogram of `key` it belongs to."""
    if not e.settings:
        return "none"
    if key not in BINS:
        value = e.settings[key]
        return ", ".join(value) or "none of these" if key == "data" else str(value)
    return f"from {low_edge(e.settings, key):g}"


def low_edge(settings: dict, key: str) -> float:
    """The lower edge of the bin that it falls into."""
    return max(edge for edge in BINS[key] if edge <= settings[key])


def mean_of(sums: np.ndarray) -> np.ndarray:
    """Of sums (2, ...) of accuracies and of their number; 0 of none."""
    return np.divide(sums[0], sums[1], out=np.zeros_like(sums[0]), where=sums[1] > 0)


def earned(edits: list[SelfEdit], passages: list[str], seed: int) -> dict:
    """{"n", "value", "ci95"}: how many there are, and their mean accuracy."""
    sums = np.zeros((len(passages), 2))
    for e in edits:
        sums[passages.index(e.passage)] += (e.score["accuracy"], 1)
    return {"n": len(edits)} | of_sums(mean_of, sums, seed)


def of_round(edits: list[SelfEdit], seed: int) -> dict:
    passages, found = list(dict.fromkeys(e.passage for e in edits)), {}
    for key in ("learning_rate", "epochs", "data", "loss"):
        by = {}
        for e in edits:
            by.setdefault(kind(e, key), []).append(e)
        found[key] = {k: earned(by[k], passages, seed) for k in sorted(by)}
    best = []
    for p in passages:
        best.append(max((e for e in edits if e.passage == p), key=lambda e: e.score["accuracy"]))
    found["all"], found["best"] = (earned(own, passages, seed) for own in (edits, best))
    return found


def features(settings: dict) -> dict:
    """{name: is it so?}; where all are not, it is studied in one epoch, at the lowest rate, all
    tokens counted, and nothing is."""
    found = {name: name in settings["data"] for name in DATA}
    found |= {tool: settings[tool] > 0 for tool in TOOLS}
    found["answers only"] = settings["loss"] == "answers"
    for key, edges in BINS.items():
        low = low_edge(settings, key)
        found |= {f"{key} from {edge:g}": edge == low for edge in edges[1:]}
    return found


def worth(edits: list[SelfEdit], seed: int) -> dict:
    """{feature: {"n", "value", "ci95"}}; a feature that no self-edit has is worth 0."""
    sound = [e for e in edits if e.settings and not e.flaw]
    names, sums, n = list(features(sound[0].settings)) if sound else [], [], 0
    for p in dict.fromkeys(e.passage for e in sound):
        own = [e for e in sound if e.passage == p]
        x = np.array([list(features(e.settings).values()) for e in own], float)
        n += x.sum(axis=0)
        x -= x.mean(axis=0)
        y = np.array([e.score["accuracy"] for e in own])
        sums.append(np.concatenate([(x.T @ x).ravel(), x.T @ y]))
    found = {}
    for k, name in enumerate(names):
        found[name] = {"n": int(n[k])} | of_sums(partial(coefficient, k), sums, seed, n=2000)
    return found


def coefficient(k: int, sums: np.ndarray) -> np.ndarray:
    """The k-th of least squares, of sums (F * F + F, ...) of products of features with each other
    and with what is to be explained."""
    F = int(len(sums) ** 0.5)
    squares, products = sums[: F * F].T.reshape(-1, F, F), sums[F * F :].T.reshape(-1, F)
    solved = np.linalg.solve(squares + 1e-9 * np.eye(F), products[..., None])
    return solved[:, k, 0].squeeze()


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    settings = read_settings(args.run, "seed", "settings", "model")
    if not settings["settings"]:
        raise SystemExit(f"error: --run {args.run}: its self-edits do not say how they are studied")
    rounds, found, written = Rounds(args.run, 0), [], []
    for k in range(1, rounds.done + 1):
        edits = read_edits(rounds.folder(k) / "candidates.jsonl")
        written += edits
        found.append({"round": k} | of_round(edits, settings["seed"]))
        for name in ("all", "best"):
            print(f"round {k} {name:4}  {100 * found[-1][name]['value']:.1f} %")
    found = {"rounds": found, "worth": worth(written, settings["seed"])}
    head = {"command": command_line(), "seed": settings["seed"], "model": settings["model"]}
    write_json(args.out, head | {"settings": settings} | found)


if __name__ == "__main__":
    run_main(main)
