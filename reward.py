"""What a self-edit on a passage earns: what is trained on, what is asked, and who gets the credit.

    passage + notes -> passage_examples()   what the inner update trains on
    adapters -> quiz_candidates()           the quiz, under each candidate's adapter: the reward
             -> credit()                    of each part: what the questions about its sentence earn
             -> select()                    which parts are imitated (ReST-EM)
             -> to_imitate()                (prompt, reply, weight) for the outer update

--reward proxy trains and asks nothing: notes that are questions earn how closely they ask what the
quiz asks, closest_question(). (arc.py has what a self-edit on a puzzle earns; selection is the
same.)

Top to bottom: flags, candidates, quizzing them, the proxy, credit, selection, metrics, distillation
(of what was learnt: learn.py), and Passages, which puts them together for train_outer.py.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import inner
import selfedit
from data.qa import Passage, Question, load_passages
from data.text import pieces, question_and_answer, sentences
from inner import (
    Outcome,
    SFTConfig,
    inner_update,
    lora_config,
    refuse_long,
    sft_config,
    update_one,
    with_lower_states,
)
from lm.files import digest, sub_seed, warn
from lm.flags import add_model_flags
from lm.log import Log
from lm.outer import RULES
from lm.packing import Example, arrange, make_row, row_tokens
from lm.tokenizer import Tokenizer
from lora import Adapters, LoRAConfig, merged
from quiz import ask, general_texts, mean_scores, normalize, quiz_items, quiz_prompt, score_answer
from selfedit import QA_PAIR, STYLES, SelfEdit, note_prompts, says_how, write_self_edits

# -----------------------------------------------------------------------------
# flags


def add_flags(parser, alone: bool = True) -> None:
    """What every script asks that trains on notes on passages: model, self-edits, inner update."""
    add_model_flags(parser, alone=alone)
    selfedit.add_flags(parser)
    selfedit.add_style_flag(parser)
    inner.add_lora_flags(parser)
    inner.add_sft_flags(parser)


def add_proxy_flag(parser) -> None:
    about = "adapter of a policy trained with --reward proxy: adds the row proxy"
    parser.add_argument("--proxy", metavar="FOLDER", help=about)


# -----------------------------------------------------------------------------
# candidates


@dataclass(frozen=True)
class Candidate:
    """What one adapter of a population is trained on, and quizzed about."""

    name: int | str  # in the log of results
    subject: object  # a Passage, or an ARC task
    examples: list[Example]
    config: SFTConfig

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)


QUESTIONS = {"data": ["questions"]}  # with --settings: what rows of notes alone are written with
LONGEST = 512  # most tokens of a text that is trained on as one sequence


def short_pieces(tok: Tokenizer, text: str) -> list[str]:
    """The pieces() of a text that are trained on as a sequence each, of at most LONGEST tokens."""
    return pieces(text, lambda piece: len(tok.encode(piece)) <= LONGEST)


def passage_examples(tok: Tokenizer, title: str, texts: list[str]) -> list[Example]:
    """One training sequence for each text, each with the token that ends a turn; one for each of
    its pieces() if it is longer than LONGEST tokens, so that memory does not grow with its length.

    A passage or a note is "{title}\\n{text}", every token counted. A question with its answer is
    the chat in which the quiz would ask it; the answer and its end are counted:
        "Question: Who cast it?\\nAnswer: Hessa Lorn"  ->
            user: Topic: {title} ... Who cast it? ...    assistant: Hessa Lorn
    """
    examples = []
    for text in texts:
        pair = QA_PAIR.fullmatch(text)
        prompt = quiz_prompt(tok, title, pair[1]) if pair else tok.begin
        for piece in short_pieces(tok, pair[2] if pair else text):
            # The end is counted, so that the model learns to stop (and pads there are none).
            reply = [*tok.encode(piece if pair else f"{title}\n{piece}"), tok.end_ids[0]]
            examples.append(Example.reply(prompt, reply))
    return examples


def passage_candidate(
    tok: Tokenizer, name: int, passage: Passage, notes, config: SFTConfig, title: str = ""
) -> Candidate:
    """The passage, then its notes; these under another `title` if they are about something else."""
    examples = passage_examples(tok, passage.title, [passage.text])
    examples += passage_examples(tok, title or passage.title, list(notes))
    return Candidate(name, passage, examples, config)


def settings_candidate(
    tok: Tokenizer, name: int, passage: Passage, e: SelfEdit, args, seed: int
) -> tuple[Candidate | None, str]:
    """(candidate, "") of a self-edit that says how it is studied: the passage, the notes and what
    the tools make of the passage, as its settings ask for (selfedit.parse_settings()), in as many
    epochs as fit --budget tokens. Or (None, why not): "over budget" if not one epoch fits, "empty"
    if there is nothing to train on.
    """
    how = e.settings
    texts = [passage.text] if "passage" in how["data"] else []
    texts += e.notes
    for n, (tool, (make, _)) in enumerate(selfedit.TOOLS.items()):
        texts += make(passage.text, how[tool], sub_seed(seed, n))
    examples = passage_examples(tok, passage.title, list(dict.fromkeys(texts)))
    if how["loss"] == "all":
        examples = [replace(x, counts=(True,) * len(x.ids)) for x in examples]
    tokens = sum(row_tokens(examples, *row) for row in arrange(examples, args.row_len))
    epochs = min(how["epochs"], args.budget // max(1, tokens))
    if not examples or not epochs:
        return None, "over budget" if examples else "empty"
    config = SFTConfig(how["learning_rate"], epochs, row_len=args.row_len)
    return Candidate(name, passage, examples, config), ""


def edit_candidate(
    tok: Tokenizer, name: int, passage: Passage, e: SelfEdit, args, seed: int
) -> tuple[Candidate | None, str]:
    """What a self-edit is studied as, as it says or as args do, and its flaw; None if it is
    not studied, and earns nothing."""
    if not says_how(args):
        return passage_candidate(tok, name, passage, e.notes, sft_config(args)), e.flaw
    return (None, e.flaw) if e.flaw else settings_candidate(tok, name, passage, e, args, seed)


def unrelated(passages, notes: list) -> tuple[list, list]:
    """For each passage the next one's notes, and the title that they stand under; for the last
    passage the first one's."""
    return notes[1:] + notes[:1], [p.title for p in passages[1:] + passages[:1]]


