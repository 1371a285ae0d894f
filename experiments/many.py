"""Many passages in one adapter: what does each keep of what it could have alone?

    python experiments/many.py --counts 8 62                                # -> results/many.json
    python experiments/many.py --split train --skip 24 --counts 122 --out results/122.json

The paper's table of continued pretraining (its Table 2): one LoRA learns the first 8, 62, ...
passages of a split together, each from its text and the notes of 1 or 5 self-edits (--edits); then
it is asked the quizzes of all of them. Rows:
    passages      the passages alone
    untrained     and the untrained model's notes
    seal-K        and notes of the policies (--run, --policy), in their order
With --settings, which a policy that was trained so needs, nothing but its notes is used. "alone":
accuracy on the same passages, each in an adapter of its own, with the notes of as many self-edits,
in --steps steps for each of these (--no-alone leaves it out). The one adapter takes as many steps
as make it "tokens", of training, about as many as theirs together. "lost": how much less accurate
it is. "alone_against": alone, how much more accurate than the rows above it are alone. A policy's
training passages are refused among those held out; of --split train, leave them out by --skip.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import numpy as np

import data.qa
import reward
import selfedit
from data.qa import counts, load_passages, refuse_training_passages
from inner import lora_config, sft_config, update_one
from lm.adapters import load_adapter
from lm.files import GOES_ON, chunks, digest, read_json, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load, refuse_unused, result_head
from lm.intervals import bootstrap
from lm.packing import arrange, row_tokens
from lm.runs import add_ladder_flags, find_policies, open_run, policy_digests, set_outputs
from lora import Adapters, merged
from quiz import of_passages
from reward import (
    QUESTIONS,
    accuracy_of,
    passage_candidate,
    passage_examples,
    pooled,
    study,
)
from selfedit import settle, write_self_edits

OUT = "results/many.json"


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    data.qa.add_flags(parser, "heldout")
    add = parser.add_argument_group("experiment").add_argument
    numbers = {"type": at_least(1), "nargs": "+"}
    add("--counts", **numbers, default=[8, 62], help="passages of one adapter")
    add("--edits", **numbers, default=[1, 5], help="self-edits on each passage")
    add("--no-alone", action="store_true", help="without an adapter for each passage")
    selfedit.add_settings_flags(parser)
    add_ladder_flags(parser, "qa", OUT)
    parser.set_defaults(lr=8e-3, learner="base")
    args = settle(parser.parse_args())
    refuse_unused(parser, args, ["style"], "here: the notes are questions")
    refuse_unused(parser, args, ["epochs"], "beside --steps")
    if not args.settings:
        refuse_unused(parser, args, ["budget"], "without --settings")
    if not args.steps:
        parser.error("--steps: how many for each passage and self-edit?")
    args.out = args.out or OUT
    return set_outputs(args, OUT)


class Many:
    """The passages of a split, and the notes on them."""

    def __init__(self, model, tok, passages, args, work: Path):
        self.model, self.tok, self.passages, self.args, self.work = model, tok, passages, args, work
        self.lora, self.notes = lora_config(args, model), {"passages": [[]] * len(passages)}

    def write(self, name: str) -> None:
        """self.notes[name]: of each passage the notes of each self-edit, by the model as it is."""
        copies, log = max(self.args.edits), self.work / f"{name}-sampled.jsonl"
        seed, label = sub_seed(self.args.seed, 0), f"{name} sample"
        how = (self.passages, copies, self.args, seed, log, label, QUESTIONS)
        edits = write_self_edits(self.model, self.tok, *how)
        self.notes[name] = chunks([tuple(e.notes) for e in edits], copies)

    def learnt(self, name: str, edits: int, count: int) -> list[tuple]:
        """Each of the first `count` passages, and the notes of its first self-edits together."""
        both = zip(self.passages[:count], self.notes[name])
        return [(p, pooled(own[:edits])) for p, own in both]

    def tokens_a_step(self, examples: list) -> float:
        """Of training on them, on average; a step takes a row."""
        rows = arrange(examples, self.args.row_len)
        return float(np.mean([row_tokens(examples, *row) for row in rows]))

    def together(self, name: str, edits: int, count: int) -> dict:
        """Accuracy on each passage, all in one adapter, and the tokens that it took."""
        path = self.work / f"{name}-{edits}-{count}.json"
        if not path.is_file():
            examples, seed, tokens = [], sub_seed(self.args.seed, 1), 0
            for p, notes in self.learnt(name, edits, count):
                own = passage_examples(self.tok, p.title, [p.text, *notes])
                tokens += self.args.steps * max(1, edits) * self.tokens_a_step(own)
                examples += own
            steps = round(tokens / self.tokens_a_step(examples))
            config = replace(sft_config(self.args), steps=steps)
            adapters, label = Adapters.init(self.model, self.lora, 1, seed), path.stem
            outcome = update_one(self.model, adapters, examples, config, seed, label)
            found = of_passages(self.model, self.tok, self.passages[:count], adapters)
            if outcome.diverged:  # as in quiz_candidates()
                found = [0.0] * count
            write_json(path, {"accuracy": found} | outcome.record())
        return read_json(path)

    def alone(self, name: str, edits: int) -> np.ndarray:
        """Accuracy on each of the most passages that are asked for, in an adapter of its own."""
        count, config = max(self.args.counts), sft_config(self.args)
        config = replace(config, steps=self.args.steps * max(1, edits))
        candidates = []
        for n, (p, notes) in enumerate(self.learnt(name, edits, count)):
            candidates.append(passage_candidate(self.tok, n, p, notes, config))
        log, label = self.work / f"{name}-{edits}-alone.jsonl", f"{name} {edits} alone"
        how = (self.args, sub_seed(self.args.seed, 1), log, label)
        results = study(self.model, self.tok, candidates, *how)
        return np.array(list(map(accuracy_of, results)))

    def rows(self) -> list[dict]:
        found, apart = [], {}
        for name in self.notes:
            for edits in self.args.edits if name != "passages" else [0]:
                alone = None if self.args.no_alone else self.alone(name, edits)
                apart[name, edits] = alone
                for count in self.args.counts:
                    result = self.together(name, edits, count)
                    values = np.array(result["accuracy"])
                    row = {"method": name, "edits": edits, "count": count}
                    row |= {"accuracy": float(values.mean())}
                    row |= {"ci95": bootstrap(values, self.args.seed), "tokens": result["tokens"]}
                    if alone is not None:
                        lost = alone[:count] - values
                        row |= {"alone": float(alone[:count].mean()), "lost": float(lost.mean())}
                        row["ci95_lost"] = bootstrap(lost, self.args.seed)
                        row["alone_against"] = {}
                        for other in (("passages", 0), ("untrained", edits)):
                            if other in apart and other != (name, edits):
                                more = (alone - apart[other])[:count]
                                delta = {"delta": float(more.mean())}
                                delta["ci95"] = bootstrap(more, self.args.seed)
                                row["alone_against"][other[0]] = delta
                    found.append(row)
                    print(f"{name:10} {edits} edits, {count:3} passages: {values.mean():.3f}")
        return found


def main() -> None:
    args = parse_arguments()
    passages = load_passages(args.data, args.split, args.skip, args.limit)
    if max(args.counts) > len(passages):
        raise SystemExit(f"error: --counts {max(args.counts)}: there are {len(passages)} passages")
    passages = passages[: max(args.counts)]
    policies = find_policies(args, "qa")
    refuse_training_passages(passages, args)
    model, tok = load(args)
    lora_config(args, model)  # complains now rather than after sampling
    free = "out work run policy counts no_alone".split()
    settings = {k: v for k, v in vars(args).items() if k not in free}
    settings |= {"data_sha256": digest(args.data), "passages": len(passages)}
    settings["policies"] = policy_digests(policies)
    many = Many(model, tok, passages, args, open_run(args.work, settings, model))
    many.write("untrained")
    for name, folder in policies.items():
        with merged(model, load_adapter(model, folder)):
            many.write(name)
    head = result_head(args, model) | counts(passages) | {"settings": settings}
    write_json(args.out, head | {"rows": many.rows()})


if __name__ == "__main__":
    run_main(main, GOES_ON)
