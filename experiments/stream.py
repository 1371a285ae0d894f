"""Learn passages one after another: what is still known of them at the end, and what of all else?

    python experiments/stream.py --count 8 --seeds 3             # -> results/stream.json
    python experiments/stream.py --count 32 --rows separate retrieval --work FOLDER --out FILE

Each seed draws --count passages and an order. The untrained model writes notes on each, the same
for all rows; each passage is learnt from its text and its notes, in --steps steps at --lr. After
each, all quizzes are asked: the matrix. Rows:
    base          nothing is learnt
    seal          each passage's adapter, of all layers, is merged into the weights (the paper's
                  way), at --seal-lr
    top-layers    the same, with adapters of the --top-layers
    replay        the same, each passage with as many sequences of earlier ones, in twice the steps
    distilled     the same; of the earlier ones' questions it learns what the frozen base model
                  expects as the answer with the passage in view, and of the anchors of
                  data/general.json what that expects there
    separate      an adapter for each; a router picks the question's (lm/memory.py)
    consolidated  at the end one adapter is trained on all, in --consolidate-steps times as many
                  steps as all the others together, at --consolidate-lr, to expect what these, and
                  the base model on the anchors, expect there
    retrieval     nothing is learnt; the passage that the router picks stands in the prompt
Questions are asked under their passage's title, as in the paper; but in the last three rows under
the one that the router finds, for a user would not say it.

"before": accuracy on the passages without learning; "immediate": on each when it was just learnt;
"retained": on all at the end; "ratio": retained / immediate; "below_before" and "below_immediate":
passages that end below where they began (which few can, if nothing is known of them) and below
where they stood when just learnt. ci95 and these counts are over the "n_distinct" passages that the
seeds have drawn, each the mean of those that have it.
They leave out that all passages of a seed share one set of weights and one order: "by_seed" has
what each seed comes to. "against_seal": retained minus that of seal, on the same passages.
"general": accuracy on the questions of data/general.json, which have nothing to do with the
passages, and perplexity of its texts, at the end (without adapters: that of separate is the base
model's, as it is where nothing is found); "general_drop": points lost. "prompt_tokens": of a
question, on average. "bytes": of what is kept beside the base model. "seconds": of study, what a
teacher says included, for all passages of a seed; "diverged": updates that were left out. The
router of retrieval sees no notes, for a memory of texts has none; "bytes" leave out the texts and
notes that the router of separate needs.
"""

import functools
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np
import torch

import data.qa
import reward
from data.qa import load_passages
from experiments.distill import in_view
from inner import inner_update, lora_config, sft_config, update_one
from lm.files import (
    GOES_ON,
    check_output,
    chunks,
    digest,
    read_json,
    run_main,
    sub_seed,
    write_json,
)
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap, of_sums
from lm.log import Progress
from lm.packing import Example
from lm.runs import open_run
from lora import Adapters, merge, merged
from model import Transformer
from quiz import (
    GENERAL,
    about_what,
    accuracies,
    general_quiz,
    general_texts,
    means_of,
    of_passages,
    quiz_items,
    router_to,
)
from reward import (
    anchor_examples,
    consolidate,
    expecting,
    passage_examples,
    predictions,
)
from selfedit import settle, write_self_edits

MERGED = ["seal", "top-layers", "replay", "distilled"]
ROWS = ["base", *MERGED, "separate", "consolidated", "retrieval"]


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "heldout")
    add = parser.add_argument_group("experiment").add_argument
    add("--count", type=at_least(2), default=8, help="passages, one after another")
    add("--seeds", type=at_least(1), default=3, help="draws and orders of passages")
    add("--rows", nargs="+", default=ROWS, choices=ROWS, help="ways of learning")
    about = "peak learning rate of the row seal, whose adapters reach all layers"
    add("--seal-lr", type=at_least(0.0), default=2e-3, help=about)
    about = "peak learning rate of the row consolidated"
    add("--consolidate-lr", type=at_least(0.0), default=4e-3, help=about)
    about = "its steps, for each of the passages' own"
    add("--consolidate-steps", type=at_least(1), default=4, help=about)
    add("--work", default="runs/stream", help="folder for progress, to resume a killed run")
    add("--out", default="results/stream.json", help="result file")
    parser.set_defaults(lr=8e-3)
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["style"], "here: the notes are questions")
    args.rows = ["base", *(row for row in ROWS[1:] if row in args.rows)]
    return args


