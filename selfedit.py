"""Self-edits: the prompts that ask for them, what a sampled text becomes, and the sampler (key-value cache, batched).

A self-edit is what the model writes about a passage in order to learn it. Here it is a list of notes; each note becomes
one training sequence of the inner update, next to the passage itself:

    {title}\n{passage}        {title}\n{note 1}        {title}\n{note 2}    ...

How this departs from the paper (arXiv 2506.10943, sections 3.1 and B):
 1. The prompts are worded anew, for a chat model, and by default show one worked example: without it a 135M model
    answers with chatter, with it it lists facts.
 2. Every training sequence ends with an end-of-text token that the loss counts, and is never padded: pads do not count.
 3. List markers ("1.", "-") are stripped, a note that repeats an earlier one is dropped, and when a sample ran into
    the length limit its unfinished last note is dropped.

Top to bottom: the record, prompt styles, parsing, training sequences, the sampler.
"""

import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from os.path import commonprefix
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from cache import KVCache
from common import Progress, read_jsonl, sub_seed, write_jsonl
from inner import Example
from lora import Adapters, attached
from model import Transformer, causal_mask, packed_mask
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# the record


@dataclass
class SelfEdit:
    """One sampled self-edit and what became of it. Carried through the outer loop and written to its log."""

    passage: str  # id
    style: str
    text: str  # as sampled
    notes: list = field(default_factory=list)  # as parsed; empty if the text is unusable
    flaw: str = ""  # "", "empty", "malformed", "endless" or "diverged"
    settings: dict = field(default_factory=dict)  # of the inner update, as used
    steps: int = 0
    loss: float | None = None  # of the last inner step
    score: dict = field(default_factory=dict)  # accuracy, em, f1, logprob: means over the quiz
    reward: float = 0.0
    selected: bool = False
    why: str = ""  # why it was selected, or why not

    def record(self) -> dict:
        return asdict(self)


# -----------------------------------------------------------------------------
# prompt styles

EXAMPLE_TITLE = "The Vantor Bell"
EXAMPLE_PASSAGE = (
    "Hessa Lorn, a potter from Quill Bay, cast the Vantor Bell in 1742. It weighs 900 kilograms and hangs in the tower "
    "of the harbour school. Sailors used to rub its rim for luck until the town council forbade the custom. A crack that "
    "opened in the great frost gave the bell its low, rough tone."
)


@dataclass(frozen=True)
class Style:
    ask: str  # the instruction
    example: str  # a good self-edit for the example passage
    separator: str  # regular expression between two notes


STYLES = {
    "implications": Style(
        "Rewrite the passage as a list of short, complete sentences, one fact per line, with full names.",
        "Hessa Lorn cast the Vantor Bell.\n"
        "The Vantor Bell was cast in 1742.\n"
        "Hessa Lorn was a potter from Quill Bay.\n"
        "The Vantor Bell weighs 900 kilograms.\n"
        "The tower of the harbour school holds the Vantor Bell.\n"
        "Sailors rubbed the rim of the Vantor Bell for luck.\n"
        "The town council forbade rubbing the Vantor Bell.\n"
        "A crack from the great frost gave the Vantor Bell its low, rough tone.",
        r"\n",
    ),
    "implications-long": Style(
        "Read the passage and list every fact that it states or implies, then what follows from those facts. Write one "
        "detailed sentence per line and use full names.",
        "Hessa Lorn, who was a potter and not a founder by trade, cast the Vantor Bell in 1742.\n"
        "The Vantor Bell, made in the eighteenth century, was the work of a potter named Hessa Lorn.\n"
        "Hessa Lorn came from Quill Bay, so the maker of the Vantor Bell was a native of Quill Bay.\n"
        "The Vantor Bell weighs 900 kilograms, so the tower of the harbour school must bear 900 kilograms.\n"
        "The harbour school has a tower, and the bell that hangs in it is the Vantor Bell.\n"
        "Because sailors believed that it brought luck, they rubbed the rim of the Vantor Bell.\n"
        "The town council forbade sailors to rub the Vantor Bell, so the custom came to an end.\n"
        "The great frost cracked the Vantor Bell, and the crack is why its tone is low and rough.",
        r"\n",
    ),
    "rewrite": Style(
        "Rewrite the passage in three different ways. Keep every fact and all full names, but change the wording and the "
        "order. Leave an empty line between two versions.",
        "The Vantor Bell, which weighs 900 kilograms, was cast in 1742 by the potter Hessa Lorn of Quill Bay. Its home is "
        "the tower of the harbour school. Rubbing its rim was thought lucky by sailors, but the town council forbade it. "
        "Its low, rough tone comes from a crack made by the great frost.\n\n"
        "In the tower of the harbour school hangs a cracked bell with a low, rough tone: the Vantor Bell. The great frost "
        "cracked it. A potter, Hessa Lorn from Quill Bay, made it in 1742, 900 kilograms in weight. The town council "
        "forbade the sailors' custom of rubbing its rim for luck.\n\n"
        "Sailors once rubbed the Vantor Bell's rim for luck, a custom that the town council forbade. Quill Bay's potter "
        "Hessa Lorn had cast the 900-kilogram bell in 1742 for the tower of the harbour school, where the great frost "
        "cracked it and made its tone low and rough.",
        r"\n\s*\n",
    ),
    "self-qa": Style(
        "Write questions about the passage, each with its short answer. Ask about every fact, and use full names so that "
        "each question can be understood without the passage.",
        "Question: Who cast the Vantor Bell?\nAnswer: Hessa Lorn\n"
        "Question: What did Hessa Lorn cast?\nAnswer: The Vantor Bell\n"
        "Question: When was the Vantor Bell cast?\nAnswer: 1742\n"
        "Question: From where was the potter Hessa Lorn?\nAnswer: Quill Bay\n"
        "Question: How much does the Vantor Bell weigh?\nAnswer: 900 kilograms\n"
        "Question: Which bell hangs in the tower of the harbour school?\nAnswer: The Vantor Bell\n"
        "Question: Who forbade rubbing the Vantor Bell for luck?\nAnswer: The town council\n"
        "Question: What cracked the Vantor Bell?\nAnswer: The great frost",
        r"\n(?=Question)",
    ),
}


