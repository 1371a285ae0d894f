"""Learn a text of your own, then ask about it: the inner update and the quiz, without the outer
loop.

    python learn.py study ambrel.txt --title "Port Ambrel" --out runs/ambrel
    python learn.py ask "Who founded Port Ambrel?" --adapter runs/ambrel

`study` lets the model write self-edits about the text, trains a LoRA on the text, its notes and
questions made of the statements' own words, and saves it as a PEFT adapter, with the title in
study.json. It says which notes were left out and why, and, asking the notes' own questions again,
which statements were not learnt. `ask` answers under that adapter; the text is not in the prompt.
The notes are written by the policy that policies/ has for the model, by another one (--policy, a
round-K/policy folder of a train_outer.py run), or by the untrained model (--policy none). With
--learner policy it also studies them, and `ask` loads it below the adapter.
"""

import hashlib
from collections import Counter
from pathlib import Path

import inner
import reward
from data.qa import Passage
from data.text import question_and_answer, sentences
from inner import learner, lora_config, sft_config, update_one
from lm.adapters import load_adapter, save_adapter, shipped_policy
from lm.checkpoint import save_model
from lm.files import check_output, chunks, read_json, run_main, sub_seed, write_json
from lm.flags import Parser, at_least, load
from lm.tokenizer import Tokenizer
from lora import Adapters, merge, merged
from quiz import ANSWER_LEN, quiz_prompt, score_answer
from reward import passage_examples, short_pieces, words
from sampler import generate
from selfedit import QA_PAIR, clozes, settle, write_self_edits


def parse_arguments():
    parser = Parser(description=__doc__)
    reward.add_flags(parser)
    add = parser.add_argument_group("learn.py").add_argument
    add("action", choices=["study", "ask"], help="what to do")
    add("text", help="study: a text file; ask: the question")
    add("--title", default="Notes", help="study: what the text is about, in a few words")
    about = "study: self-edits to sample; their notes are pooled"
    add("--samples", type=at_least(1), default=2, help=about)
    about = "study: adapter folder of a trained policy; shipped: the one in policies/; none"
    add("--policy", default="shipped", help=about)
    inner.add_learner_flag(parser)
    add("--out", default="runs/learned", help="study: folder for the adapter")
    about = "study: also write the updated model, whole, to this new folder"
    add("--merged", help=about)
    add("--adapter", default="runs/learned", help="ask: folder of the adapter")
    # A text can be longer, and its notes more, than a passage's; few epochs of a higher rate teach
    # more in less time (docs/LOG.md).
    parser.set_defaults(steps=0, lr=8e-3, epochs=5)
    return settle(parser.parse_args())


LEFT_OUT = {
    "copied": "notes copied from the prompt's example, left out",
    "endless": "an unfinished last note, left out (--max-new)",
    "malformed": "no note in it",
    "empty": "nothing in it",
    "repeats": "notes said twice, left out",
}
BATCH = 64  # questions asked at a time
LONGEST_TEXT = 50_000  # characters; what is longer would take hours


def read_text(path: str) -> str:
    """A text file. Exits with one line if it cannot be read, is empty, or longer than
    LONGEST_TEXT."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except OSError as e:
        raise SystemExit(f"error: cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16
        raise SystemExit(f"error: cannot read {path}: it is not UTF-8 text; save it as UTF-8")
    if not text:
        raise SystemExit(f"error: {path} is empty")
    if len(text) > LONGEST_TEXT:
        long = f"{path} has {len(text):,} characters, of at most {LONGEST_TEXT:,}"
        raise SystemExit(f"error: {long}; study it chapter by chapter, each into its own --out")
    return text


def policy_folder(model, args) -> Path | None:
    """Of the policy that writes the notes; None if that is the untrained model."""
    if args.policy == "shipped":
        return shipped_policy(model, args.model)
    return None if args.policy == "none" else Path(args.policy)


def refuse_to_replace(args, about: dict) -> None:
    """Exit with one line if --out holds another text's adapter, or --merged exists."""
    found = Path(args.out) / "study.json"
    if found.is_file() and read_json(found).get("text_sha256") != about["text_sha256"]:
        raise SystemExit(f"error: {args.out} holds what was learnt of another text; choose --out")
    if args.merged and Path(args.merged).exists():
        raise SystemExit(f"error: --merged {args.merged} exists already; choose another folder")


def own_questions(text: str) -> list[str]:
    """The questions that a text asks and answers itself, as notes."""
    pairs = map(question_and_answer, sentences(text))
    return [f"Question: {question}\nAnswer: {answer}" for question, answer in pairs if question]


def to_the_point(notes: list[str], title: str) -> list[str]:
    """Without the questions that cannot tell a statement from the others: those that several
    statements answer, and those that have no word of their own statement but the title's. A
    statement that has only such questions keeps them."""
    answers, chosen, served = {}, set(), set()
    pairs = [(note, *m.groups()) for note in notes if (m := QA_PAIR.fullmatch(note))]
    for _, question, answer in pairs:
        answers.setdefault(question.casefold(), set()).add(answer)
    for note, question, answer in pairs:
        own = (words(question) & words(answer)) - words(title)
        if own and len(answers[question.casefold()]) == 1:
            chosen.add(note)
            served.add(answer)
    dropped = {note for note, _, answer in pairs if answer in served} - chosen
    return [note for note in notes if note not in dropped]