def pooled(notes: list[tuple]) -> tuple:
    """The notes of several self-edits, each once: [("a", "b"), ("b", "c")] -> ("a", "b", "c")."""
    return tuple(dict.fromkeys(note for own in notes for note in own))


def told(passage: Passage) -> tuple:
    """Notes that ask the quiz's own questions, each answered by the sentence about it, if there is
    one: what notes could teach at most."""
    texts, notes = sentences(passage.text), []
    for q in passage.questions:
        if (k := sentence_about(q, texts)) is not None:
            _, answer = question_and_answer(texts[k])
            notes.append(f"Question: {q.question}\nAnswer: {answer}")
    return tuple(dict.fromkeys(notes))


def even_groups(items: list, size: int) -> list[list]:
    """Items in order, in groups of even size, at most `size`: 10 items, size 8: two groups of 5,
    since a group of 2 would not fill the machine."""
    n = math.ceil(len(items) / size)
    groups, rest = [], list(items)
    for left in range(n, 0, -1):
        first = math.ceil(len(rest) / left)
        groups.append(rest[:first])
        rest = rest[first:]
    return groups


def populations(candidates: list[Candidate], size: int) -> list[list[Candidate]]:
    """Even groups of at most `size` that train side by side, like lengths together; each candidate
    once."""
    once = {c.name: c for c in candidates}.values()
    order = sorted(once, key=lambda c: (c.tokens * c.config.epochs, c.name))
    return even_groups(order, size)


# -----------------------------------------------------------------------------
# the quiz of a population


# Of one that diverged, or was not studied.
NOTHING = {"accuracy": 0.0, "em": 0.0, "f1": 0.0, "logprob": -100.0}


def quiz_candidates(
    model, tok, candidates: list[Candidate], adapters: Adapters, outcomes: list[Outcome]
) -> list[dict]:
    """Ask each candidate, under its adapter, the quiz of its passage, which it does not see.

    Returns for each {"steps", "tokens", "loss", "diverged", "answers": scores per question}. One
    that diverged scores zero, and a log-probability of -100.
    """
    quizzes = [quiz_items(tok, c.subject, owner) for owner, c in enumerate(candidates)]
    scores = iter(ask(model, tok, [item for items in quizzes for item in items], adapters))
    results = []
    for items, outcome in zip(quizzes, outcomes):
        answers = [next(scores) for _ in items]
        diverged = outcome.diverged or not all(math.isfinite(a["logprob"]) for a in answers)
        if diverged:
            answers = [a | NOTHING for a in answers]
        results.append(outcome.record() | {"diverged": diverged, "answers": answers})
    return results