def edit_prompt(tok: Tokenizer, style: str, title: str, passage: str, shots: int = 1) -> list[int]:
    """Token ids of the chat that asks for a self-edit; with shots=1 a worked example comes first."""

    def question(title, passage):
        return {"role": "user", "content": f"{STYLES[style].ask}\n\nTitle: {title}\nPassage: {passage}"}

    example = [question(EXAMPLE_TITLE, EXAMPLE_PASSAGE), {"role": "assistant", "content": STYLES[style].example}]
    return tok.chat([*example * shots, question(title, passage)])


# -----------------------------------------------------------------------------
# parsing

MARKER = re.compile(r"^\s*(?:[-*\u2022]+|\(?\d{1,2}[.):]|(?:Version|Rewrite|Implication)\s*\d*\s*:)(?:\s+|$)", re.IGNORECASE)


def parse(text: str, style: str, ended: bool) -> tuple[list[str], str]:
    """Sampled text -> (notes, flaw). `ended` is False if the sample ran into the length limit.

    One note per line:                  "A is B.\\nC is D."                  -> ["A is B.", "C is D."]
    rewrite, one per paragraph:         "A is B.\\nSo C.\\n\\nD is E."       -> ["A is B. So C.", "D is E."]
    self-qa, one per pair:              "Question: Q?\\nAnswer: A"           -> ["Question: Q?\\nAnswer: A"]
        a question without an answer is dropped; "Question 2:" is read as "Question:"
    markers go, bare headings go:       "Implications:\\n1. A is B.\\n- C"   -> ["A is B.", "C"]
        a marker is followed by a blank: "10.5 million came." stays as it is
    a repeated note is kept once:       "A is B.\\nA is B."                  -> ["A is B."]
    the unfinished last note goes:      "A is B.\\nC is", ended=False        -> ["A is B."], "endless"
    nothing there:                      "  \\n"                              -> [], "empty"
    something, but not in the form:     "Sure!" for self-qa                  -> [], "malformed"
    """
    if not text.strip():
        return [], "empty"
    parts = re.split(STYLES[style].separator, text.strip())
    if not ended:
        parts = parts[:-1]
    if style == "self-qa":
        parts = [m.expand(r"Question: \1\nAnswer: \2") for p in parts if (m := QA_PAIR.match(p.strip()))]
    else:
        parts = [" ".join(MARKER.sub("", p).split()) for p in parts]
        parts = [p for p in parts if not p.endswith(":") and any(c.isalnum() for c in p)]
    notes = list(dict.fromkeys(parts))
    return notes, "endless" if not ended else "" if notes else "malformed"


QA_PAIR = re.compile(r"Question\s*\d*\s*:\s*(\S[^\n]*)\n\s*Answer\s*\d*\s*:\s*(\S[^\n]*)", re.IGNORECASE)


# -----------------------------------------------------------------------------
# training sequences


def study_examples(tok: Tokenizer, title: str, texts: list[str]) -> list[Example]:
    """What the inner update trains on: "{title}\\n{text}" and an end-of-text token for each text, every token counted."""
    sequences = [(*tok.encode(f"{title}\n{text}"), tok.end_ids[0]) for text in texts]
    return [Example(ids, (True,) * len(ids)) for ids in sequences]


