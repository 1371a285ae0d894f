"""Does learn.py teach texts as people have them: FAQs, minutes of a meeting, notes?

    python experiments/own_texts.py --out results/own_texts.json     # 25 minutes on two cores

Each text of data/own_texts.json is studied with learn.py's own settings, once for each seed, and
then asked its quiz, in words that no note has seen. --only takes some of the texts. The first three
texts were in view when those settings were chosen; the other three ("-2") are by another hand and
were not. Adapters stay in --work: a killed run goes on where it was.
"""

import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

from data.qa import load_passages
from lm.adapters import load_adapter
from lm.files import GOES_ON, check_output, digest, run_main, write_json
from lm.flags import Parser, add_model_flags, at_least, load, result_head
from lm.intervals import bootstrap
from lm.runs import open_run
from quiz import ask, quiz_items

ROOT = Path(__file__).resolve().parent.parent
DATA, IN_VIEW = "data/own_texts.json", {"faq", "minutes", "notes"}


def parse_arguments():
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("experiment").add_argument
    add("--seeds", type=at_least(1), default=3, help="studies of each text")
    add("--only", nargs="+", help="ids of texts; default: all")
    add("--work", default="runs/own_texts", help="folder for texts and adapters")
    add("--out", default="results/own_texts.json", help="result file")
    return parser.parse_args()


def study(passage, args, seed: int) -> Path:
    """`learn.py study` of a passage's text, as anyone would run it. Returns the adapter's folder.
    Exits with one line if it fails."""
    text, memory = Path(args.work) / f"{passage.id}.txt", Path(args.work) / f"seed-{seed}"
    if not (memory / passage.id).is_dir():
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(passage.text, encoding="utf-8")
        flags = ["--title", passage.title, "--seed", seed, "--memory", memory]
        flags += ["--model", args.model, "--device", args.device, "--dtype", args.dtype]
        command = [sys.executable, ROOT / "learn.py", "study", text, *flags]
        command += ["--compile", args.compile]
        if subprocess.run(list(map(str, command))).returncode:
            raise SystemExit(f"error: {shlex.join(map(str, command))} failed")
    return memory / passage.id


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    texts = load_passages(DATA, "", 0, 0)
    if unknown := set(args.only or ()) - {p.id for p in texts}:
        raise SystemExit(f"error: --only {' '.join(sorted(unknown))}: no text of {DATA}")
    texts = [p for p in texts if not args.only or p.id in args.only]
    model, tok = load(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("work", "out", "only", "seeds")}
    settings["data_sha256"] = digest(DATA)
    open_run(args.work, settings, model)  # adapters are found again there
    rows = []
    for p in texts:
        for seed in range(args.seed, args.seed + args.seeds):
            adapter = load_adapter(model, study(p, args, seed))
            answers = ask(model, tok, quiz_items(tok, p), adapter)
            right = int(sum(a["accuracy"] for a in answers))
            print(f"{p.id} seed {seed}: {right} of {len(answers)}", flush=True)
            said = [[q.question, a["answer"], a["accuracy"]] for q, a in zip(p.questions, answers)]
            rows.append({"text": p.id, "seed": seed, "right": right, "n": len(said), "said": said})
    result = {"seeds": args.seeds, "settings": vars(args) | {"data_sha256": digest(DATA)}}
    for name, ids in (("in_view", IN_VIEW), ("other_hand", {p.id for p in texts} - IN_VIEW)):
        means = [mean_share(rows, p.id) for p in texts if p.id in ids]
        if means:
            ci95 = bootstrap(np.array(means), args.seed)
            result[name] = {"n_texts": len(means), "accuracy": float(np.mean(means)), "ci95": ci95}
    write_json(args.out, result_head(args, model) | result | {"rows": rows})


def mean_share(rows: list[dict], text: str) -> float:
    """Right answers of all, over the seeds of one text."""
    return float(np.mean([row["right"] / row["n"] for row in rows if row["text"] == text]))


if __name__ == "__main__":
    run_main(main, GOES_ON)