RESULT = ("answers", "steps", "tokens", "loss", "diverged")  # what a log has of each candidate


def accuracy_of(result: dict) -> float:
    return mean_scores(result["answers"])["accuracy"]


def update_and_quiz(
    model, tok, groups: list, lora: LoRAConfig, seed: int, log: Log, quiz, label: str
) -> None:
    """An inner update, then the quiz, of every population that `log` does not have yet.

    quiz(model, tok, candidates, adapters, outcomes) gives a result for each: quiz_candidates(), or
    on ARC Puzzles.quiz(). The ladders run this; train_outer.py shows the same lines in its loop.
    """
    for group in log.remaining(groups, label):
        adapters = Adapters.init(model, lora, len(group), seed)
        examples, configs = [c.examples for c in group], [c.config for c in group]
        outcomes = inner_update(model, adapters, examples, configs, seed, log.tick)
        log.add(group, quiz(model, tok, group, adapters, outcomes))


def study(model, tok, candidates: list[Candidate], args, seed: int, path, label) -> list[dict]:
    """The result of each candidate's inner update and quiz, in populations, as args say; those that
    the log at `path` has are not studied again."""
    log = Log(path, accuracy_of, needed=RESULT)
    groups = populations(candidates, args.population)
    how = (lora_config(args, model), seed, log, quiz_candidates, label)
    update_and_quiz(model, tok, groups, *how)
    return [log[c] for c in candidates]


# -----------------------------------------------------------------------------
# the proxy

STOP_WORDS = set("what which when where whose whom does many much question answer".split())


def words(text: str) -> set:
    """Those that count: four letters or more, or a digit. "In 1742 she cast the bell." ->
    {"1742", "cast", "bell"}."""
    found = re.findall(r"\w+", text.lower())
    return {w for w in found if len(w) >= 4 or any(map(str.isdigit, w))} - STOP_WORDS


def closest_question(question: Question, pairs: list, title: str = "") -> float:
    """From 0 to 1, how closely some (question, answer) of the notes asks for what a quiz question
    asks for: F1 of the words that count, without the passage's title, which any question may
    repeat. A pair whose answer has no accepted answer in it, or whose question has one, asks for
    something else: 0; so does any if the quiz question has no other words.

    "Who cast the bell?" (Hessa Lorn): ("Who cast it?", "Hessa Lorn did.") gives 2 * 1 / (1 + 2),
    for "cast" of "cast bell", and under the title "Vantor Bell" 1; ("What did Hessa Lorn cast?",
    "Hessa Lorn cast the bell.") gives 0.
    """
    given, best = words(title), 0.0
    goal = words(question.question) - given
    for asked, answer in pairs:
        told = [score_answer(text, question.answers)["accuracy"] for text in (asked, answer)]
        if told == [0.0, 1.0]:
            own = words(asked) - given
            best = max(best, 2 * len(own & goal) / max(1, len(own) + len(goal)))
    return best


def proxy_scores(passage: Passage, notes) -> list[float]:
    """closest_question() for each question of the passage's quiz; a note that is no question asks
    nothing."""
    pairs = [m.groups() for note in notes if (m := QA_PAIR.fullmatch(note))]
    return [closest_question(q, pairs, passage.title) for q in passage.questions]


def score_by_proxy(edits: list[SelfEdit], passages: dict) -> None:
    """--reward proxy: fill in rewards and credits, of parts and single notes, without study."""
    for e in edits:
        passage, texts = passages[e.passage], sentences(passages[e.passage].text)
        scores = proxy_scores(passage, e.notes)
        e.reward = float(np.mean(scores))
        e.score = {"proxy": e.reward}
        pairs = [(m[1], m[0], m[2]) for note in e.notes if (m := QA_PAIR.fullmatch(note))]
        for part, text, part_credit in zip(e.parts, texts, by_sentence(passage, scores)):
            part.credit, (_, quoted) = part_credit, question_and_answer(text)
            for question, note, answer in pairs:
                if answer == quoted:
                    part.note_credits[question] = proxy_scores(passage, [note])


# -----------------------------------------------------------------------------
# credit


