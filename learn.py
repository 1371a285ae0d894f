"""Tell it today, it knows tomorrow: learn documents of your own, then ask about them.

    python learn.py study ambrel.txt notes.md --memory me
    python learn.py ask "Who founded Port Ambrel?" --memory me       # without a question: a chat
    python learn.py list --memory me               # and: show ambrel, forget ambrel
    python learn.py check --memory me              # what is known now, beside retrieval?
    python learn.py export ambrel runs/ambrel-model --memory me
    python learn.py consolidate runs/all-of-it --memory me

`study` cuts each document into passages, lets the model write self-edits about them, trains a LoRA
on the passages, their notes and questions made of the statements' own words, and keeps it in the
memory, a PEFT adapter for each document (lm/memory.py). It says which notes were left out and why,
and, asking the notes' own questions again, which statements were not learnt. Before that, the model
writes a quiz on each passage. Kept are the questions that it answers with the text in view but not
without, and that no note asks: the score on them says how sure one can be.

`ask` looks for the passage that the question is about, and answers under its document's adapter; no
text is in the prompt. `check` asks the quizzes of all documents in this way, and, beside it, the
base model with the passage that is found in the prompt; and questions on anything else, with and
without what was learnt. (The quizzes are what the base model answers with the right passage in the
prompt, so its figure says how often that is found.)

`export` writes the whole model with one document learnt, for other programs; `consolidate` with all
of them, in one set of weights: one adapter learns to expect what each document's expects, and on
other texts what the base model does. It is written only if no document's quiz, nor all of them
together, nor the general questions lose more than --fall points and one question.

The notes are written by the policy in policies/, if there is one for the model, by another one
(--policy, a round-K/policy folder of a train_outer.py run), or by the untrained model (--policy
none).
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import reward
from data.documents import Text, passages_of, read_texts
from data.qa import Passage, Question
from data.text import question_and_answer, sentences
from inner import add_sft_flags, lora_config, sft_config, update_one
from lm.adapters import load_adapter, shipped_policy
from lm.checkpoint import save_model
from lm.files import check_output, chunks, run_main, sub_seed
from lm.flags import Parser, add_model_flags, at_least, load
from lm.memory import Document, Memory
from lm.runs import weights_of
from lm.tokenizer import Tokenizer
from lora import Adapters, merge, merged
from quiz import (
    ANSWER_LEN,
    Item,
    about_what,
    accuracies,
    ask,
    general_quiz,
    of_passages,
    quiz_items,
    quiz_prompt,
    router_to,
    self_quiz,
)
from reward import anchor_examples, consolidate, passage_examples, words
from sampler import generate
from selfedit import QA_PAIR, clozes, in_style, settle, write_self_edits

ACTIONS = {
    "study": "learn documents, each into an adapter of its own",
    "ask": "answer a question, or chat",
    "list": "what was learnt",
    "show": "a document's passages and notes, and what was not learnt",
    "forget": "remove a document, as if it had never been learnt",
    "check": "ask all documents' quizzes, and what has nothing to do with them",
    "consolidate": "write the whole model with all documents learnt to a new folder",
    "export": "write the whole model with one document learnt to a new folder",
}


def parse_arguments():
    parser = Parser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    sub = {name: actions.add_parser(name, help=text) for name, text in ACTIONS.items()}
    for p in sub.values():
        p.add_argument("--memory", default="runs/memory", help="folder of what is learnt")
    add = sub["study"].add_argument
    add("files", nargs="+", metavar="FILE", help="plain text or Markdown")
    about = "what the text is about, in a few words; without: its first heading, or the file's name"
    add("--title", help=about)
    about = "self-edits to sample of each passage; their notes are pooled"
    add("--samples", type=at_least(1), default=2, help=about)
    about = "adapter folder of a trained policy; shipped: the one in policies/; none"
    add("--policy", default="shipped", help=about)
    reward.add_flags(sub["study"])
    add = sub["ask"].add_argument
    add("question", nargs="?", help="without one: a chat, a question a line")
    about = "what to say where nothing that was learnt fits: unknown, or what the base model thinks"
    add("--say", default="base", choices=["base", "unknown"], help=about)
    for name in ("show", "forget", "export"):
        sub[name].add_argument("name", help="of a document, see list")
    for name in ("export", "consolidate"):
        sub[name].add_argument("to", help="new folder")
    for name in ("ask", "check", "export"):
        add_model_flags(sub[name], trains=False)
    add_model_flags(sub["consolidate"])
    add_sft_flags(sub["consolidate"])
    about = "most points that a document's quiz, or the questions on anything else, may lose"
    sub["consolidate"].add_argument("--fall", type=at_least(0.0), default=10.0, help=about)
    # A text can be longer, and its notes more, than a passage's; few epochs of a higher rate teach
    # more in less time. All documents at once take more of a lower one (docs/LOG.md).
    sub["study"].set_defaults(steps=0, lr=8e-3, epochs=5)
    sub["consolidate"].set_defaults(steps=0, lr=4e-3, epochs=20)
    # As good as twice the rank, and half of the bytes in a memory (results/ranks.json).
    sub["study"].set_defaults(rank=8, alpha=16.0)
    if sys.argv[1:2] and sys.argv[1].startswith("--memory"):
        parser.error("--memory goes behind study, ask, ...")
    args = parser.parse_args()
    if args.action == "study":
        args.files = list(dict.fromkeys(args.files))
        if args.title and len(args.files) > 1:
            sub["study"].error("--title is for one document")
        settle(args)
    if args.action == "ask" and args.question is not None and not args.question.strip():
        sub["ask"].error("the question is empty")
    return args


# -----------------------------------------------------------------------------
# notes

LEFT_OUT = {
    "copied": "notes copied from the prompt's example, left out",
    "endless": "an unfinished last note, left out (--max-new)",
    "malformed": "no note in it",
    "empty": "nothing in it",
    "repeats": "notes said twice, left out",
}


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


def notes_on(passages: list[Passage], edits: list) -> list[list[str]]:
    """Of each passage: the questions that it asks itself, and what of the sampled notes is to the
    point among all under its title."""
    sampled = {p.id: [] for p in passages}
    for e in edits:
        sampled[e.passage] += e.notes
    under = {p.title: [] for p in passages}
    for p in passages:
        under[p.title] += dict.fromkeys(sampled[p.id])
    pointed = {title: set(to_the_point(own, title)) for title, own in under.items()}
    notes = []
    for p in passages:
        good = [note for note in sampled[p.id] if note in pointed[p.title]]
        notes.append(list(dict.fromkeys([*own_questions(p.text), *good])))
    return notes


def report_notes(passages: list[Passage], edits: list, notes: list[list]) -> None:
    """Print the notes, what was left out of the samples, and what has no notes."""
    samples = [part for e in edits for part in e.parts]
    written = {note for e in edits for note in e.notes}
    studied = list(dict.fromkeys(note for own in notes for note in own))
    print("\n".join(["", f"{len(studied)} notes:", *studied, ""]))
    for flaw, n in Counter(part.flaw for part in samples if part.flaw).items():
        print(f"of {len(samples)} samples {n} with {LEFT_OUT[flaw]}")
    if vague := len(written.difference(studied)):
        print(f"{vague} notes that ask for no one statement, left out")
    for passage, own in zip(passages, notes):
        answered = {m[2] for note in own if (m := QA_PAIR.fullmatch(note))}
        for statement in sentences(passage.text):
            if len(statement) > 400:
                print(f"could not be split, studied whole: {statement[:60]} ...")
            elif answered and question_and_answer(statement)[1] not in answered:
                print(f"no notes on: {statement}")


# -----------------------------------------------------------------------------
# study

BATCH = 64  # questions asked at a time


def study(model, tok: Tokenizer, memory: Memory, texts: list[Text], args) -> None:
    """Learn each document that the memory does not have yet."""
    lora = lora_config(args, model)
    for document in texts:
        is_known(memory, document, args)  # complains now rather than after the work
    policy = policy_of(model, args)
    memory.open_to_write(weights_of(model))
    for document in texts:
        if is_known(memory, document, args):
            print(f"{document.name}: known already")
        else:
            study_one(model, tok, memory, policy, lora, document, args)


def is_known(memory: Memory, document: Text, args) -> bool:
    """Exits with one line if something else has this document's name, or if it was studied with
    other settings."""
    known, again = memory.documents.get(document.name), ""
    now = json.loads(json.dumps(studied_with(vars(args))))  # as it would be read again
    if known and known.digest != document.digest:
        again = "has another text"
    elif known and studied_with(known.settings) != now:
        again = "has, studied with other settings, a text"
    elif memory.is_damaged(document.name):
        again = "has something damaged"
    if again:
        raise SystemExit(
            f"error: {args.memory} {again} called {document.name!r}; rename your file, or first "
            f"python learn.py forget {document.name} --memory {args.memory}"
        )
    return bool(known)


def studied_with(settings: dict) -> dict:
    """Those that can change what a document is learnt as: the memory knows its base model, and a
    document is studied alone."""
    others = ("action", "files", "memory", "device", "compile", "model", "population")
    return {k: v for k, v in settings.items() if k not in others}


def policy_of(model, args) -> Adapters | None:
    """The policy that writes the notes; None if that is the untrained model."""
    folder = args.policy if args.policy != "none" else None
    if args.policy == "shipped":
        folder = shipped_policy(model, args.model)
    return load_adapter(model, folder) if folder else None


def study_one(model, tok, memory: Memory, policy, lora, document: Text, args) -> None:
    """Sample notes on a document, train on them and the text, keep the adapter."""
    passages = passages_of(document)
    with merged(model, policy):
        edits = write_self_edits(model, tok, passages, args.samples, args, sub_seed(args.seed, 0))
    notes = notes_on(passages, edits)
    report_notes(passages, edits, notes)
    quizzes = own_quizzes(model, tok, passages, notes, args)

    seed, studied = sub_seed(args.seed, 1), []
    for p, own in zip(passages, notes):
        studied.append({"title": p.title, "text": p.text, "notes": own, "quiz": []})
    adapters, label = Adapters.init(model, lora, 1, seed), f"study {document.name}"
    examples = examples_of(tok, studied, args.seed)
    outcome = update_one(model, adapters, examples, sft_config(args), seed, label)
    if outcome.diverged:
        raise SystemExit(
            f"error: training diverged at step {outcome.steps}; try a lower --lr than {args.lr}"
        )
    given_back = ask_again(model, tok, passages, notes, adapters)
    learnt = [statement for statement, known in given_back.items() if known]
    missed = [statement for statement, known in given_back.items() if not known]
    items = [(p, item) for p, quiz in zip(studied, quizzes) for item in quiz_items(tok, quiz)]
    right = accuracies(model, tok, [item for _, item in items], adapters)
    for (p, item), hit in zip(items, right):
        q = item.question
        p["quiz"].append({"question": q.question, "answer": q.answers[0], "right": int(hit)})
    about = (document.name, document.title, document.digest, studied, learnt, missed)
    memory.add(Document(*about, studied_with(vars(args))), adapters, args.model)
    print(f"{outcome.steps} steps, last loss {outcome.loss:.3f}; kept in {args.memory}")
    print(f"asked again: {len(learnt)} of {len(given_back)} statements learnt")
    told = f"{sum(right):.0f} of {len(right)} right, before none"
    print(f"its own quiz: {told if right else 'no question was sound'}")
    for p in studied if len(studied) > 1 else ():
        print(f"  {p['title']}: {sum(q['right'] for q in p['quiz'])} of {len(p['quiz'])}")
    for statement in missed:
        print(f"not learnt: {statement}")


def examples_of(tok: Tokenizer, passages: list[dict], seed: int) -> list:
    """What a document's passages are learnt from: text, notes, and questions of the text's
    words."""
    examples = []
    for n, p in enumerate(passages):
        asking = clozes(p["text"], 3, sub_seed(seed, 2, n))
        examples += passage_examples(tok, p["title"], [p["text"], *p["notes"], *asking])
    return examples


def own_quizzes(model, tok: Tokenizer, passages, notes: list[list[str]], args) -> list[Passage]:
    """The passages with a quiz each, written and sifted by the model as it is, of what no note
    asks."""
    how = (in_style(args, "self-qa"), sub_seed(args.seed, 3))
    written = write_self_edits(model, tok, passages, 1, *how)
    return self_quiz(model, tok, passages, written, notes)


def ask_again(model, tok: Tokenizer, passages, notes, adapters: Adapters) -> dict:
    """Ask some of the notes' own questions -> {statement: was it given back?}."""
    times, items = Counter(), []
    for passage, own in zip(passages, notes):
        for question, answer in (m.groups() for note in own if (m := QA_PAIR.fullmatch(note))):
            times[answer] += 1
            if times[answer] <= 2:
                prompt = tuple(quiz_prompt(tok, passage.title, question))
                items.append(Item(prompt, Question(question, (answer,))))
    known = {item.question.answers[0]: False for item in items}
    longest = max([ANSWER_LEN, *(len(tok.encode(statement)) + 1 for statement in known)])
    for batch in chunks(items, BATCH):
        for item, said in zip(batch, ask(model, tok, batch, adapters, max_new=longest)):
            known[item.question.answers[0]] |= said["f1"] >= 0.8
    return known


