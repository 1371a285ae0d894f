"""Does learn.py find the document that a question is about, and notice when there is none?

    python experiments/router.py            # -> results/router.json

Memories of --sizes documents are drawn from the training passages, --draws of each. "found": the
share of their own quizzes' questions for which the right passage is found; "refused": the share of
the questions on three other passages, which the memory does not have, for which none is, and
"anything" that of questions about anything (data/anything.json); for each --least. lm/memory.py has
the one that is used, which was chosen by these figures. No notes are in these memories, which would
help: they ask in other words. "own_texts": the same for the texts of data/own_texts.json, all in
one memory, cut as learn.py does; refused are the questions on 20 training passages. ci95 are over
the "n_" passages, texts or questions, each the mean of its draws.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

from data.documents import COMMON, Text, passages_of, telling_words
from data.qa import load_passages
from lm.files import check_output, read_json, run_main, write_json
from lm.flags import Parser, at_least, command_line
from lm.intervals import bootstrap
from lm.memory import LEAST, Router
from lm.tokenizer import Tokenizer
from quiz import router_to

ANYTHING = Path(__file__).resolve().parent.parent / "data" / "anything.json"
OTHERS = 3  # passages that a memory does not have, of each draw


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    about = "Hugging Face folder; its tokenizer says how common a word is"
    add("--model", default="checkpoints/smollm2-135m-instruct", help=about)
    add("--sizes", type=at_least(1), nargs="+", default=[1, 8, 50], help="documents of a memory")
    add("--draws", type=at_least(1), default=20, help="memories of each size")
    about = "share of a question's words that a passage must have"
    add("--least", type=at_least(0.0), nargs="+", default=[0.3, 0.4, LEAST], help=about)
    add("--seed", type=at_least(0), default=0, help="same seed, same output")
    add("--out", default="results/router.json", help="result file")
    return parser.parse_args()


def anything() -> list[str]:
    return read_json(ANYTHING)["questions"]


def hits(router: Router, questions: list[str], wanted, least: float) -> list[bool]:
    """For which questions does the router find what is wanted, one of these numbers?"""
    return [router.best(telling_words(question), least) in wanted for question in questions]


def shares(router: Router, passages, wanted: list, least: float) -> list[float]:
    """Of each passage's questions those for which the router finds one of wanted[passage]."""
    values = []
    for passage, good in zip(passages, wanted, strict=True):
        own = [q.question for q in passage.questions]
        values.append(float(np.mean(hits(router, own, good, least))))
    return values


def measured(router: Router, own, wanted: list, others, least: float) -> dict:
    """Values of "found", a passage or text each, "refused", another one each, and "anything", a
    question each."""
    found = {"found": shares(router, own, wanted, least)}
    found["refused"] = shares(router, others, [[None]] * len(others), least)
    found["anything"] = list(map(float, hits(router, anything(), [None], least)))
    return found


def row(size: int, least: float, found: dict, seed: int) -> dict:
    about = {"size": size, "least": least}
    for name, values in found.items():
        values = np.array(values)
        about |= {f"n_{name}": len(values), name: float(values.mean())}
        about[f"{name}_ci95"] = bootstrap(values, seed)
    return about


def drawn(tok: Tokenizer, passages, size: int, least: float, args) -> dict:
    """Memories of `size` passages."""
    rng, found = np.random.default_rng([args.seed, size]), {}
    for _ in range(args.draws):
        order = rng.permutation(len(passages))
        drawn_now = {"found": order[:size], "refused": order[size : size + OTHERS]}
        own = [passages[i] for i in drawn_now["found"]]
        others = [passages[i] for i in drawn_now["refused"]]
        router = router_to(tok, own, [[]] * size)
        values = measured(router, own, [[n] for n in range(size)], others, least)
        drawn_now["anything"] = range(len(values["anything"]))
        for name, numbers in drawn_now.items():
            for n, value in zip(numbers, values[name], strict=True):
                found.setdefault(name, {}).setdefault(n, []).append(value)
    means = {name: list(map(np.mean, of.values())) for name, of in found.items()}
    return row(size, least, means, args.seed)


def own_texts(tok: Tokenizer, others, least: float, seed: int) -> dict:
    texts, passages, wanted = load_passages("data/own_texts.json"), [], []
    for p in texts:
        cut = passages_of(Text(p.id, p.title, p.text))
        wanted.append(range(len(passages), len(passages) + len(cut)))
        passages += cut
    router = router_to(tok, passages, [[]] * len(passages))
    return row(len(texts), least, measured(router, texts, wanted, others, least), seed)


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages("data/passages.json", "train")
    if max(args.sizes) + OTHERS > len(passages):
        raise SystemExit(f"error: --sizes {max(args.sizes)}: there are {len(passages)} passages")
    tok = Tokenizer(args.model)
    rows = [drawn(tok, passages, size, least, args) for least in args.least for size in args.sizes]
    own = [own_texts(tok, passages[:20], least, args.seed) for least in args.least]
    head = {"command": command_line(), "seed": args.seed}
    head["settings"] = vars(args) | {"common_words": len(COMMON)}
    write_json(args.out, head | {"rows": rows, "own_texts": own})
    for r in [*rows, *own]:
        shown = ", ".join(f"{name} {r[name]:.3f}" for name in ("found", "refused", "anything"))
        print(f"{r['size']:3} documents, least {r['least']}: {shown}")


if __name__ == "__main__":
    run_main(main)