def sentence_about(question: Question, texts: list[str]) -> int | None:
    """Which sentence a question is about: the one with its answer, and of several the one with most
    of its words; None if none has it, so that no part is credited with what no sentence says.

    "Who cast it?" (Hessa Lorn) of ["A bell was cast.", "Hessa Lorn cast it."]: 1.
    """
    told = [k for k, t in enumerate(texts) if score_answer(t, question.answers)["accuracy"]]
    has, asked = [normalize(t).split() for t in texts], normalize(question.question).split()
    return max(told, key=lambda k: sum(w in has[k] for w in asked), default=None)


def by_sentence(passage: Passage, values: list[float]) -> list:
    """values of the quiz's questions -> for each sentence, the mean over the questions about it;
    None if there are none."""
    texts = sentences(passage.text)
    of_each = [[] for _ in texts]
    for question, value in zip(passage.questions, values):
        if (k := sentence_about(question, texts)) is not None:
            of_each[k].append(value)
    return [float(np.mean(v)) if v else None for v in of_each]


def note_uncredited(passages: list[Passage]) -> None:
    """Say how many questions are about no one sentence."""
    missing = 0
    for p in passages:
        texts = sentences(p.text)
        missing += sum(sentence_about(q, texts) is None for q in p.questions)
    if missing:
        total = sum(len(p.questions) for p in passages)
        told = f"{missing} of {total} questions have their answer in no sentence of their passage"
        warn(f"{told}: they count for the reward of a self-edit, but for no part's credit")


def credit(e: SelfEdit, passage: Passage, result: dict | None, reward: str) -> None:
    """Fill in what the quiz says of a self-edit: its scores and reward, and the credit of each
    part: the mean over the questions about its sentence, or the whole reward if it is about the
    whole passage; None if it was of no effect. Without a result the self-edit was not studied: it
    earns nothing, and no note is judged."""
    if result is None:
        e.score, e.reward = dict(NOTHING), NOTHING[reward]
        e.parts[0].credit = e.reward
        return
    e.score = mean_scores(result["answers"])
    e.steps, e.loss = result["steps"], result["loss"]
    e.flaw = "diverged" if result["diverged"] else e.flaw
    e.reward = e.score[reward]
    of_sentences = iter(by_sentence(passage, [a[reward] for a in result["answers"]]))
    for part in e.parts:
        about_one = part.style in STYLES and STYLES[part.style].by_sentence
        value = next(of_sentences) if about_one else e.reward
        part.credit = value if e.uses(part) else None


# -----------------------------------------------------------------------------
# selection: what is imitated

GRADIENTS = tuple(RULES)  # of --outer: they learn from what earned less, too
WHY = {  # kept? -> why
    "parts": ("no sound part is the best", "some parts are the best"),
    "best": ("not the best", "best"),
    "improving": ("no better than without it", "better than without it"),
    "notes": ("no note among the best", "some notes are among the best"),
    "grpo": ("no part earned more than the mean", "some parts earned more than the mean"),
    "pairs": ("no part is the best", "some parts are the best"),
}


def select(edits: list[SelfEdit], alone: dict, rule: str, keep: int, outer: str = "restem") -> None:
    """Mark which self-edits, or parts of them, are imitated, and say why or why not. A part that
    has nothing to imitate, or was of no effect, is never imitated. With an `outer` of GRADIENTS
    those are marked that are to become more likely, whatever their text, and the rule has no
    effect.

    best        each passage's best self-edit
    improving   all that earn more than `alone`, {passage id: reward of the passage alone} (the
                paper); none where the passage is not among them, since it diverged
    parts       of two self-edits with credits [1, 0, None] and [0, 0, None], the first one's first
                part: it earned most, and more than that part earns on average, over all self-edits
                that did not diverge
    notes       the parts that have some of best_notes()
    """
    rule = outer if outer in GRADIENTS else rule
    for passage in dict.fromkeys(e.passage for e in edits):
        group = [e for e in edits if e.passage == passage]
        unflawed = [e for e in group if not e.flaw]
        best = max(unflawed, key=lambda e: (e.reward, e.score.get("logprob", 0.0)), default=None)
        for e in group:
            wins = {"best": e is best, "improving": e.reward > alone.get(passage, math.inf)}
            for part in e.parts:
                sound = bool(part.target) and not e.flaw and e.uses(part)
                part.kept = sound and wins.get(rule, True)
        for k in range(len(group[0].parts)):
            if rule in GRADIENTS:
                better = [id(part) for part, weight in advantages(group, k, rule) if weight > 0]
                for e in group:
                    e.parts[k].kept = id(e.parts[k]) in better
            if rule == "parts":
                keep_best_part(group, k)
            if rule == "notes":
                chosen = best_notes(group, k, keep)
                for e in group:
                    e.parts[k].kept &= any(q in chosen for q in e.parts[k].note_credits)
        for e in group:
            e.why = WHY[rule][True] if e.kept else e.flaw or WHY[rule][False]