# -----------------------------------------------------------------------------
# what was learnt


class Answers:
    """Finds the passage that a question is about, and answers under its document's adapter."""

    def __init__(self, model, tok: Tokenizer, memory: Memory, say: str):
        self.model, self.tok, self.memory, self.say = model, tok, memory, say
        self.passages, notes = [], []  # each passage's id is its document's name
        for document in memory.documents.values():
            for p in document.passages:
                self.passages.append(Passage(document.name, p["title"], p["text"], ()))
                notes.append(p["notes"])
        self.router = router_to(tok, self.passages, notes)

    def reply(self, question: str, say) -> str:
        """Answer, with say(a few words) as they come. Returns the document's name; "" where none
        fits."""
        _, about = about_what(self.router, self.passages, Question(question, ()))
        if not about.id and self.say == "unknown":
            say("I don't know.")
            return ""
        adapter = self.memory.adapter(self.model, about.id) if about.id else None
        prompt = quiz_prompt(self.tok, about.title, question)
        ends = {*self.tok.end_ids, *self.tok.newline_ids}
        ids, said = [], ""

        def on_token(_, t: int) -> None:
            nonlocal said
            ids.append(t)
            text = self.tok.decode([t for t in ids if t not in self.tok.end_ids]).strip()
            if not text.endswith("\ufffd"):  # a character of which more tokens are to come
                say(text[len(said) :])
                said = text

        heard = {"adapters": adapter, "on_token": on_token}
        generate(self.model, [prompt], ANSWER_LEN, ends, **heard)
        return about.id

    def right(self, questions: list[Question], shown: bool = False) -> tuple[np.ndarray, float]:
        """Which are answered right (n), each under the adapter of the document that it is about, or
        by the base model with the passage that it is about `shown`; and the mean number of prompt
        tokens."""
        items = {}  # {document: [(number, item), ...]}
        for n, q in enumerate(questions):
            _, about = about_what(self.router, self.passages, q)
            [item] = quiz_items(self.tok, about, show_passage=shown and bool(about.text))
            items.setdefault("" if shown else about.id, []).append((n, item))
        right, tokens = np.zeros(len(questions)), []
        for name, own in items.items():
            adapter = self.memory.adapter(self.model, name) if name else None
            numbers, asked = zip(*own)
            right[list(numbers)] = accuracies(self.model, self.tok, list(asked), adapter)
            tokens += [len(item.prompt) for item in asked]
        return right, float(np.mean(tokens or [0]))


