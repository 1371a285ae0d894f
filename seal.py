"""SEAL in one file: a language model learns from what it reads, and to write what it learns from.

    python seal.py                    # one outer round on four passages, and what came of it
    python seal.py --samples 5 --steps 48 --temperature 1

This is the lesson: plain loops, one candidate at a time, every step in sight. The numbers are the
steps of the paper's Algorithm 1 (arXiv 2506.10943, section 3.1):

    (1) SE ~ LM_theta( . | C)           sample a self-edit: the model's own notes on a passage C
    (2) theta' = SFT(theta, SE)         inner update: train a small LoRA on them
    (3) A ~ LM_theta'( . | tau)         quiz: ask about C, which is NOT in the prompt
    (4) r = r(A, tau)                   reward: the share of right answers
    (5) theta = SFT(theta, {SE: r > 0}) outer update (ReST-EM): imitate the self-edits that helped

Notes are questions about each sentence, which the sentence itself answers. The policy theta writes
them; the untrained model theta_0 studies and answers (docs/PAPER.md: where this differs, and why).
train_outer.py does the same fast, for populations; tests/test_seal.py holds the two together: they
give the same adapters, answers, rewards and selection. The ladder at the end stands on the passages
of the round: it shows how one is read, not what SEAL is worth (docs/RESULTS.md does).
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
from data.text import sentences
from lm.checkpoint import load_model
from lm.tokenizer import Tokenizer
from lora import PROJECTIONS, Adapters, LoRAConfig, attached, merged
from model import CachedLayer


def setting(default, about: str):
    return dataclasses.field(default=default, metadata={"help": about})


@dataclasses.dataclass
class Settings:
    model: str = setting("checkpoints/smollm2-135m-instruct", "Hugging Face folder")
    data: str = setting("data/passages.json", "passages with questions")
    passages: int = setting(4, "how many training passages; the paper: 50")
    samples: int = setting(2, "self-edits per passage, M; the paper: 5")
    temperature: float = setting(0.7, "of sampling; the paper: 1")
    max_new: int = setting(48, "longest part of a self-edit, in tokens")
    top_layers: int = setting(10, "the inner update adapts the last K layers; the paper: all")
    lr: float = setting(4e-3, "inner peak learning rate, decays linearly; the paper: 1e-3")
    steps: int = setting(24, "inner steps, of one sequence each; the paper: 10 epochs")
    outer_lr: float = setting(5e-4, "outer peak learning rate; the paper: 3e-4")
    outer_epochs: int = setting(2, "passes over what is imitated; the paper: 2")
    seed: int = setting(0, "same seed, same output")


def sub_seed(*keys: int) -> int:  # (seed, round, purpose): an independent seed for each purpose
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


# -----------------------------------------------------------------------------
# (1) sample: SE ~ LM_theta( . | C)

INSTRUCTION = (
    "Write three different questions about the sentence, one per line. "
    "Use full names and words of the sentence."
)


def edit_prompt(tok, title: str, sentence: str) -> list[int]:
    content = f"{INSTRUCTION}\n\nTitle: {title}\nSentence: {sentence}"
    return tok.chat([{"role": "user", "content": content}])


@torch.inference_mode()
def generate(model, prompt: list[int], max_new: int, ends, temperature=0.0, u=None) -> list[int]:
    """Continue a prompt, token by token, with a key-value cache: the most likely token, or with a
    temperature one of the nucleus, the likeliest with 95 % of the mass, by u[t] in [0, 1)."""
    cache, ids, new = [CachedLayer() for _ in model.layers], prompt, []
    while len(new) < max_new and not (new and new[-1] in ends):
        logits = model(torch.tensor([ids], device=model.device), cache)[0, -1]  # (V)
        token = int(logits.argmax())
        if temperature:
            probs = (logits.float() / temperature).softmax(-1)
            probs, order = probs.sort(descending=True, stable=True)
            mass = probs.cumsum(-1)
            last = int((mass < 0.95).sum())  # where the nucleus ends
            n = int(torch.searchsorted(mass, u[len(new)] * mass[last], right=True))
            token = int(order[min(n, last)])
        ids = [token]
        new.append(token)
    return new


def read_questions(tok, ids: list[int]) -> list[str]:
    """What a sample is good for: its lines that are questions, without list markers, each once. A
    line that ran into the length limit is not finished, and goes."""
    ended = ids[-1] in tok.end_ids
    lines = tok.decode(ids[:-1] if ended else ids).strip().split("\n")
    questions = []
    for line in lines if ended else lines[:-1]:
        line = re.sub(r"^\s*(?:[-*\u2022]+|\(?\d{1,2}[.):])(?:\s+|$)", "", line)
        line = re.sub(r"^Question\s*\d*\s*:\s*", "", " ".join(line.split()), flags=re.IGNORECASE)
        if line.endswith("?") and line != "?" and not line.startswith("Answer"):
            questions.append(line)
    return list(dict.fromkeys(questions))


def write(model, tok, passages, copies: int, s: Settings, seed: int) -> list:
    """edits[passage][copy][sentence]: a list of questions, sampled from the model as it is now."""
    prompts = []
    for p in passages:
        prompts.append([edit_prompt(tok, p.title, text) for text in sentences(p.text)])
    generator = torch.Generator().manual_seed(sub_seed(seed, 0))
    u = iter(torch.rand(sum(map(len, prompts)) * copies, s.max_new, generator=generator))
    edits = []
    for of_passage in prompts:
        own = [[] for _ in range(copies)]
        for prompt in of_passage:
            for edit in own:
                ids = generate(model, prompt, s.max_new, tok.end_ids, s.temperature, next(u))
                edit.append(read_questions(tok, ids))
        edits.append(own)
    return edits


# -----------------------------------------------------------------------------
# (2) inner update: theta' = SFT(theta, SE)


def training_examples(tok, passage, edit: list[list[str]]) -> list[tuple]:
    """(prompt, reply) pairs of token ids; the loss counts the reply. First the passage itself, then
    each note: its question is asked as the quiz asks, and the sentence that it is about answers."""
    end, notes = tok.end_ids[0], {}  # the end counts, too: the model learns to stop
    for sentence, questions in zip(sentences(passage.text), edit):
        notes |= dict.fromkeys((question, sentence) for question in questions)  # each once
    examples = [([], [*tok.encode(f"{passage.title}\n{passage.text}"), end])]
    for question, sentence in notes:
        prompt = quiz_prompt(tok, passage.title, question)
        examples.append((prompt, [*tok.encode(sentence), end]))
    return examples


def sft(model, adapter: Adapters, examples: list[tuple], lr: float, steps: int, seed: int) -> list:
    """Train a LoRA adapter in place, one sequence a step, every epoch all of them in a new order.
    Inner and outer update are this same routine. Returns the losses."""
    examples = sorted(examples, key=lambda e: -len(e[0]) - len(e[1]))
    weights = torch.nn.Parameter(adapter.flat[0])  # all A and B of the adapter, as one vector
    optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    order, losses = [], []
    while len(order) < steps:
        rng = np.random.default_rng([seed, len(order) // len(examples)])
        order += rng.random(len(examples)).argsort().tolist()
    with attached(model, adapter) as lora:
        for step, i in enumerate(order[:steps]):
            prompt, reply = examples[i]
            ids = torch.tensor([prompt + reply], device=model.device)
            first = max(len(prompt), 1)  # nothing predicts the very first token
            lora.bind([0], train=True)  # W x + (alpha / r) B A x, with A and B as they are now
            logits = model(ids)[0, first - 1 : -1]
            loss = F.cross_entropy(logits.float(), ids[0, first:])
            loss.backward()
            gradient = lora.gradients()[0]
            weights.grad = gradient * (1 / (gradient.norm() + 1e-6)).clamp(max=1)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


# -----------------------------------------------------------------------------
# (3) quiz: A ~ LM_theta'( . | tau), and (4) reward


def quiz_prompt(tok, title: str, question: str) -> list[int]:
    about = f"Topic: {title}\nQuestion" if title else "Question"
    content = f"{about}: {question}\nAnswer in one short sentence."
    return tok.chat([{"role": "user", "content": content}])


def normalize(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(text: str, answers) -> bool:
    """Does an accepted answer stand in the text, as whole words?"""
    return any(f" {normalize(a)} " in f" {normalize(text)} " for a in answers)


def ask(model, tok, passage) -> list[tuple]:
    """(answer, is it right?) for each question. The passage is not in the prompt; nor is its title,
    where that would give the answer away."""
    answers, ends = [], {*tok.end_ids, *tok.newline_ids}
    for q in passage.questions:
        told = any(normalize(a) in normalize(passage.title) for a in q.answers)
        ids = generate(model, quiz_prompt(tok, "" if told else passage.title, q.question), 48, ends)
        answer = tok.decode([t for t in ids if t not in tok.end_ids]).strip().split("\n")[0]
        answers.append((answer, contains(answer, q.answers)))
    return answers


def study(model, tok, passage, edit: list[list[str]], s: Settings) -> dict:
    """(2) to (4) for one candidate: train theta_0 on passage and notes, ask it, and undo it all."""
    n, seed = model.config.n_layer, sub_seed(s.seed, 1, 1)
    # The paper: rank 32, alpha 64, q_proj and v_proj only.
    lora = LoRAConfig(16, 32.0, tuple(PROJECTIONS), n - s.top_layers, n)
    adapter = Adapters.init(model, lora, 1, seed)
    losses = sft(model, adapter, training_examples(tok, passage, edit), s.lr, s.steps, seed)
    with attached(model, adapter):
        answers = ask(model, tok, passage)
    reward = float(np.mean([right for _, right in answers]))
    return {"adapter": adapter.flat[0], "losses": losses, "answers": answers, "reward": reward}


# -----------------------------------------------------------------------------
# the loop


def main(s: Settings) -> dict:
    start, model, tok = time.time(), load_model(s.model), Tokenizer(s.model)
    passages, n_layer = load_passages(s.data, "train", 0, s.passages), model.config.n_layer
    if not 1 <= s.top_layers <= n_layer:
        raise SystemExit(f"error: --top_layers {s.top_layers}: the model has {n_layer} layers")
    lora = LoRAConfig(64, 128.0, tuple(PROJECTIONS), 0, n_layer)
    policy = Adapters.init(model, lora, 1, sub_seed(s.seed, 0))  # theta is theta_0 and this adapter
    edits = write(model, tok, passages, s.samples, s, sub_seed(s.seed, 1, 0))  # (1)

    ladder = {"base": [], "passage": [], "passage+self-edit": [], "seal-1": []}
    candidates, examples = [], []
    for passage, of_passage in zip(passages, edits):
        before = ask(model, tok, passage)
        alone = study(model, tok, passage, [], s)  # without notes: what notes have to beat
        studied = [study(model, tok, passage, edit, s) for edit in of_passage]  # (2), (3), (4)
        ladder["base"].append(np.mean([right for _, right in before]))
        ladder["passage"].append(alone["reward"])
        ladder["passage+self-edit"].append(np.mean([c["reward"] for c in studied]))
        candidates.append(studied)
        print(f"\n=== {passage.title} ===\n{passage.text}")
        for n, (edit, c) in enumerate(zip(of_passage, studied)):
            c["kept"] = c["reward"] > alone["reward"]
            losses = " ".join(f"{loss:.2f}" for loss in c["losses"][:: max(1, s.steps // 6)])
            rewards = f"reward {c['reward']:.2f}, passage alone {alone['reward']:.2f}"
            print(f"\n  self-edit {n + 1}: losses {losses}")
            print(f"  {rewards}: {'imitated' if c['kept'] else 'not imitated'}")
            for text, questions in zip(sentences(passage.text), edit):
                print(f"    {text}", *questions, sep="\n        ", flush=True)
                if c["kept"] and questions:
                    target = [*tok.encode("\n".join(questions)), tok.end_ids[0]]
                    examples.append((edit_prompt(tok, passage.title, text), target))
        print("\n  the quiz: untrained, after the passage alone, after self-edit 1")
        for q, *answers in zip(passage.questions, before, alone["answers"], studied[0]["answers"]):
            print(f"    {q.question} ({q.answers[0]})")
            for answer, right in answers:
                print(f"      {'right' if right else 'wrong'}  {answer}")

    if examples:  # (5): theta_0 stays as it is, the policy adapter learns
        total, seed = s.outer_epochs * len(examples), sub_seed(s.seed, 1, 2)
        losses = sft(model, policy, examples, s.outer_lr, total, seed)
        print(f"\nimitated: {len(examples)} parts, loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    with merged(model, policy):
        after = write(model, tok, passages, 1, s, sub_seed(s.seed, 2, 0))
    for passage, [edit] in zip(passages, after):
        ladder["seal-1"].append(study(model, tok, passage, edit, s)["reward"])

    print(f"\nquiz accuracy without the passage in the prompt, {len(passages)} passages:")
    for row, values in ladder.items():
        print(f"  {row:18} {100 * np.mean(values):5.1f} %  ", *(f"{v:.2f}" for v in values))
    print(f"{time.time() - start:.0f} s")
    return {"edits": edits, "candidates": candidates, "policy": policy.flat, "ladder": ladder}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for f in dataclasses.fields(Settings):
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=f.metadata["help"])
    main(Settings(**vars(parser.parse_args())))
