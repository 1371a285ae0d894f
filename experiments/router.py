"""Does learn.py find the document that a question is about, and notice when there is none?

    python experiments/router.py            # -> results/router.json

Memories of --sizes documents are drawn from the training passages, --draws of each. "found": the
share of their own quizzes' questions for which the right passage is found; "refused": the share of
the questions on three other passages, which the memory does not have, for which none is; for each
--least (lm/memory.py has the one that is used). No notes are in these memories, which would help:
they ask in other words. "own_texts": the same for the texts of data/own_texts.json, all in one
memory, cut as learn.py does; refused are the questions on 20 training passages. ci95 is over
passages, or texts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

from data.documents import COMMON, Text, passages_of, telling_words
from data.qa import load_passages
from lm.files import check_output, run_main, write_json
from lm.flags import Parser, at_least, command_line
from lm.intervals import bootstrap
from lm.memory import LEAST, Router

OTHERS = 3  # passages that a memory does not have, of each draw


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--sizes", type=at_least(1), nargs="+", default=[1, 8, 50], help="documents of a memory")
    add("--draws", type=at_least(1), default=20, help="memories of each size")
    about = "share of a question's words that a passage must have"
    add("--least", type=at_least(0.0), nargs="+", default=[LEAST, 0.5], help=about)
    add("--seed", type=at_least(0), default=0, help="same seed, same output")
    add("--out", default="results/router.json", help="result file")
    return parser.parse_args()


def router_of(passages) -> Router:
    return Router([telling_words(f"{p.title}\n{p.text}") for p in passages])


def shares(router: Router, passages, wanted: list, least: float) -> np.ndarray:
    """For each passage the share of its questions for which the router finds what is wanted: one of
    wanted[passage]."""
    values = []
    for passage, good in zip(passages, wanted):
        hits = [router.best(telling_words(q.question), least) in good for q in passage.questions]
        values.append(np.mean(hits))
    return np.array(values)


def row(size: int, least: float, found: np.ndarray, refused: np.ndarray, seed: int) -> dict:
    about = {"size": size, "least": least, "n": len(found), "n_others": len(refused)}
    for name, values in (("found", found), ("refused", refused)):
        about |= {name: float(values.mean()), f"{name}_ci95": bootstrap(values, seed)}
    return about


def drawn(passages, size: int, least: float, args) -> dict:
    """Memories of `size` passages."""
    rng, found, refused = np.random.default_rng([args.seed, size]), [], []
    for _ in range(args.draws):
        order = rng.permutation(len(passages))
        own = [passages[i] for i in order[:size]]
        others = [passages[i] for i in order[size : size + OTHERS]]
        router = router_of(own)
        found.append(shares(router, own, [[n] for n in range(size)], least))
        refused.append(shares(router, others, [[None]] * OTHERS, least))
    return row(size, least, np.concatenate(found), np.concatenate(refused), args.seed)


def own_texts(others, least: float, seed: int) -> dict:
    texts, passages, wanted = load_passages("data/own_texts.json"), [], []
    for p in texts:
        cut = passages_of(Text(p.id, p.title, p.text))
        wanted.append(range(len(passages), len(passages) + len(cut)))
        passages += cut
    router = router_of(passages)
    found = shares(router, texts, wanted, least)
    refused = shares(router, others, [[None]] * len(others), least)
    return row(len(texts), least, found, refused, seed)


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages("data/passages.json", "train")
    if max(args.sizes) + OTHERS > len(passages):
        raise SystemExit(f"error: --sizes {max(args.sizes)}: there are {len(passages)} passages")
    rows = [drawn(passages, size, least, args) for least in args.least for size in args.sizes]
    own = [own_texts(passages[:20], least, args.seed) for least in args.least]
    head = {"command": command_line(), "seed": args.seed}
    head["settings"] = vars(args) | {"common_words": len(COMMON)}
    write_json(args.out, head | {"rows": rows, "own_texts": own})
    for r in [*rows, *own]:
        shown = f"found {r['found']:.3f}, refused {r['refused']:.3f}"
        print(f"{r['size']:3} documents, least {r['least']}: {shown}")


if __name__ == "__main__":
    run_main(main)