def talk(model, tok: Tokenizer, memory: Memory, args) -> None:
    """Answer the question, or, without one, a question a line."""
    answers = Answers(model, tok, memory, args.say)
    if args.question is not None:
        answers.reply(args.question, say)
        print()
        return
    while line := read_line():
        if line.strip():
            try:
                name = answers.reply(line.strip(), say)
                print(f"  [{name or 'nothing that was learnt'}]", flush=True)
            except SystemExit as e:  # a question that is too long ends no chat
                print(e, flush=True)


def say(text: str) -> None:
    print(text, end="", flush=True)


def read_line() -> str:
    """The next line of a chat; "" at its end, or at Ctrl-C."""
    print("> " * sys.stdin.isatty(), end="", flush=True)
    try:
        return sys.stdin.readline()
    except KeyboardInterrupt as e:
        if e.args:  # another signal, see run_main()
            raise
        print()
        return ""


def quizzes_of(document: Document) -> list[Passage]:
    """A document's passages that have a quiz."""
    found = []
    for p in document.passages:
        own = [Question(q["question"], (q["answer"],)) for q in p["quiz"]]
        found += [Passage(document.name, p["title"], p["text"], tuple(own))] if own else []
    return found


def check(model, tok: Tokenizer, memory: Memory) -> None:
    answers, asked = Answers(model, tok, memory, "base"), {}
    for d in memory.documents.values():
        asked[d.name] = [q for p in quizzes_of(d) for q in p.questions]
    questions = [q for own in asked.values() for q in own]
    (known, short), (found, long) = (answers.right(questions, shown) for shown in (False, True))
    first = 0
    for name, own in asked.items():
        here = slice(first, first := first + len(own))
        told = f"{known[here].sum():.0f} of {len(own)} right, {found[here].sum():.0f} with the"
        print(f"{name:20} {told} passage in the prompt" if own else f"{name:20} has no quiz")
    if questions:
        told = f"{100 * known.mean():.1f} % right, in prompts of {short:.0f} tokens"
        print(f"all: {told}; with the passage {100 * found.mean():.1f} %, {long:.0f} tokens")
    general = general_quiz()
    [before] = of_passages(model, tok, [general])
    now, _ = answers.right(list(general.questions))
    print(f"anything else: {100 * before:.1f} % before, {100 * now.mean():.1f} % now")


