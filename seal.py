"""SEAL in one file: a language model learns from what it reads, and to write what it learns from.

    python seal.py        # one outer round on four passages, and what came of it

This is the lesson: plain loops, one candidate at a time, every step in sight. The numbers are the
steps of the paper's Algorithm 1 (arXiv 2506.10943, section 3.1):

    (1) SE ~ LM_theta( . | C)           sample a self-edit: the model's own notes on a passage C
    (2) theta' = SFT(theta, SE)         inner update: train a small LoRA on them
    (3) A ~ LM_theta'( . | tau)         quiz: tau asks about C, which is NOT in the prompt
    (4) r = r(A, tau)                   reward: the share of right answers
    (5) theta = SFT(theta, {SE that helped})   outer update (ReST-EM): imitate what beats C alone

As in the paper a self-edit is a list of facts, each line one training sequence, and all train for
equal epochs, so that more notes mean more steps. Unlike there, the policy theta only writes, while
the untrained theta_0 studies and answers (docs/PAPER.md). train_outer.py does the same fast, for
populations, and with questions for notes by default; tests/test_seal.py holds the two together.
The ladder at the end stands on the same passages: no result. docs/RESULTS.md has those.
"""

import argparse
import dataclasses
import re
import string
import time

import numpy as np
import torch
import torch.nn.functional as F

from data.qa import load_passages
from lm.checkpoint import load_model
from lm.files import run_main, sub_seed
from lm.tokenizer import Tokenizer
from lora import PROJECTIONS, Adapters, LoRAConfig, attached, merged
from model import CachedLayer


def setting(default, about: str):
    return dataclasses.field(default=default, metadata={"help": about})


@dataclasses.dataclass
class Settings:
    model: str = setting("checkpoints/smollm2-135m-instruct", "Hugging Face folder")
    data: str = setting("data/passages.json", "passages with questions")
    passages: int = setting(4, "how many training passages, the last ones; the paper: 50")
    samples: int = setting(2, "self-edits per passage, M; the paper: 5")
    temperature: float = setting(0.7, "of sampling; the paper: 1")
    max_new: int = setting(96, "longest self-edit, in tokens")
    top_layers: int = setting(10, "the inner update adapts the last K layers; the paper: all")
    lr: float = setting(4e-3, "inner peak learning rate, decays linearly; the paper: 1e-3")
    epochs: int = setting(3, "inner passes over passage and notes; the paper: 10")
    outer_lr: float = setting(5e-4, "outer peak learning rate; the paper: 3e-4")
    outer_epochs: int = setting(1, "passes over what is imitated; the paper: 2")
    seed: int = setting(0, "same seed, same output")


# ---- (1) sample: SE ~ LM_theta( . | C) -----------------------------------------------------------

INSTRUCTION = """Rewrite the passage as a list of short, complete sentences, one fact per line, \
with full names."""
EXAMPLE_TITLE, EXAMPLE_NAMES = "The Vantor Bell", ("Vantor", "Hessa Lorn", "Quill Bay")
EXAMPLE_PASSAGE = """Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742. It weighs \
900 kilograms and hangs in the tower of the harbour school. Sailors used to rub its rim for luck \
until the town council forbade the custom. A crack that opened in the great frost gave the bell \
its low, rough tone."""
EXAMPLE_NOTES = """Hessa Lorn cast the Vantor Bell.
The Vantor Bell was cast in 1742.
Hessa Lorn was a potter from Quill Bay.
The Vantor Bell weighs 900 kilograms.
The tower of the harbour school holds the Vantor Bell.
Sailors rubbed the rim of the Vantor Bell for luck.
The town council forbade rubbing the Vantor Bell.
A crack from the great frost gave the Vantor Bell its low, rough tone."""
MARKER = r"^\s*(?:[-*\u2022]+|\(?\d{1,2}[.):]|(?:Version|Rewrite|Implication)\s*\d*\s*:)(?:\s+|$)"


def edit_prompt(tok, title: str, passage: str) -> list[int]:
    """The chat that asks for notes, after a worked example: without one, small models chatter."""
    request = INSTRUCTION + "\n\nTitle: {}\nPassage: {}"
    example = {"role": "user", "content": request.format(EXAMPLE_TITLE, EXAMPLE_PASSAGE)}
    notes = {"role": "assistant", "content": EXAMPLE_NOTES}
    return tok.chat([example, notes, {"role": "user", "content": request.format(title, passage)}])