@torch.inference_mode()
def perplexity(model: Transformer, texts: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood per token."""
    total, tokens = 0.0, 0
    for ids in texts:
        ids = torch.tensor([ids], device=model.device)
        logp = model(ids)[0, :-1].float().log_softmax(-1)
        total -= float(logp.gather(1, ids[0, 1:, None]).sum())
        tokens += ids.size(1) - 1
    return math.exp(total / tokens)


class Stream:
    """Passages in an order, notes on them, and what is asked about them. Each row is a method that
    returns {"ids", "matrix": accuracies after each passage, on each, "immediate", "general",
    "perplexity", "prompt_tokens", "bytes", "seconds", "diverged"}."""

    def __init__(self, model, tok, passages, args, n: int, work: Path):
        self.model, self.tok, self.args, self.seed = model, tok, args, sub_seed(args.seed, n)
        order = np.random.default_rng([args.seed, n]).permutation(len(passages))
        self.passages = [passages[i] for i in order[: args.count]]
        self.general, self.log = [general_quiz()], work / f"sampled-{n}.jsonl"
        self.lora, self.config = lora_config(args, model), sft_config(args)

    @functools.cached_property
    def notes(self) -> list[list[str]]:
        how = (self.passages, 1, self.args, sub_seed(self.seed, 0), self.log)
        return [e.notes for e in write_self_edits(self.model, self.tok, *how)]

    @functools.cached_property
    def examples(self) -> list[list[Example]]:
        """What each passage is learnt from."""
        found = []
        for p, notes in zip(self.passages, self.notes):
            found.append(passage_examples(self.tok, p.title, [p.text, *notes]))
        return found

    # what is asked

    def asked(self, passages) -> list:
        return [item for p in passages for item in quiz_items(self.tok, p)]

    def routed(self, passages, known: int, shown: bool = False) -> list:
        """The questions about these passages when the first `known` of the stream are: each under
        the title of the one that the router finds, for its adapter, or with its text `shown`; for
        adapter --count, which is none, where it finds none."""
        notes = [[]] * known if shown else self.notes[:known]  # a memory of texts has none
        router, items = router_to(self.tok, self.passages[:known], notes), []
        for q in (q for p in passages for q in p.questions):
            n, found = about_what(router, self.passages, q)
            owner = self.args.count if n is None or shown else n
            items += quiz_items(self.tok, found, owner, shown and n is not None)
        return items

    def known(self, items=None, adapters=None) -> list[float]:
        return of_passages(self.model, self.tok, self.passages, adapters, items)

    def after_each(self, asked: list[list], adapters=None) -> list[list[float]]:
        """The matrix where weights stay as they are; asked[n]: all questions after passage n. What
        is asked again in the same way, under the same adapter, is answered once."""
        once = list(dict.fromkeys(item for items in asked for item in items))
        right = dict(zip(once, accuracies(self.model, self.tok, once, adapters)))
        matrix = []
        for items in asked:
            matrix.append(means_of(self.passages, [right[item] for item in items]))
        return matrix

    def result(self, matrix, general, asked, size: int, seconds=0.0, diverged=0, adapters=None):
        """Of a row. `general` and `asked`: questions as they are asked at the end."""
        return {
            "ids": [p.id for p in self.passages],
            "matrix": matrix,
            "immediate": [own[n] for n, own in enumerate(matrix)],
            "general": float(np.mean(accuracies(self.model, self.tok, general, adapters))),
            "perplexity": perplexity(self.model, general_texts(self.tok)),
            "prompt_tokens": float(np.mean([len(item.prompt) for item in asked])),
            "bytes": size,
            "seconds": round(seconds, 1),
            "diverged": diverged,
        }

    # rows: nothing is learnt

    def base(self) -> dict:
        asked = self.asked(self.passages)
        return self.result([self.known()] * self.args.count, self.asked(self.general), asked, 0)

    def retrieval(self) -> dict:
        count = self.args.count
        asked = [self.routed(self.passages, n, shown=True) for n in range(1, count + 1)]
        general = self.routed(self.general, count, shown=True)
        size = sum(len(p.text.encode()) for p in self.passages)
        return self.result(self.after_each(asked), general, asked[-1], size)

    # rows: one set of weights

    def merge_each(self, row: str) -> dict:
        """Learn each passage with the weights as they are then, and merge it into them."""
        lora = replace(self.lora, start=0) if row == "seal" else self.lora
        examples, asked, matrix = self.examples, self.asked(self.passages), []
        start, seconds, diverged = time.perf_counter(), 0.0, 0
        earlier = self.taught() if row == "distilled" else examples if row == "replay" else []
        pool = self.anchors() if row == "distilled" else []
        nothing = Adapters.init(self.model, lora, 1, self.seed)
        with merged(self.model, nothing):  # after it the weights are the base model's again
            for n, own in enumerate(examples):
                seed, config = sub_seed(self.seed, 1, n), self.config
                if row == "seal":
                    config = replace(config, lr=self.args.seal_lr)
                if pool:
                    order = np.random.default_rng(seed).permutation(len(pool))
                    own = own + [pool[i] for i in order[: len(own)]]
                    config = replace(config, steps=2 * config.steps)
                adapters = Adapters.init(self.model, lora, 1, seed)
                outcome = update_one(self.model, adapters, own, config, seed, f"{row} {n + 1}")
                if not outcome.diverged:
                    merge(self.model, adapters)
                diverged += outcome.diverged
                pool += earlier[n] if earlier else []
                seconds += time.perf_counter() - start
                matrix.append(self.known())
                start = time.perf_counter()
            size = 2 * sum(self.model.get_submodule(path).weight.numel() for path in nothing.places)
            return self.result(matrix, self.asked(self.general), asked, size, seconds, diverged)

    def taught(self) -> list[list[Example]]:
        """What each passage is learnt from; of a question what the base model expects as its answer
        with the passage in view, instead of the answer."""
        found = []
        for p, notes in zip(self.passages, self.notes):
            found.append(passage_examples(self.tok, p.title, [p.text]))
            found[-1] += in_view(self.model, self.tok, p, notes)
        return found

    def anchors(self) -> list[Example]:
        """Texts about anything, and what the base model expects there."""
        examples = anchor_examples(self.tok)
        return expecting(examples, predictions(self.model, examples))

    # rows: adapters

    @functools.cached_property
    def separately(self) -> tuple[Adapters, float, int]:
        """An adapter of each passage, as a memory keeps it, and last one that changes nothing; the
        seconds that they took, and how many diverged: those change nothing, either."""
        examples, flats, seed, diverged = self.examples, [], sub_seed(self.seed, 2), 0
        start, progress = time.perf_counter(), Progress("separate", self.args.count)
        tick = lambda tokens, loss: progress.tokens(tokens, loss=loss)  # noqa: E731
        nothing = Adapters.init(self.model, self.lora, 1, seed)
        for own in chunks(examples, self.args.population):
            adapters, config = Adapters.init(self.model, self.lora, len(own), seed), self.config
            outcomes = inner_update(self.model, adapters, own, [config] * len(own), seed, tick)
            for n, outcome in enumerate(outcomes):
                flats.append(nothing.flat if outcome.diverged else adapters.flat[n : n + 1])
                diverged += outcome.diverged
            progress.step(len(own))
        all_of_them = nothing.pick([0])
        all_of_them.flat = torch.cat([*flats, nothing.flat]).bfloat16().float()
        return all_of_them, time.perf_counter() - start, diverged

    @functools.cached_property
    def separate_result(self) -> dict:
        adapters, seconds, diverged = self.separately
        count = self.args.count
        asked = [self.routed(self.passages, n) for n in range(1, count + 1)]
        general, matrix = self.routed(self.general, count), self.after_each(asked, adapters)
        size = 2 * count * adapters.size
        return self.result(matrix, general, asked[-1], size, seconds, diverged, adapters)

    def separate(self) -> dict:
        return self.separate_result

    def consolidated(self) -> dict:
        """One adapter that expects, of each passage, what its own adapter does."""
        found, (adapters, seconds, diverged) = self.separate_result, self.separately
        start, teachers = time.perf_counter(), [adapters.pick([n]) for n in range(self.args.count)]
        steps = self.args.consolidate_steps * self.config.steps
        config = replace(self.config, lr=self.args.consolidate_lr, steps=steps)
        how = (anchor_examples(self.tok), config, sub_seed(self.seed, 3))
        adapters, outcome = consolidate(self.model, teachers, self.examples, *how)
        seconds += time.perf_counter() - start
        asked, general = (self.routed(of, self.args.count) for of in (self.passages, self.general))
        with merged(self.model, None if outcome.diverged else adapters):
            matrix = [*found["matrix"][:-1], self.known(asked)]
            how = (general, asked, 2 * adapters.size, seconds)
            result = self.result(matrix, *how, diverged + outcome.diverged)
        return result | {"immediate": found["immediate"]}

    def row(self, name: str) -> dict:
        return self.merge_each(name) if name in MERGED else getattr(self, name)()


# -----------------------------------------------------------------------------
# the result


def by_passage(results: list[dict], key: str) -> np.ndarray:
    """A value for each passage: the mean over the seeds that have drawn it."""
    found = {}
    for r in results:
        for id, value in zip(r["ids"], r["immediate"] if key == "immediate" else r["matrix"][-1]):
            found.setdefault(id, []).append(value)
    return np.array([np.mean(found[id]) for id in sorted(found)])


def summarize(found: dict, seed: int) -> list[dict]:
    """found {row: [its result of each seed]} -> "rows" of the result file."""
    retained, rows, before = {}, [], by_passage(found["base"], "retained")
    for name, results in found.items():
        immediate = by_passage(results, "immediate")
        retained[name] = by_passage(results, "retained")
        row = {"method": name, "before": float(before.mean())}
        for key, values in (("immediate", immediate), ("retained", retained[name])):
            row |= {key: float(values.mean()), f"ci95_{key}": bootstrap(values, seed)}
        if name != "base" and (immediate > 0).any():
            both = np.stack([immediate, retained[name]], axis=1)
            row["ratio"] = of_sums(lambda sums: sums[1] / sums[0], both, seed)
        row["below_before"] = int((retained[name] < before - 1e-9).sum())
        row["below_immediate"] = int((retained[name] < immediate - 1e-9).sum())
        row["by_seed"] = {
            "immediate": [float(np.mean(r["immediate"])) for r in results],
            "retained": [float(np.mean(r["matrix"][-1])) for r in results],
            "general": [r["general"] for r in results],
        }
        for key in ("general", "perplexity", "prompt_tokens", "bytes", "seconds", "diverged"):
            row[key] = float(np.mean([r[key] for r in results]))
        row["general_drop"] = 100 * (rows[0]["general"] - row["general"]) if rows else 0.0
        row["matrix"] = np.mean([r["matrix"] for r in results], axis=0).tolist()
        if "seal" in retained:
            more = retained[name] - retained["seal"]
            row["against_seal"] = {"delta": float(more.mean()), "ci95": bootstrap(more, seed)}
        rows.append(row)
    return rows


def show(row: dict) -> None:
    numbers = [100 * row[key] for key in ("before", "immediate", "retained")]
    low, high = (100 * v for v in row["ci95_retained"])
    parts = "before {:5.1f}  immediate {:5.1f}  retained {:5.1f} %".format(*numbers)
    other = f"general {100 * row['general']:.1f} %, perplexity {row['perplexity']:.1f}"
    print(f"{row['method']:12} {parts} [{low:.1f}, {high:.1f}]  {other}")


def main() -> None:
    args = parse_arguments()
    check_output(args.out)
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    if args.count > len(passages):
        raise SystemExit(f"error: --count {args.count}: there are {len(passages)} passages")
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    free = ("rows", "seeds", "work", "out")
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings |= {"data_sha256": digest(args.data), "general_sha256": digest(GENERAL)}
    work, found = open_run(args.work, settings, model), {name: [] for name in args.rows}
    for n in range(args.seeds):
        stream = Stream(model, tok, passages, args, n, work)
        for name in args.rows:
            path = work / f"{name}-{n}.json"
            if not path.is_file():
                write_json(path, stream.row(name))
            found[name].append(read_json(path))
    head = result_head(args, model) | {"seeds": args.seeds, "n_passages": args.count}
    head["n_distinct"] = len({id for result in found["base"] for id in result["ids"]})
    head["settings"] = settings
    rows = summarize(found, args.seed)
    write_json(args.out, head | {"rows": rows})
    for row in rows:
        show(row)


if __name__ == "__main__":
    run_main(main, GOES_ON)