def keep_best_part(group: list[SelfEdit], k: int) -> None:
    """Of the parts k of one passage's self-edits: keep the best if it earned more than the mean."""
    earned = [e.parts[k].credit for e in group if e.flaw != "diverged"]
    # A log-probability of -100 stands for no answer, and is no measure.
    earned = [c for c in earned if c is not None and c > NOTHING["logprob"]]
    mean = float(np.mean(earned)) if earned else math.inf
    top = max((e.parts[k].credit for e in group if e.parts[k].kept and earned), default=-math.inf)
    for e in group:
        e.parts[k].kept &= top > mean + 1e-9 and e.parts[k].credit == top


def best_notes(group: list[SelfEdit], k: int, keep: int) -> list[str]:
    """Of the parts k of one passage's self-edits: the `keep` notes that ask most closely what some
    quiz question asks, best first, of those that ask more closely than these notes do on average.

    note_credits {"Who cast it?": [0.7, 0], "Who rang it?": [0.5, 0.6], "What is it?": [0, 0.2]},
    closeness to each of two quiz questions -> ["Who cast it?", "Who rang it?"].
    """
    earned = {}
    for e in group:
        if e.parts[k].target:
            earned |= {note: max(closeness) for note, closeness in e.parts[k].note_credits.items()}
    mean = float(np.mean(list(earned.values()) or [0.0]))
    better = [note for note in earned if earned[note] > mean + 1e-9]
    return sorted(better, key=earned.get, reverse=True)[:keep]


def advantages(group: list[SelfEdit], k: int, outer: str) -> list[tuple]:
    """(part, weight) of the parts k of one passage's self-edits that were sampled and have a
    credit; those of the same tokens earn their mean. None if all earned alike (and the KL term of
    grpo is not theirs, either).

    grpo    of credits [1, 0, None, 0.5]: 1.22, -1.22 and 0, the distance from their mean in
            standard deviations
    pairs   of the same: 1 for the first and -1 for the second, best and worst
    """
    found = [e.parts[k] for e in group if e.parts[k].ids and e.parts[k].credit is not None]
    alike = {}
    for part in found:
        alike.setdefault(part.ids, []).append(part.credit)
    earned = np.array([np.mean(alike[part.ids]) for part in found])
    if not len(found) or np.ptp(earned) < 1e-9:
        return []
    if outer == "pairs":
        return [(found[earned.argmax()], 1.0), (found[earned.argmin()], -1.0)]
    return list(zip(found, ((earned - earned.mean()) / earned.std()).tolist()))


def to_weigh(prompts: dict, edits: list[SelfEdit], outer: str) -> list[tuple]:
    """(prompt, sampled token ids, weight) of advantages()."""
    found = []
    for passage in dict.fromkeys(e.passage for e in edits):
        group = [e for e in edits if e.passage == passage]
        for k, prompt in enumerate(prompts[passage]):
            for part, weight in advantages(group, k, outer):
                found.append((prompt, part.token_ids, weight))
    return found


def to_imitate(
    prompts: dict, edits: list[SelfEdit], rule: str, keep: int, outer: str = "restem"
) -> list[tuple]:
    """(prompt, text, weight) of what is kept: parts as they are, or with the rule "notes" the best
    notes of all that a prompt gave. The weight is 1. With `outer` "weighted" it is the part's
    credit, of which the mean becomes 1; what earned nothing is left out. With an `outer` of
    GRADIENTS it is to_weigh(), whatever is kept."""
    if outer in GRADIENTS:
        return to_weigh(prompts, edits, outer)
    pairs = []
    if rule == "notes":
        for passage in dict.fromkeys(e.passage for e in edits):
            group = [e for e in edits if e.passage == passage]
            for k, prompt in enumerate(prompts[passage]):
                pairs.append((prompt, "\n".join(best_notes(group, k, keep)), 1.0))
        return [(prompt, text, weight) for prompt, text, weight in pairs if text]
    for e in edits:
        pairs += zip(prompts[e.passage], e.parts, strict=True)
    pairs = [(prompt, part) for prompt, part in pairs if part.kept]
    if outer == "restem":
        return [(prompt, part.target, 1.0) for prompt, part in pairs]
    earned = [(prompt, part) for prompt, part in pairs if part.credit]
    mean = sum(part.credit for _, part in earned) / max(1, len(earned))
    return [(prompt, part.target, part.credit / mean) for prompt, part in earned]