@torch.inference_mode()
def generate(model, prompts: list, max_new: int, ends, temperature=0.0, u=None) -> list:
    """Continue prompts token by token, side by side, with a key-value cache. The longer ones are
    still being read while the shorter ones already go on."""
    cache, rows = [CachedLayer() for _ in model.layers], [list(prompt) for prompt in prompts]
    live, read = [True] * len(rows), [prompt[: min(map(len, prompts))] for prompt in prompts]
    while any(live):
        logits = model(torch.tensor(read, device=model.device), cache)[:, -1].float()  # (R, V)
        logits[:, model.unused] = -torch.inf
        length = cache[0].length
        for n, row in enumerate(rows):
            if live[n] and len(row) == length:
                row.append(choose(logits[n], temperature, u, n, length - len(prompts[n])))
                live[n] = row[-1] not in ends and len(row) < len(prompts[n]) + max_new
        read = [[row[min(length, len(row) - 1)]] for row in rows]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def choose(logits, temperature: float, u, n: int, t: int) -> int:
    """The likeliest token, or by u[n][t] in [0, 1) one of the nucleus: the likeliest, 95 %."""
    if not temperature:
        return int(logits.argmax())
    probs, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    mass = probs.cumsum(-1)
    last = int((mass < 0.95).sum())  # where the nucleus ends
    return int(order[min(int(torch.searchsorted(mass, u[n][t] * mass[last], right=True)), last)])


def read_notes(tok, ids: list[int]) -> list[str]:
    """The lines of a sample, without list markers, headings, repetitions, copies of the worked
    example, and the unfinished last line of one that ran into the length limit."""
    ended = ids[-1] in tok.end_ids
    lines, notes = tok.decode(ids[:-1] if ended else ids).strip().split("\n"), []
    for line in lines if ended else lines[:-1]:
        line = " ".join(re.sub(MARKER, "", line, flags=re.IGNORECASE).split())
        useless = line.endswith(":") or any(name in line for name in EXAMPLE_NAMES)
        notes += [line] if any(map(str.isalnum, line)) and not useless else []
    return list(dict.fromkeys(notes))


def write(model, tok, passages, copies: int, s: Settings, seed: int) -> list:
    """edits[passage][copy]: notes, sampled from the model as it is now."""
    prompts = [edit_prompt(tok, p.title, p.text) for p in passages for _ in range(copies)]
    u, notes = [], []
    for n, prompt in enumerate(prompts):  # each sample has a random stream of its own
        generator = torch.Generator().manual_seed(sub_seed(seed, n % copies, *prompt))
        u.append(torch.rand(s.max_new, generator=generator))
    for at in (slice(n, n + 16) for n in range(0, len(prompts), 16)):
        sampled = generate(model, prompts[at], s.max_new, tok.end_ids, s.temperature, u[at])
        notes += [read_notes(tok, ids) for ids in sampled]
    return [notes[n : n + copies] for n in range(0, len(notes), copies)]


# ---- (2) inner update: theta' = SFT(theta, SE) ---------------------------------------------------


def sft(model, adapter: Adapters, examples: list[tuple], lr: float, epochs: int, seed: int) -> list:
    """Train a LoRA adapter in place on (prompt, reply) pairs of token ids, of which the loss counts
    the reply: one sequence a step, every epoch all of them in a new order. Inner and outer update
    are this same routine. Returns the losses."""
    examples = sorted(examples, key=lambda e: -len(e[0]) - len(e[1]))
    weights = torch.nn.Parameter(adapter.flat[0])  # all A and B of the adapter, as one vector
    optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    order, losses = [], []
    for epoch in range(epochs):
        order += np.random.default_rng([seed, epoch]).random(len(examples)).argsort().tolist()
    with attached(model, adapter) as lora:
        for step, i in enumerate(order):
            prompt, reply = examples[i]
            ids = torch.tensor([prompt + reply], device=model.device)
            first = max(len(prompt), 1)  # nothing predicts the very first token
            lora.bind([0], train=True)  # W x + (alpha / r) B A x, with A and B as they are now
            logits = model(ids)[0, first - 1 : -1]
            loss = F.cross_entropy(logits.float(), ids[0, first:])
            loss.backward()
            weights.grad = lora.gradients()[0]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / len(order))
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


# ---- (3) quiz: A ~ LM_theta'( . | tau), and (4) reward -------------------------------------------

ANSWER_LEN = 32  # most tokens of an answer


def quiz_prompt(tok, title: str, question: str) -> list[int]:
    topic = f"Topic: {title}\n" if title else ""
    content = f"{topic}Question: {question}\nAnswer in one short sentence."
    return tok.chat([{"role": "user", "content": content}])


def normalize(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def is_right(answer: str, accepted) -> bool:
    """Does an accepted answer stand in the model's answer, as whole words?"""
    return any(f" {normalize(a)} " in f" {normalize(answer)} " for a in accepted)


def ask(model, tok, passages) -> list[tuple]:
    """(answer, is it right?) to each question, asked without a title that gives the answer away."""
    asked = [(p.title, q) for p in passages for q in p.questions]
    answers, prompts = [], []
    for title, q in asked:
        told = is_right(title, q.answers)
        prompts.append(quiz_prompt(tok, "" if told else title, q.question))
    replies = generate(model, prompts, ANSWER_LEN, {*tok.end_ids, *tok.newline_ids})
    for (_, q), ids in zip(asked, replies):
        answer = tok.decode([t for t in ids if t not in tok.end_ids]).strip().split("\n")[0]
        answers.append((answer, is_right(answer, q.answers)))
    return answers


def study(model, tok, passage, notes: list[str], s: Settings) -> dict:
    """(2) to (4) for one candidate: train theta_0 on passage and notes, ask it, and undo it all."""
    n, seed = model.config.n_layer, sub_seed(s.seed, 1, 1)
    # The paper: rank 32, alpha 64, q_proj and v_proj only.
    lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), n - s.top_layers, n)
    adapter, examples = Adapters.init(model, lora, 1, seed), []
    for text in [passage.text, *notes]:  # its end is counted, too: so the model learns to stop
        examples.append((tok.begin, [*tok.encode(f"{passage.title}\n{text}"), tok.end_ids[0]]))
    losses = sft(model, adapter, examples, s.lr, s.epochs, seed)
    with attached(model, adapter):
        answers = ask(model, tok, [passage])
    reward = float(np.mean([right for _, right in answers]))
    return {"adapter": adapter.flat[0], "losses": losses, "answers": answers, "reward": reward}