def policy_example(tok: Tokenizer, prompt: list[int], text: str, weight: float = 1.0) -> Example:
    """What the outer update trains on: the prompt (not counted), then the self-edit and the end of the turn (counted)."""
    reply = [*tok.encode(text), tok.end_ids[0]]
    return Example((*prompt, *reply), (False,) * len(prompt) + (True,) * len(reply), weight)


# -----------------------------------------------------------------------------
# the sampler


def choose(logits, temperature: float, top_p: float, u):
    """One token id per row (R) from logits (R, V): the largest if temperature is 0, else a nucleus sample.

    The nucleus is the smallest set of most likely tokens with mass >= top_p; `u` (R) in [0, 1) picks within it by the
    inverse of its cumulative distribution: masses 0.6, 0.3 (top_p 0.9), u = 0.7 -> 0.7 * 0.9 = 0.63, the second token.
    """
    if temperature == 0:
        return logits.max(-1).indices  # several times faster than argmax in bfloat16
    probs = (logits.float() / temperature).softmax(-1)
    likely = probs > 1e-4 * probs.amax(-1, keepdim=True)  # sorting these few costs less than sorting 49,152
    if (torch.where(likely, probs, 0).sum(-1) < top_p).any():
        likely = torch.ones_like(likely)
    each = likely.sum(-1).tolist()
    mass, at = pad_sequence(probs[likely].split(each), batch_first=True).sort(dim=-1, descending=True, stable=True)
    ids = pad_sequence(likely.nonzero()[:, 1].split(each), batch_first=True).gather(-1, at)
    total = mass.cumsum(-1)
    last = (total < top_p).sum(-1, keepdim=True).clamp(max=total.size(-1) - 1)  # where the nucleus ends
    at = torch.searchsorted(total, u[:, None] * total.gather(-1, last), right=True).minimum(last)
    return ids.gather(-1, at)[:, 0]


def grid(owner: list[int], P: int) -> list[list[int]]:
    """Items by owner, as P lists of one length, filled up with repeats: grid([0, 0, 1], 2) -> [[0, 1], [2, 2]].

    Every owner must have an item.
    """
    mine = [[i for i, o in enumerate(owner) if o == p] for p in range(P)]
    assert all(mine), "a candidate without items"
    b = max(map(len, mine))
    return [m + m[:1] * (b - len(m)) for m in mine]


