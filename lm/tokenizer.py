"""tokenizer.json -> tiktoken.Encoding, and chats as the checkpoint's template writes them.

tiktoken is a byte-pair encoder whose token ids are its merge order; the `tokenizers` library keeps
a list of merges. For Llama 3, SmolLM2 and Qwen the two agree, so a tokenizer.json becomes a
tiktoken.Encoding by translating
    the vocabulary   "Ġcat" -> b" cat"       (GPT-2 writes bytes as printable characters)
    the splitting    Digits, ByteLevel or a regular expression -> one regular expression
tests/test_tokenizer.py compares the ids with the `tokenizers` library on thousands of awkward
strings. A tokenizer.json that asks for anything else is refused by the name of what it asks for.
What a post_processor puts before a text stands in `begin`: encode() makes parts of texts, too.

Text never becomes a control token: encode("<|im_end|>") gives the ids of those ten characters. Only
chat() and encode(..., control=True) write control tokens. (Qwen's <tool_call> is not one: a token
that was added as a plain word is found in any text.)
"""

import math
import re
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import tiktoken

from lm.files import read_bytes, read_json
from lm.template import render

# GPT-2's pattern, as the `tokenizers` library's ByteLevel applies it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after Digits has cut out every numeral: text before a numeral ends there, so a run of
# blanks before it stays whole. "a  1" is "a", "  ", "1" here and "a", " ", " 1" in GPT-2.
DIGITS_THEN_GPT2 = (
    r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)