def report_notes(text: str, edits: list, notes: list[str], vague: int) -> None:
    """Print the notes, what was left out of the samples, and what has no notes."""
    print("\n".join(["", f"{len(notes)} notes:", *notes, ""]))
    samples = [part for e in edits for part in e.parts]
    for flaw, n in Counter(part.flaw for part in samples if part.flaw).items():
        print(f"of {len(samples)} samples {n} with {LEFT_OUT[flaw]}")
    if vague:
        print(f"{vague} notes that ask for no one statement, left out")
    answered = {m[2] for note in notes if (m := QA_PAIR.fullmatch(note))}
    for statement in sentences(text):
        if len(statement) > 400:
            print(f"could not be split, studied whole: {statement[:60]} ...")
        elif answered and question_and_answer(statement)[1] not in answered:
            print(f"no notes on: {statement}")


def report_learnt(model, tok: Tokenizer, title: str, notes: list[str], adapters: Adapters) -> None:
    """Ask some of the notes' own questions, and print which statements were not given back."""
    pairs = [m.groups() for note in notes if (m := QA_PAIR.fullmatch(note))]
    asked, prompts, answers = Counter(), [], []
    for question, answer in pairs:
        asked[answer] += 1
        if asked[answer] <= 2:
            prompts.append(quiz_prompt(tok, title, question))
            answers.append(answer)
    if not pairs:
        return
    replies, ends = [], {*tok.end_ids, *tok.newline_ids}
    for batch in chunks(prompts, BATCH):
        owner = [0] * len(batch)
        replies += generate(model, batch, ANSWER_LEN, ends, adapters=adapters, owner=owner)
    learnt = dict.fromkeys(answers, False)
    for answer, ids in zip(answers, replies):
        said = tok.decode([t for t in ids if t not in tok.end_ids])
        learnt[answer] |= score_answer(said, (answer,))["f1"] >= 0.8
    print(f"asked again: {sum(learnt.values())} of {len(learnt)} statements learnt")
    for answer in (answer for answer, known in learnt.items() if not known):
        print(f"not learnt: {answer}")


def study(model, tok: Tokenizer, args) -> None:
    """Sample notes, train on them and the text, save the adapter."""
    text, lora = read_text(args.text), lora_config(args, model)
    folder = policy_folder(model, args)
    studied_on = str(folder) if folder and args.learner == "policy" else None
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    about = {"title": args.title, "policy": studied_on, "text_sha256": sha256}
    refuse_to_replace(args, about)
    policy = load_adapter(model, folder) if folder else None

    parts = short_pieces(tok, text)
    passages = [Passage(f"text-{n}", args.title, part, ()) for n, part in enumerate(parts)]
    with merged(model, policy):
        edits = write_self_edits(model, tok, passages, args.samples, args, sub_seed(args.seed, 0))
    written = list(dict.fromkeys(note for e in edits for note in e.notes))
    pointed = to_the_point(written, args.title)
    notes = list(dict.fromkeys([*own_questions(text), *pointed]))
    report_notes(text, edits, notes, len(written) - len(pointed))
    asking = clozes(text, 3, sub_seed(args.seed, 2))

    seed, config = sub_seed(args.seed, 1), sft_config(args)
    adapters = Adapters.init(model, lora, 1, seed)
    examples = passage_examples(tok, args.title, [*parts, *notes, *asking])
    with learner(model, policy, args):
        outcome = update_one(model, adapters, examples, config, seed, "study")
        if outcome.diverged:
            raise SystemExit(
                f"error: training diverged at step {outcome.steps}; try a lower --lr than {args.lr}"
            )
        save_adapter(adapters, args.out, args.model)
        write_json(Path(args.out) / "study.json", about)
        print(f"{outcome.steps} steps, last loss {outcome.loss:.3f}; adapter written to {args.out}")
        report_learnt(model, tok, args.title, notes, adapters)
        if args.merged:
            merge(model, adapters)
            save_model(model, args.merged, args.model)
            print(f"whole model written to {args.merged}")


def ask(model, tok: Tokenizer, args) -> None:
    """Answer a question under the adapter, on top of the policy if it was trained on one."""
    studied = read_json(Path(args.adapter) / "study.json")
    if studied.get("policy"):
        merge(model, load_adapter(model, studied["policy"]))
    prompt = quiz_prompt(tok, studied.get("title", ""), args.text)
    ends, adapter = {*tok.end_ids, *tok.newline_ids}, load_adapter(model, args.adapter)
    [ids] = generate(model, [prompt], ANSWER_LEN, ends, adapters=adapter)
    print(tok.decode([t for t in ids if t not in tok.end_ids]).strip())


def main() -> None:
    args = parse_arguments()
    if args.action == "study":
        for folder in filter(None, (args.out, args.merged)):
            check_output(folder, folder=True)
    model, tok = load(args)
    study(model, tok, args) if args.action == "study" else ask(model, tok, args)


if __name__ == "__main__":
    run_main(main)