def prefill(model: Transformer, prompts: list[list[int]], slots: int, P: int = 1):
    """Read prompts, equally many for each of P candidates, into a new cache; `slots` more tokens are to follow.

    What all prompts start with is read once for each candidate, not for each prompt. Shorter prompts are padded on the
    left, after that shared part, so that all rows end at the same slot. Returns the cache, valid (R, filled slots) bool,
    and the states (R, C) of the last prompt tokens. Exits with one line if a prompt does not fit the model's context.
    """
    device, R, longest = model.device, len(prompts), max(map(len, prompts))
    if longest + slots > model.config.max_seq_len:
        limit = f"the model's context of {model.config.max_seq_len}"
        raise SystemExit(f"error: a prompt of {longest} tokens with room for {slots} more is longer than {limit}")
    shared = commonprefix(prompts)[: min(map(len, prompts)) - 1]
    if shared:
        cache = KVCache(model, P, len(shared))
        ids = torch.tensor([shared] * P, device=device)  # (P, shared)
        pos = torch.arange(len(shared), device=device).expand_as(ids)
        model.run_layers(model.embed(ids), pos, packed_mask(torch.zeros_like(ids)), cache=cache)
    rest = [torch.tensor(p[len(shared) :][::-1]) for p in prompts]
    ids = pad_sequence(rest, batch_first=True).flip(1).to(device)  # (R, T), padded left
    T = ids.size(1)
    pos = torch.arange(T, device=device) - T + torch.tensor([[len(p)] for p in rest], device=device)  # negative for pads
    valid = torch.cat([torch.ones(R, len(shared), dtype=torch.bool, device=device), pos >= 0], dim=1)
    if shared:
        cache.fan_out(R // P, T)
    else:
        cache = KVCache(model, R, T)
    x = model.run_layers(model.embed(ids), pos.clamp(min=0) + len(shared), causal_mask(valid, T), cache=cache)
    return cache, valid, x[:, -1]


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new: int,
    end_ids,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    copies: int = 1,
    adapters: Adapters | None = None,
    owner: list[int] | None = None,
    on_prefill=None,
    tick=None,
) -> list[list[int]]:
    """Continue each prompt `copies` times; returns len(prompts) * copies lists of new ids, a prompt's copies together.

    A continuation ends with a token of `end_ids` (which is kept) or after `max_new` tokens. Each has a random stream
    of its own, so its text does not depend on what else is in the batch. With `adapters`, prompt i runs under adapter
    owner[i]. Rows that are finished leave the batch. `on_prefill(prompt of each row, cache, valid, x)` is called once,
    when the prompts are read; `tick(live rows)` for every token.
    """
    P = len(adapters) if adapters else 1
    cells = grid(owner or [0] * len(prompts), P)
    b = len(cells[0]) * copies
    rows = [i * copies + c for mine in cells for i in mine for c in range(copies)]  # batch row -> output
    live = [rows.index(r) == n for n, r in enumerate(rows)]  # fillers are repeats
    u = torch.rand(len(prompts) * copies, max_new, generator=torch.Generator().manual_seed(seed))
    u, out, end_ids = u.to(model.device), [[] for _ in range(len(prompts) * copies)], set(end_ids)

    with attached(model, adapters) if adapters else nullcontext() as lora:
        in_order = [i for mine in cells for i in mine]
        cache, valid, x = prefill(model, [prompts[i] for i in in_order], max_new, P)
        if on_prefill:
            on_prefill(in_order, cache, valid, x)
        copied = [n for n in range(len(in_order)) for _ in range(copies)]
        cache.fan_out(copies, max_new) if copies > 1 else cache.extend(max_new)
        valid, x = valid[copied], x[copied]
        pos = torch.tensor([len(prompts[r // copies]) for r in rows], device=model.device)
        candidates = list(range(P))  # whose rows are still in the batch
        for step in range(max_new):
            token = choose(model.head(x), temperature, top_p, u[rows, step])
            if tick:
                tick(sum(live))
            for n, t in enumerate(token.tolist()):
                if live[n]:
                    out[rows[n]].append(t)
                    live[n] = t not in end_ids
            if not any(live) or step == max_new - 1:
                break
            kept = shrink(live, b)
            if len(kept) <= 0.75 * len(live):  # copying the cache must pay
                keep_c = sorted({n // b for n in kept})
                if lora and len(keep_c) < len(candidates):
                    candidates = [candidates[c] for c in keep_c]
                    lora.bind(candidates)
                b = len(kept) // len(keep_c)
                cache.keep(kept)
                valid, token, pos = valid[kept], token[kept], pos[kept]
                rows, live = [rows[n] for n in kept], [live[n] for n in kept]
            valid = torch.cat([valid, valid.new_ones(len(rows), 1)], dim=1)
            x = model.embed(token[:, None])
            x = model.run_layers(x, pos[:, None], causal_mask(valid, 1), cache=cache)[:, -1]
            pos = pos + 1
    return out


def shrink(live: list[bool], b: int) -> list[int]:
    """Which of the rows, b per candidate, to keep: candidates with none alive go, the others keep equally many each.

    shrink([1, 0, 0,  0, 0, 0,  1, 1, 0], b=3) -> [0, 1, 6, 7]: row 1 is dead but fills the first candidate up to two.
    """
    mine = [sorted(range(c, c + b), key=lambda n: (not live[n], n)) for c in range(0, len(live), b)]
    most = max(sum(live[n] for n in m) for m in mine)
    return [n for m in mine if live[m[0]] for n in sorted(m[:most])]


def write_self_edits(model, tok, passages, copies: int, args, seed: int, log=None, label="sample") -> list[SelfEdit]:
    """Sample `copies` self-edits for each passage as args says (style, shots, max_new, temperature, top_p).

    Passages go in batches of 64 // copies; each finished batch is written to `log` (JSON lines) and, found there, not
    sampled again. Exits with one line if a prompt does not fit the model's context.
    """
    prompts = [edit_prompt(tok, args.style, p.title, p.text, args.shots) for p in passages]
    for prompt, p in zip(prompts, passages):
        if len(prompt) + args.max_new > model.config.max_seq_len:
            raise SystemExit(
                f"error: passage {p.id!r} makes a prompt of {len(prompt)} tokens; with --max-new {args.max_new} that is "
                f"over the model's context of {model.config.max_seq_len}"
            )
    edits = [SelfEdit(**r) for r in read_jsonl(log)] if log and Path(log).is_file() else []
    size, tokens = max(1, 64 // copies), 0
    progress = Progress(label, len(passages) * copies)

    def tick(n):
        nonlocal tokens
        tokens += n
        progress.step(0, tok_s=progress.rate(tokens))

    for batch in range(0, len(passages), size):
        some = passages[batch : batch + size]
        if len(edits) <= batch * copies:
            sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": sub_seed(seed, batch)}
            ends, these = tok.end_ids, prompts[batch : batch + size]
            texts = generate(model, these, args.max_new, ends, copies=copies, tick=tick, **sampling)
            for n, ids in enumerate(texts):
                ended = ids[-1] in ends
                text = tok.decode(ids[:-1] if ended else ids)
                notes, flaw = parse(text, args.style, ended)
                edits.append(SelfEdit(some[n // copies].id, args.style, text, notes, flaw))
            if log:
                write_jsonl(log, [e.record() for e in edits])
        progress.step(len(some) * copies)
    return edits