def consolidate_all(model, tok: Tokenizer, memory: Memory, args) -> None:
    """Write the model with all documents in one set of weights. Exits with one line, and writes
    nothing, if a document, all of them together, or what else it is asked, falls by more than
    --fall points and by more than one question."""
    documents = list(memory.documents.values())
    teachers = [memory.adapter(model, d.name) for d in documents]
    examples = [examples_of(tok, d.passages, d.settings["seed"]) for d in documents]
    how = (anchor_examples(tok), sft_config(args), sub_seed(args.seed, 0))
    adapters, outcome = consolidate(model, teachers, examples, *how)
    if outcome.diverged:
        raise SystemExit(f"error: training diverged; try a lower --lr than {args.lr}")
    quizzes, before, fallen = {"anything else": quiz_items(tok, general_quiz())}, {}, []
    for d in documents:
        quizzes[d.name] = [item for p in quizzes_of(d) for item in quiz_items(tok, p)]
    for (name, items), teacher in zip(quizzes.items(), [None, *teachers], strict=True):
        before[name] = sum(accuracies(model, tok, items, teacher))
    with merged(model, adapters):
        now = {name: sum(accuracies(model, tok, items)) for name, items in quizzes.items()}
    asked = {name: len(items) for name, items in quizzes.items()}
    for right in (asked, before, now):
        right["all documents"] = sum(right[d.name] for d in documents)
    for name, n in asked.items():
        told = f"{before[name]:.0f} of {n} right before, {now[name]:.0f} now"
        print(f"{name:20} {told if n else 'has no quiz: it is not checked'}")
        fallen += [name] if before[name] - now[name] > max(1, args.fall / 100 * n) else []
    if fallen:
        told = f"{', '.join(fallen)} would fall by more than {args.fall} points"
        raise SystemExit(f"error: {told}; nothing is written (--fall, --epochs)")
    merge(model, adapters)
    save_model(model, args.to, args.model)
    print(f"whole model written to {args.to}")