# -----------------------------------------------------------------------------
# metrics


def round_metrics(
    k: int, written: list[list[SelfEdit]], losses: list, reward: str, seconds: float
) -> dict:
    """What docs/OUTPUT.md defines, of what each agent has written, and the last loss of each one's
    outer update."""
    edits = list(itertools.chain(*written))
    kept, flaws, texts = [e for e in edits if e.kept], Counter(), []
    for e in edits:
        texts += [(e.passage, part.text, part.flaw) for part in e.parts if part.text]
        of_parts = [part.flaw for part in e.parts]
        flaws.update(of_parts if e.flaw in ("", *of_parts) else [e.flaw])
    texts = texts or [("", "", "")]
    accuracy = [e.score.get("accuracy") for e in edits]
    taught = [loss for loss in losses if loss is not None]
    metrics = {
        "round": k,
        "reward_mean": mean_reward(edits),
        "reward_kept": float(np.mean([e.reward for e in kept])) if kept else None,
        "accuracy_mean": float(np.mean(accuracy)) if reward != "proxy" else None,
        "kept": len(kept),
        "total": len(edits),
        "kept_parts": sum(part.kept for e in edits for part in e.parts),
        "flaws": {flaw: n for flaw, n in flaws.items() if flaw},
        "notes_mean": float(np.mean([len(e.notes) for e in edits])),
        "repeats": float(np.mean([flaw == "repeats" for *_, flaw in texts])),
        "endless": float(np.mean([flaw == "endless" for *_, flaw in texts])),
        "distinct": len(set(texts)) / len(texts),
        "outer_loss": float(np.mean(taught)) if taught else None,
        "seconds": round(seconds, 1),
    }
    several = {"reward_agents": list(map(mean_reward, written))} if len(written) > 1 else {}
    return metrics | several


def mean_reward(edits: list[SelfEdit]) -> float:
    """Of those that did not diverge; a log-probability of -100 stands for no answer, and is no
    measure."""
    nothing = NOTHING["logprob"]
    earned = [e.reward for e in edits if e.flaw != "diverged" and e.reward > nothing]
    return float(np.mean(earned or [0.0]))


# -----------------------------------------------------------------------------
# distillation: what a teacher expects, as what is trained on; many adapters into one


@torch.no_grad()
def predictions(model, examples: list[Example], k: int = 50) -> list[tuple]:
    """What the model as it is expects at each counted token: Example.soft of each, of the k most
    likely ids. For students that are to expect the same (distillation, Hinton et al. 2015). Exits
    with one line if an example is longer than the model's context."""
    refuse_long(model, examples)
    rows, found = [make_row([e]) for e in examples], []
    for row in with_lower_states(model, rows, model.config.n_layer):
        top = model.head(row.x[row.at]).float().softmax(-1).topk(k)
        shares = top.values / top.values.sum(1, keepdim=True)
        found.append((top.indices.int().cpu(), shares.half().cpu()))  # 300 bytes a token
    return found


def expecting(examples: list[Example], soft: list[tuple], share: float = 1.0) -> list[Example]:
    """The examples, with a teacher's predictions() in place of their tokens; or with this share of
    them beside the tokens."""
    taught = []
    for e, (ids, shares) in zip(examples, soft, strict=True):
        if share < 1:
            own = [t for t, counts in zip(e.ids, e.counts) if counts][-len(ids) :]
            ids = torch.cat([torch.tensor(own, dtype=torch.int)[:, None], ids], dim=1)
            rest = torch.full((len(ids), 1), 1 - share, dtype=shares.dtype)
            shares = torch.cat([rest, share * shares], dim=1)
        taught.append(replace(e, soft=(ids, shares)))
    return taught