TURNS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
# The chats of models that bring no template.
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """<|begin_of_text|>{% for m in messages %}\
<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MOST_TOKENS = 1_000_000  # four times as many as the largest vocabularies
MOST_BLANKS = 100_000  # in one run; tiktoken overflows its stack at ten times as many


def gpt2_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: 'A' -> 65, 'Ġ' -> 32, ..."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def refuse(path, what) -> None:
    raise SystemExit(f"error: {path}: {what} is not supported")


@contextmanager
def in_one_line(what):
    """Whatever tiktoken cannot do ends in one line. (Its panics derive from no Exception.)"""
    try:
        yield
    except BaseException as e:
        if isinstance(e, ValueError) or type(e).__name__ == "PanicException":
            raise SystemExit(f"error: {what}: {str(e).strip().splitlines()[-1]}") from e
        raise


def flat(step: dict, key: str) -> list[dict]:
    """The steps of a normalizer or pre_tokenizer, which may be a Sequence of them under `key`."""
    if step["type"] != "Sequence":
        return [step]
    return [one for inner in step[key] for one in flat(inner, key)]


def split_pattern(steps: list[dict], path) -> str:
    """The regular expression that cuts text as these pre_tokenizers do. Exits if one is of an
    unknown kind."""
    plain = {"add_prefix_space": False, "individual_digits": True}
    plain |= {"behavior": "Isolated", "invert": False}
    for step in steps:
        for key in step.keys() - {"type", "pattern", "trim_offsets", "use_regex"}:
            if key not in plain or step[key] != plain[key]:
                refuse(path, f"pre_tokenizer {step['type']}: {key} = {step[key]!r}")
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return GPT2
        case ["Digits", "ByteLevel"] if steps[1].get("use_regex", True):
            return DIGITS_THEN_GPT2
        case ["Split", "ByteLevel"] if "Regex" in steps[0]["pattern"] and not steps[1].get(
            "use_regex", True
        ):
            pattern = steps[0]["pattern"]["Regex"]
            # What the two libraries' regular expressions read differently.
            if unlike := re.search(
                r"\\[AzZGbBhHkKRXwW]|(?<![\\[])[$^]|\{\d[\d,]*\}[+?]|&&", pattern
            ):
                refuse(path, f"{unlike[0]!r} in a pre_tokenizer's pattern")
            # What it leaves out is a piece as well; tiktoken would drop that.
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    return refuse(path, f"pre_tokenizer {[s['type'] for s in steps]}")


def byte_ranks(model: dict, added: dict, path) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """{token: id} of a BPE model, for tiktoken, and {token: id} of those that are only read. Exits
    if `model` merges otherwise than by id.

    A word that no merge makes is never written, unless `model` looks up whole pieces first, as
    tiktoken does.
    """
    known = {"type", "vocab", "merges", "fuse_unk", "ignore_merges", "unk_token", "byte_fallback"}
    for key in model.keys() - known:
        if model[key]:
            refuse(path, f"model: {key} = {model[key]!r}")
    vocab, to_byte = model["vocab"], gpt2_bytes()
    if len(vocab) > MOST_TOKENS:
        refuse(path, f"a vocabulary of more than {MOST_TOKENS:,}")
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    merged = [vocab["".join(pair)] for pair in pairs]
    if merged != sorted(merged):
        refuse(path, "a list of merges that is not in the order of their ids")
    whole = {*vocab} - {*added} if model.get("ignore_merges") else set()
    words = {"".join(pair) for pair in pairs} | whole | (vocab.keys() & to_byte)
    others = vocab.keys() - words - added.keys()
    spelled = {t: bytes(map(to_byte.__getitem__, t)) for t in words | others}
    return {spelled[t]: vocab[t] for t in words}, {spelled[t]: vocab[t] for t in others}


def added_tokens(tokens: list[dict], vocab: dict, path) -> dict[str, int]:
    """{content: id} of the tokens beside the model's own. Exits where the `tokenizers` library
    would give them other ids, and on flags that make them more than their text."""
    if not all(isinstance(t["content"], str) for t in tokens):
        raise TypeError("the content of an added token is no text")
    added = {t["content"]: t["id"] for t in tokens}
    if len({*vocab.values()}) < len(vocab) or len({*added.values()}) < len(tokens):
        raise SystemExit(f"error: {path}: two tokens have one id, or one token has two")
    new = sorted((i, t) for t, i in added.items() if t not in vocab)
    for n, (i, token) in enumerate(new, len(vocab)):
        if i != n:
            raise SystemExit(f"error: {path}: the added token {token!r} has id {i}, not {n}")
    for token in added.keys() & vocab.keys():
        if added[token] != vocab[token]:
            raise SystemExit(
                f"error: {path}: the added token {token!r} has id {added[token]}, but "
                f"{vocab[token]} in the vocabulary"
            )
    for t in tokens:
        for flag in ("lstrip", "rstrip", "single_word"):
            if t.get(flag):
                refuse(path, f"the added token {t['content']!r} with {flag}")
    return added


def first_tokens(step: dict | None, path) -> list[str]:
    """The control tokens that a post_processor puts before a text, as Llama 3's does. Exits if it
    does more."""
    found = []
    for one in flat(step, "processors") if step else []:
        if one["type"] == "TemplateProcessing":
            *before, last = one["single"]
            if "Sequence" not in last:
                refuse(path, "a post_processor that ends a text")
            found += [piece["SpecialToken"]["id"] for piece in before]
        elif one["type"] != "ByteLevel":  # which only trims offsets
            refuse(path, f"post_processor {one['type']}")
    return found


def any_of(tokens) -> re.Pattern:
    """Finds the first of `tokens` in a text, and the longest if several begin there."""
    longest = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


class Tokenizer:
    """The tokenizer of a Hugging Face model folder."""

    def __init__(self, folder):
        self.path = path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SystemExit(f"error: {folder} has no tokenizer.json")
        spec = read_json(path)
        try:
            tokens, model = spec["added_tokens"], spec["model"]
            normalizers = flat(spec["normalizer"], "normalizers") if spec.get("normalizer") else []
            for step in normalizers:
                if step["type"] != "NFC":
                    refuse(path, f"normalizer {step['type']!r}")
            self.nfc = bool(normalizers)
            if (decoder := spec["decoder"]["type"]) != "ByteLevel":
                refuse(path, f"decoder {decoder!r}")
            if (kind := model.get("type", "BPE")) != "BPE":
                refuse(path, f"model {kind!r}")
            pattern = split_pattern(flat(spec["pre_tokenizer"], "pretokenizers"), path)
            for token, i in [*model["vocab"].items(), *((t["content"], t["id"]) for t in tokens)]:
                if type(i) is not int or not 0 <= i < 2**31:
                    raise SystemExit(f"error: {path}: token {token!r} has no id, but {i!r:.40}")
            added = added_tokens(tokens, model["vocab"], path)
            ranks, others = byte_ranks(model, added, path)
            if not ranks:
                raise ValueError("it has no tokens")
            self.begin = [added[token] for token in first_tokens(spec.get("post_processor"), path)]
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
            raise SystemExit(f"error: {path} is not a byte-level BPE tokenizer: {e!r:.200}") from e
        read = {t.decode("utf-8", "replace"): i for t, i in others.items()} | added
        self.ids = {*ranks.values(), *read.values()}
        self.control = {
            t["content"]: t["id"] for t in tokens if t.get("special") or t["content"] in TURNS
        }
        # Added tokens are found in a text as it is written; those that are "normalized", in what
        # NFC makes of the rest.
        late = {t["content"] for t in tokens if t.get("normalized")}
        self.written, self.normalized = any_of(added.keys() - late), any_of(map(self._norm, late))
        self.added = added | {self._norm(t): added[t] for t in late}
        self.newline_ids = [i for token, i in ranks.items() if b"\n" in token]
        self._set_detour(ranks, model)
        with in_one_line(f"{path}: its pre_tokenizer"):
            self.encoding = tiktoken.Encoding(
                path.parent.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=read
            )
        self._set_chat_format(path.parent)

    def _norm(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _set_detour(self, ranks: dict, model: dict) -> None:
        """A vocabulary may lack bytes (SmolLM2 lacks 21). tiktoken needs all 256, so the absent
        ones get ids past the end, and texts that contain them take the detour in _encode_around."""
        end = max(self.ids) + 1
        self.absent = bytes(b for b in range(256) if bytes([b]) not in ranks)
        ranks |= {bytes([b]): end + i for i, b in enumerate(self.absent)}
        planes = {0xF1: "\U00040000-\U0007ffff", 0xF2: "\U00080000-\U000bffff"}
        unused = {0xC0, 0xC1, *range(0xF5, 0x100)}  # in no text
        other = r"[^\w\s]|[_\x1c-\x1f]"  # neither letter, numeral nor blank
        chars = ""
        for b in set(self.absent) - unused:
            if b not in planes and not (b < 128 and re.match(other, chr(b))):
                refuse(self.path, f"a vocabulary without the byte 0x{b:02x}")
            chars += planes.get(b) or re.escape(chr(b))
        for key in ("unk_token", "byte_fallback"):
            if model.get(key) and chars:
                refuse(
                    self.path, f"model: {key} = {model[key]!r} in a vocabulary without all bytes"
                )
        self.lacking = re.compile(f"[{chars}]" if chars else "(?!)")
        self.detour = re.compile(f" ?(?:{other})+")

    # -------------------------------------------------------------------------
    # text and ids

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text`. With control=True, spelled-out control tokens such as <|im_end|>
        become their ids."""
        ids = []
        for part, token in self._cut(self.written, text, control):
            for plain, word in self._cut(self.normalized, self._norm(part), control):
                ids += self._encode_plain(plain)
                ids += [self.added[word]] if word else []
            ids += [self.added[token]] if token else []
        return ids

    def _cut(self, tokens: re.Pattern, text: str, control: bool):
        """(text up to an added token, the token), ..., (the rest, "")."""
        at = 0
        for m in tokens.finditer(text):
            if control or m[0] not in self.control:
                yield text[at : m.start()], m[0]
                at = m.end()
        yield text[at:], ""

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) > MOST_BLANKS:
            blanks = max((m.end() - m.start() for m in re.finditer(r"\s+", text)), default=0)
            if blanks > MOST_BLANKS:
                raise SystemExit(
                    f"error: a text has {blanks} blanks in a row; at most {MOST_BLANKS} can be "
                    "encoded"
                )
        with in_one_line(f"a text of {len(text)} characters cannot be encoded"):
            if self.lacking.search(text):
                return self._encode_around(text)
            return self.encoding.encode_ordinary(text)

    def _encode_around(self, text: str) -> list[int]:
        """Encode a text with bytes that the vocabulary lacks: they are dropped after splitting and
        before merging.

        Such bytes only occur in runs of punctuation-like characters, which are cut out whole. Each
        stretch before a run is encoded with "!" or " !" in the run's place, so that blanks at its
        end split as if the run followed.
        """
        ids, at = [], 0
        for m in self.detour.finditer(text):
            if not self.lacking.search(m[0]):
                continue
            stand_in = " !" if m[0].startswith(" ") else "!"
            length = len(self.encoding.encode_ordinary(stand_in))
            ids += self.encoding.encode_ordinary(text[at : m.start()] + stand_in)[:-length]
            kept = m[0].encode("utf-8").translate(None, self.absent)
            ids += self.encoding._encode_single_piece(kept) if kept else []
            at = m.end()
        return ids + self.encoding.encode_ordinary(text[at:])

    def bits(self, word: str) -> float:
        """How uncommon a word is, written as it is: the logarithms of its tokens' ids, to base 2,
        summed. Ids go by the order of merges, so roughly from common to rare: in SmolLM2 "made" has
        10 bits, "lighthouse" 15, "jorunak" 35. A name in small letters is rare: "japan" has 21."""
        return sum(math.log2(1 + i) for i in self.encode(f" {word}"))

    def decode(self, ids) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids that are no token's
        nothing."""
        return self.encoding.decode([i for i in ids if i in self.ids], errors="replace")

    def unused(self, rows: int) -> list[int]:
        """Ids of the embedding's rows that stand for no token: Qwen2.5 has 151,936 rows and 151,665
        tokens."""
        return [i for i in range(rows) if i not in self.ids]

    # -------------------------------------------------------------------------
    # chat

    def _set_chat_format(self, folder: Path) -> None:
        """Take the checkpoint's chat template, or a known one by its control tokens, and see what
        ends a reply in it."""
        file, self.names = folder / "tokenizer_config.json", {}
        config = read_json(file) if file.is_file() else {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(name)  # "</s>", or {"content": "</s>", ...}
            if token := token.get("content") if isinstance(token, dict) else token:
                self.names[name] = token
        template = config.get("chat_template")
        if isinstance(template, list):  # several, each {"name": ..., "template": ...}
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else template
        if (jinja := folder / "chat_template.jinja").is_file():
            file, template = jinja, read_bytes(jinja).decode("utf-8", "replace")
        for name, text in [*self.names.items(), ("chat_template", template)]:
            if not isinstance(text, str | None):
                raise SystemExit(f"error: {file}: {name} must be a text, not {text!r:.40}")
        if template is None:
            known = {"<|im_start|>": CHATML, "<|start_header_id|>": LLAMA3}
            template = next((known[t] for t in known if t in self.control), None)
        self.template, self.template_file = template, file
        ends = [self.names.get("eos_token"), *ENDS]
        if template is not None:
            probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            said = self._render(probe, False).rpartition("!")[2]
            first = any_of(self.added).search(said)
            if not first:
                raise SystemExit(f"error: {file}: its chat_template ends a reply with no token")
            ends.insert(0, first[0])
        # The first one ends a chat turn.
        self.end_ids = list(dict.fromkeys(self.added[t] for t in ends if t in self.added))
        if not self.end_ids:
            raise SystemExit(f"error: {self.path}: no token ends a text: {', '.join(ENDS)}")

    def _render(self, messages: list[dict], reply: bool) -> str:
        # Qwen3 thinks aloud before it answers, unless its reply opens with an empty thought.
        names = {"messages": messages, "add_generation_prompt": reply, "enable_thinking": False}
        try:
            return render(self.template, self.names | names | {"tools": None, "documents": None})
        except ValueError as e:
            what = " ".join(str(e).split())
            raise SystemExit(f"error: {self.template_file}: its chat_template: {what}") from e

    def chat(self, messages: list[dict], reply: bool = True) -> list[int]:
        """Ids of a chat, [{"role": "user", "content": ...}, ...]; with `reply`, opened for the
        assistant to answer."""
        if self.template is None:
            raise SystemExit(
                "error: this tokenizer has no chat_template, and neither ChatML's nor Llama 3's "
                "control tokens, so it cannot chat"
            )
        # A control token that a message spells is marked, so that the template's own stand out.
        texts, control = "".join(m["content"] for m in messages), any_of(self.control).pattern
        mark = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in texts), None)
        if mark is None:
            raise SystemExit("error: a text has every character of Unicode's private use in it")
        messages = [
            m | {"content": re.sub(control, lambda t: mark + mark.join(t[0]), m["content"])}
            for m in messages
        ]
        ids = []
        for n, piece in enumerate(
            re.split(f"(?<!{mark})({control})", self._render(messages, reply))
        ):
            ids += [self.added[piece]] if n % 2 else self.encode(piece.replace(mark, ""))
        return ids