def show_list(memory: Memory) -> None:
    for d in memory.documents.values():
        of = len(d.learnt) + len(d.missed)
        notes = sum(len(p["notes"]) for p in d.passages)
        told = f"passages: {len(d.passages)}, notes: {notes}, learnt: {len(d.learnt)} of {of}"
        print(f"{d.name:20} {told}  {d.title}")


def show(document: Document) -> None:
    for p in document.passages:
        print("\n".join([f"# {p['title']}", p["text"], "", *p["notes"], ""]))
    for statement in document.missed:
        print(f"not learnt: {statement}")


def main() -> None:
    args = parse_arguments()
    if args.action == "study":
        texts = read_texts(args.files, args.title)
        check_output(args.memory, folder=True)
        memory = Memory(args.memory)  # complains now rather than when the model is loaded
        model, tok = load(args)
        memory.refuse_other_base(weights_of(model))
        study(model, tok, memory, texts, args)
        return
    memory = Memory(args.memory, must_exist=True)
    if args.action == "list":
        show_list(memory)
    elif args.action == "show":
        show(memory[args.name])
    elif args.action == "forget":
        memory.keep_to_itself()
        memory.forget(args.name)
        print(f"{args.name} is forgotten")
    else:
        if args.action == "export":
            memory[args.name]
        elif args.action != "ask" and not memory.documents:
            raise SystemExit(f"error: {args.memory} is empty")
        if args.action in ("export", "consolidate"):
            refuse_existing(args.to)
        model, tok = load(args)
        memory.refuse_other_base(weights_of(model))
        if args.action == "ask":
            talk(model, tok, memory, args)
        elif args.action == "check":
            check(model, tok, memory)
        elif args.action == "consolidate":
            consolidate_all(model, tok, memory, args)
        else:
            merge(model, memory.adapter(model, args.name))
            save_model(model, args.to, args.model)
            print(f"whole model written to {args.to}")


def refuse_existing(folder: str) -> None:
    check_output(folder, folder=True)
    if Path(folder).exists():
        raise SystemExit(f"error: {folder} exists already; choose another folder")


if __name__ == "__main__":
    run_main(main, "; what was learnt is kept")