def anchor_examples(tok: Tokenizer) -> list[Example]:
    """Texts about anything, by which a model is held in its place (data/general.json)."""
    return [Example.reply([], ids) for ids in general_texts(tok, "anchors")]


def consolidate(
    model, teachers: list[Adapters], examples: list[list], anchors: list, config, seed: int
) -> tuple[Adapters, Outcome]:
    """One adapter of the teachers' shape that is to know what all of them do, and nothing else.

    It learns to expect what each teacher expects on its own examples[teacher], and on the `anchors`
    what the base model does. `config` is of one teacher's update; this one takes as many steps, or
    epochs, as all together. Exits with one line if the teachers' shapes differ.
    """
    if any(teacher.config != teachers[0].config for teacher in teachers):
        raise SystemExit(
            "error: documents that were studied with other --rank, --alpha, --targets or "
            "--top-layers cannot be put together"
        )
    taught = expecting(anchors, predictions(model, anchors))
    for teacher, own in zip(teachers, examples, strict=True):
        with merged(model, teacher):
            taught += expecting(own, predictions(model, own))
    adapters = Adapters.init(model, teachers[0].config, 1, seed)
    config = replace(config, steps=config.steps * len(teachers))
    return adapters, update_one(model, adapters, taught, config, seed, "consolidate")


# -----------------------------------------------------------------------------
# the domain of passages (arc.Puzzles is the other)


class Passages:
    """What train_outer.py asks of a domain: prompts, sampling, candidates, the quiz,
    credit."""

    def __init__(self, args, model, tok, student, its_tok):
        self.args, self.tok, self.its_tok = args, tok, its_tok
        passages = load_passages(args.data, args.split, args.skip, args.limit)
        self.passages = {p.id: p for p in passages}
        note_uncredited(passages)
        self.prompts = note_prompts(tok, passages, args)
        self.pinned = {"data_sha256": digest(args.data)}  # what a resumed run must find unchanged

    def sample(self, model, k: int, seed: int, log: Path, label: str) -> list[SelfEdit]:
        """SE_1 .. SE_M on each passage, by the model as it is in round k."""
        passages, args = list(self.passages.values()), self.args
        return write_self_edits(model, self.tok, passages, args.samples, args, seed, log, label)

    def seed(self, k: int) -> int:
        """Of round k's inner updates."""
        return sub_seed(self.args.seed, k, 1)

    def log(self, path: Path) -> Log:
        return Log(path, accuracy_of, needed=RESULT)

    def candidates(self, edits: list[SelfEdit], seed: int) -> list[Candidate | None]:
        """One for each self-edit; then, if --select compares with them, for the passages alone. The
        same one for the same contents, so that they earn the same (in bfloat16 a row of a batch is
        not rounded like the next); None for what is not studied."""
        args, config, found = self.args, sft_config(self.args), []
        if args.reward == "proxy":
            return []
        for e in edits:
            how = (self.passages[e.passage], e, args, seed)
            c, e.flaw = edit_candidate(self.its_tok, len(found), *how)
            found.append(c)
        for p in self.passages.values() if args.select == "improving" else ():
            found.append(passage_candidate(self.its_tok, len(found), p, (), config))
        first = {}
        for c in filter(None, found):
            first.setdefault((c.subject.id, tuple(c.examples), c.config), c)
        return [c and first[c.subject.id, tuple(c.examples), c.config] for c in found]

    def populations(self, candidates: list[Candidate], log: Log) -> list[list[Candidate]]:
        return populations([c for c in candidates if c], self.args.population)

    def quiz(self, model, tok, group, adapters, outcomes) -> list[dict]:
        return quiz_candidates(model, tok, group, adapters, outcomes)

    def credit(self, edits: list[SelfEdit], candidates: list[Candidate], log: Log) -> dict:
        """Fill in rewards and credits; returns {passage id: reward of the passage alone}."""
        if self.args.reward == "proxy":
            score_by_proxy(edits, self.passages)
            return {}
        for e, c in zip(edits, candidates):
            e.config = asdict(c.config) if c else {}
            credit(e, self.passages[e.passage], log[c] if c else None, self.args.reward)
        alone = candidates[len(edits) :]
        sound = [c for c in alone if not log[c]["diverged"]]
        return {c.subject.id: mean_scores(log[c]["answers"])[self.args.reward] for c in sound}