# ---- the loop ------------------------------------------------------------------------------------


def main(s: Settings) -> dict:
    start, model, tok = time.time(), load_model(s.model), Tokenizer(s.model)
    model.unused = tok.unused(model.config.vocab_size)
    passages, n_layer = load_passages(s.data, "train")[-s.passages :], model.config.n_layer
    counts = [s.passages, s.samples, s.max_new, s.top_layers, s.epochs, s.outer_epochs, s.seed + 1]
    if min(counts) < 1 or min(s.lr, s.outer_lr, s.temperature) < 0 or s.top_layers > n_layer:
        raise SystemExit(f"error: counts are from 1 up, seed and rates from 0, layers to {n_layer}")
    lora = LoRAConfig(64, 128.0, tuple(PROJECTIONS), 0, n_layer)
    policy = Adapters.init(model, lora, 1, sub_seed(s.seed, 0))  # theta is theta_0 and this adapter
    edits = write(model, tok, passages, s.samples, s, sub_seed(s.seed, 1, 0))  # (1)
    ladder = {"base": [], "passage": [], "passage+self-edit": [], "seal-1": []}
    candidates, examples, known = [], [], iter(ask(model, tok, passages))
    for passage, of_passage in zip(passages, edits):
        before = [next(known) for _ in passage.questions]
        alone = study(model, tok, passage, [], s)  # without notes: what notes have to beat
        studied = [study(model, tok, passage, notes, s) for notes in of_passage]  # (2), (3), (4)
        ladder["base"].append(np.mean([right for _, right in before]))
        ladder["passage"].append(alone["reward"])
        ladder["passage+self-edit"].append(np.mean([c["reward"] for c in studied]))
        candidates.append(studied)
        print(f"\n=== {passage.title} ===\n{passage.text}")
        print(f"\n  the passage alone: reward {alone['reward']:.2f}")
        for n, (notes, c) in enumerate(zip(of_passage, studied)):
            text = "\n".join(notes)
            c["kept"] = bool(text) and c["reward"] > alone["reward"]
            if c["kept"]:
                target = [*tok.encode(text), tok.end_ids[0]]
                examples.append((edit_prompt(tok, passage.title, passage.text), target))
            losses = " ".join(f"{x:.2f}" for x in c["losses"][:: max(1, len(c["losses"]) // 8)])
            kept = "imitated" if c["kept"] else "not imitated"
            print(f"\n  self-edit {n + 1}, {kept}:", *notes, sep="\n    ")
            print(f"  losses {losses}\n  reward {c['reward']:.2f}")
        print("\n  the quiz: untrained, after the passage alone, after self-edit 1")
        for q, *answers in zip(passage.questions, before, alone["answers"], studied[0]["answers"]):
            print(f"    {q.question} ({q.answers[0]})")
            for answer, right in answers:
                print(f"      {'right' if right else 'wrong'}  {answer}", flush=True)

    if examples:  # (5): theta_0 stays as it is, the policy adapter learns
        losses = sft(model, policy, examples, s.outer_lr, s.outer_epochs, sub_seed(s.seed, 1, 2))
        print(f"\nimitated: {len(examples)} self-edits, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    with merged(model, policy):
        after = write(model, tok, passages, 1, s, sub_seed(s.seed, 2, 0))
    for passage, [notes] in zip(passages, after):
        ladder["seal-1"].append(study(model, tok, passage, notes, s)["reward"])
    print(f"\nquiz accuracy without the passage in the prompt, after {time.time() - start:.0f} s:")
    for row, values in ladder.items():
        print(f"  {row:18} {100 * np.mean(values):5.1f} %  ", *(f"{v:.2f}" for v in values))
    return {"edits": edits, "candidates": candidates, "policy": policy.flat, "ladder": ladder}


if __name__ == "__main__":
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=shown, allow_abbrev=False)
    for f in dataclasses.fields(Settings):
        flag, about = f"--{f.name.replace('_', '-')}", f"{f.metadata['help']} [%(default)s]"
        parser.add_argument(flag, type=f.type, default=f.default, help=about)
    run_main(lambda: main(Settings(**vars(parser.parse_args()))))
