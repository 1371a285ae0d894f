"""One passage through the code, with its real prompts, ids, shapes, losses, credits and answers.

    python experiments/walkthrough.py        # writes docs/WALKTHROUGH.md anew

tests/test_walkthrough.py holds the document to what this writes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

import torch

from data.qa import load_passages
from data.text import sentences
from inner import SFTConfig, inner_update, lay_rows, plan_steps
from lm.checkpoint import load_model
from lm.files import check_output, run_main, sub_seed, write_atomic
from lm.flags import Parser
from lm.kernels import swap_in
from lm.packing import attend_to
from lm.tokenizer import Tokenizer
from lora import PROJECTIONS, Adapters, LoRAConfig
from quiz import ask, quiz_items
from reward import credit, passage_candidate, quiz_candidates, select, to_imitate
from selfedit import edit_prompts, note_reader, policy_example, sample_self_edits

MODEL, DATA, SKIP, SEED = "checkpoints/smollm2-135m-instruct", "data/passages.json", 40, 0
SAMPLING = SimpleNamespace(style="questions", shots=1, max_new=80, temperature=0.7, top_p=0.95)


def quoted(text: str) -> str:
    return "\n".join(["```", text.rstrip("\n"), "```", ""])


def shape(x) -> str:
    return f"({', '.join(map(str, x.shape))})"


def asking(tok, passage) -> tuple[dict, list[str]]:
    prompts = edit_prompts(tok, SAMPLING.style, passage.title, passage.text, SAMPLING.shots)
    text, ids = tok.decode(prompts[0]), prompts[0]
    lines = [
        f"# One passage through the code: {passage.title}",
        "",
        "Written by `python experiments/walkthrough.py`, in float32 on a CPU; a test holds it to",
        "that. SmolLM2-135M-Instruct, seed 0. Two self-edits, eight steps: small enough to show.",
        "",
        "## 1. Sample: SE ~ LM_theta( . | C)",
        "",
        "The passage C, as `data.text.sentences` cuts it:",
        "",
        quoted("\n".join(f"{k}  {t}" for k, t in enumerate(sentences(passage.text)))),
        f"Each sentence is a prompt (`selfedit.edit_prompts`). The first has {len(ids)} tokens,",
        f"{' '.join(map(str, ids[:6]))} ... {' '.join(map(str, ids[-4:]))}:",
        "",
        quoted(text),
    ]
    return {passage.id: prompts}, lines


def writing(edits) -> list[str]:
    lines = [
        "`selfedit.sample_self_edits` continues all prompts at once, twice each. What comes out of",
        "`parse` is one `Part` for each sentence; here are the two self-edits' first parts:",
        "",
    ]
    for n, e in enumerate(edits):
        part = e.parts[0]
        shown = [f"sampled {part.text!r}", f"flaw    {part.flaw!r}", f"target  {part.target!r}"]
        lines += [f"Self-edit {n}, {len(e.notes)} notes in {len(e.parts)} parts:", ""]
        lines += [quoted("\n".join([*shown, *(f"note    {note!r}" for note in part.notes)]))]
    return lines


def training(model, tok, candidates, lora) -> list[str]:
    first = candidates[0]
    passage, note = first.examples[:2]
    [own, *_] = lay_rows(model, [first.examples], [first.config], lora.start)
    adapters = Adapters.init(model, lora, len(candidates), sub_seed(SEED, 1))
    a, b = adapters.views(adapters.flat, next(iter(adapters.places)))
    forked = next(row for row in own if row.lengths[0])
    bias = attend_to([forked], model).bias
    lines = [
        "## 2. Inner update: theta_i = SFT(theta_0, SE_i)",
        "",
        "`reward.passage_candidate` makes training sequences: the passage, every token of which is",
        "counted, and each note as the chat in which the quiz would ask it, of which the answer",
        "and its end are counted:",
        "",
        quoted(
            f"passage  {len(passage.ids)} tokens, {sum(passage.counts)} counted\n"
            f"note     {len(note.ids)} tokens, {sum(note.counts)} counted:\n"
            f"{tok.decode(note.ids)}"
        ),
        f"`lm.packing.arrange` puts the {len(first.examples)} sequences of candidate 0 into "
        f"{len(own)} rows of at most",
        f"{first.config.row_len} tokens. `lengths` are those of the prefix that a row's sequences "
        "share, and of each:",
        "",
    ]
    rows = [f"row {n}: {len(r.ids)} tokens, lengths {r.lengths}" for n, r in enumerate(own)]
    lines += [
        quoted("\n".join(rows)),
        f"A mask {shape(bias)} lets each sequence of row {own.index(forked)} see the prefix and "
        "itself (`Packed`).",
        f"The frozen layers 0 to {lora.start - 1} run once: `x` {shape(forked.x)}. An adapter of",
        f"layer {lora.start}'s q_proj is A {shape(a)} and B {shape(b)}, the population axis first; "
        "one candidate's",
        f"A and B of all layers are a row of `flat` {shape(adapters.flat)}. B is zero: nothing has "
        "changed yet.",
        "",
        f"Rows that the {first.config.steps} steps take: "
        f"{[r for step in plan_steps(len(own), first.config, sub_seed(SEED, 1)) for r in step]}.",
        "",
    ]
    return lines


def learning(candidates, outcomes) -> list[str]:
    lines = ["`inner.inner_update` trains both side by side; each one's loss at each step:", ""]
    shown = []
    for n, outcome in enumerate(outcomes):
        losses = "  ".join(f"{loss:.2f}" for loss in outcome.losses)
        shown.append(f"candidate {n}: {losses}")
    return [*lines, quoted("\n".join(shown))]


def quizzing(tok, passage, before, results) -> list[str]:
    item = quiz_items(tok, passage)[0]
    lines = [
        "## 3. Quiz: A ~ LM_theta_i( . | tau)",
        "",
        f"The first question's prompt ({len(item.prompt)} tokens): the passage is not in it.",
        "",
        quoted(tok.decode(item.prompt)),
        "The answers (`quiz.ask`) of the untrained model and of both candidates:",
        "",
    ]
    shown = []
    for i, question in enumerate(passage.questions):
        shown.append(f"{question.question} ({' / '.join(question.answers)})")
        answers = {"untrained": before[i]}
        for n, r in enumerate(results):
            answers[f"candidate {n}"] = r["answers"][i]
        for name, a in answers.items():
            shown.append(f"    {name:11} {a['accuracy']:.0f}  {a['answer']}")
    return [*lines, quoted("\n".join(shown))]


def rewarding(edits) -> list[str]:
    lines = [
        "## 4. Reward, credit, selection",
        "",
        "A self-edit's reward is its share of right answers; a part's credit that of the questions",
        "about its sentence (`reward.credit`), None where none is. `reward.select` keeps each",
        "sentence's best part, if it earned more than the mean:",
        "",
    ]
    shown = []
    for n, e in enumerate(edits):
        shown.append(f"self-edit {n}: reward {e.reward:.2f}, {e.why}")
        for k, part in enumerate(e.parts):
            earned = "None" if part.credit is None else f"{part.credit:.2f}"
            shown.append(f"    part {k}: credit {earned}{', kept' if part.kept else ''}")
    return [*lines, quoted("\n".join(shown))]


def reinforcing(tok, pairs) -> list[str]:
    lines = ["## 5. Outer update: theta <- SFT(theta, {SE_i: kept})", ""]
    if not pairs:
        return [*lines, "Nothing was kept, so nothing is imitated.", ""]
    example = policy_example(tok, *pairs[0])
    return [
        *lines,
        f"{len(pairs)} parts are imitated. The first is a sequence of {len(example.ids)} tokens,",
        f"of which the {sum(example.counts)} of the reply and its end are counted, so that the",
        "model also learns to stop:",
        "",
        quoted(pairs[0][1] + "<|im_end|>"),
        "`inner.update_one` trains the policy's adapter on them, by the same routine.",
        "",
    ]


def build() -> str:
    model, tok = load_model(MODEL, "cpu", "float32"), Tokenizer(MODEL)
    swap_in(model)
    [passage] = load_passages(DATA, "train", SKIP, 1)
    prompts, lines = asking(tok, passage)
    read = note_reader([passage], SAMPLING.style, SAMPLING.shots)
    edits = sample_self_edits(model, tok, prompts, read, 2, SAMPLING, sub_seed(SEED, 0))
    lines += writing(edits)

    n_layer = model.config.n_layer
    lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), n_layer - 10, n_layer)
    config, candidates = SFTConfig(steps=8), []
    for n, e in enumerate(edits):
        candidates.append(passage_candidate(tok, n, passage, e.notes, config))
    lines += training(model, tok, candidates, lora)

    with torch.no_grad():
        before = ask(model, tok, quiz_items(tok, passage))
    adapters, seed = Adapters.init(model, lora, 2, sub_seed(SEED, 1)), sub_seed(SEED, 1)
    examples, configs = [c.examples for c in candidates], [config] * 2
    outcomes = inner_update(model, adapters, examples, configs, seed)
    lines += learning(candidates, outcomes)
    results = quiz_candidates(model, tok, candidates, adapters, outcomes)
    lines += quizzing(tok, passage, before, results)
    for e, result in zip(edits, results):
        credit(e, passage, result, "accuracy")
    select(edits, {}, "parts", keep=0)
    lines += rewarding(edits)
    lines += reinforcing(tok, to_imitate(prompts, edits, "parts", keep=0))
    return "\n".join(line.rstrip() for line in "\n".join(lines).split("\n"))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="docs/WALKTHROUGH.md", help="where to write it")
    args = parser.parse_args()
    check_output(args.out)
    text = build()
    write_atomic(args.out, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_main(main)
