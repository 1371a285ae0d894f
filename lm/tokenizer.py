"""tokenizer.json -> tiktoken.Encoding, and the two chat formats.

tiktoken is a byte-pair encoder whose token ids are its merge order; the `tokenizers` library keeps
a list of merges. For Llama 3, SmolLM2 and Qwen the two agree, so a tokenizer.json becomes a
tiktoken.Encoding by translating
    the vocabulary   "Ġcat" -> b" cat"       (GPT-2 writes bytes as printable characters)
    the splitting    Digits, ByteLevel or a regular expression -> one regular expression
tests/test_tokenizer.py compares the ids with the `tokenizers` library on thousands of awkward
strings.

Text never becomes a control token: encode("<|im_end|>") gives the ids of those ten characters. Only
chat() and encode(..., control=True) write control tokens.
"""

import re
import unicodedata
from pathlib import Path

import tiktoken

from lm.files import read_json

# GPT-2's pattern, as the `tokenizers` library's ByteLevel applies it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after Digits has cut out every numeral: text before a numeral ends there, so a run of
# blanks before it stays whole. "a  1" is "a", "  ", "1" here and "a", " ", " 1" in GPT-2.
DIGITS_THEN_GPT2 = (
    r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)


def gpt2_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: 'A' -> 65, 'Ġ' -> 32, ..."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(pre_tokenizer: dict, path) -> str:
    """The regular expression that cuts text as `pre_tokenizer` does. Exits if it is of an unknown
    kind."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return GPT2
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"]:
            return DIGITS_THEN_GPT2
        case ["Split", "ByteLevel"] if "Regex" in steps[0]["pattern"] and not steps[1].get(
            "use_regex", True
        ):
            return steps[0]["pattern"]["Regex"]
    raise SystemExit(f"error: {path}: pre_tokenizer {[s['type'] for s in steps]} is not supported")


class Tokenizer:
    """The tokenizer of a Hugging Face model folder."""

    def __init__(self, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SystemExit(f"error: {folder} has no tokenizer.json")
        spec = read_json(path)
        try:
            vocab, added = spec["model"]["vocab"], spec["added_tokens"]
            pattern = split_pattern(spec["pre_tokenizer"], path)
            self.nfc = (spec.get("normalizer") or {}).get("type") == "NFC"
            self.control = {t["content"]: t["id"] for t in added}
            to_byte = gpt2_bytes()
            words = {t: i for t, i in vocab.items() if t not in self.control}
            ranks = {bytes(map(to_byte.__getitem__, t)): i for t, i in words.items()}
        except (KeyError, TypeError, AttributeError) as e:
            raise SystemExit(f"error: {path} is not a byte-level BPE tokenizer: {e!r}") from e
        # A vocabulary may lack bytes (SmolLM2 lacks 21). tiktoken needs all 256, so the absent ones
        # get ids past the end, and texts that contain them take the detour in _encode_around.
        self.n_vocab = max([*vocab.values(), *self.control.values()]) + 1
        self.absent = bytes(b for b in range(256) if bytes([b]) not in ranks)
        self.newline_ids = [i for token, i in ranks.items() if b"\n" in token]
        ranks |= {bytes([b]): self.n_vocab + i for i, b in enumerate(self.absent)}
        self.encoding = tiktoken.Encoding(
            path.parent.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.control
        )
        chars = "".join(chr(b) for b in self.absent if b < 128) + "\U00040000-\U000bffff" * (
            0xF1 in self.absent
        )
        other = r"(?:[^\w\s]|[_\x1c-\x1f])"  # neither letter, numeral nor blank
        self.detour = (
            re.compile(f" ?{other}*[{re.escape(chars[:-3]) + chars[-3:]}]{other}*")
            if chars
            else None
        )
        self._set_chat_format(path.parent)

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text`. With control=True, spelled-out control tokens such as <|im_end|>
        become their ids."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.detour and not control and self.detour.search(text):
            return self._encode_around(text)
        return (
            self.encoding.encode(text, allowed_special="all", disallowed_special=())
            if control
            else (self.encoding.encode_ordinary(text))
        )

    def _encode_around(self, text: str) -> list[int]:
        """Encode a text with bytes that the vocabulary lacks: they are dropped after splitting and
        before merging.

        Such bytes only occur in runs of punctuation-like characters, which are cut out whole. Each
        stretch before a run is encoded with "!" or " !" in the run's place, so that blanks at its
        end split as if the run followed.
        """
        ids, at = [], 0
        for m in self.detour.finditer(text):
            stand_in = " !" if m[0].startswith(" ") else "!"  # either is one token
            ids += self.encoding.encode_ordinary(text[at : m.start()] + stand_in)[:-1]
            kept = m[0].encode("utf-8").translate(None, self.absent)
            ids += self.encoding._encode_single_piece(kept) if kept else []
            at = m.end()
        return ids + self.encoding.encode_ordinary(text[at:])

    def decode(self, ids) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids), errors="replace")

    # -------------------------------------------------------------------------
    # chat

    def _set_chat_format(self, folder: Path) -> None:
        """Find the format by its control tokens; take the default system message out of the
        checkpoint's template."""
        config = (
            read_json(folder / "tokenizer_config.json")
            if (folder / "tokenizer_config.json").is_file()
            else {}
        )
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = template if isinstance(template, str) else ""
        self.chatml = "<|im_start|>" in self.control
        self.llama3 = "<|start_header_id|>" in self.control
        default = re.search(r"<\|im_start\|>system(?:\\n|\n)([^<{}']+)<\|im_end\|>", template)
        self.default_system = default[1] if default and self.chatml else None
        # Qwen3 thinks aloud before it answers, unless its reply opens with an empty thought.
        self.thought = (
            ("<think>", "\n\n", "</think>", "\n\n") if "enable_thinking" in template else ()
        )
        # Llama 3.1 and later put the date in front of every system message; this is their
        # templates' fixed date.
        dated = self.llama3 and "Cutting Knowledge Date" in template
        self.preamble = (
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" if dated else None
        )
        ends = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
        # The first one ends a chat turn.
        self.end_ids = [self.control[t] for t in ends if t in self.control]

    def chat(self, messages: list[dict], reply: bool = True) -> list[int]:
        """Ids of a chat, [{"role": "user", "content": ...}, ...]; with `reply`, opened for the
        assistant to answer."""
        if not (self.chatml or self.llama3):
            raise SystemExit(
                "error: this tokenizer has neither ChatML's nor Llama 3's control tokens, so it "
                "cannot chat"
            )
        has_system = messages[:1] and messages[0]["role"] == "system"
        if self.chatml:
            if not has_system and self.default_system:
                messages = [{"role": "system", "content": self.default_system}, *messages]
            ids = []
            for m in messages:
                ids += self._turn(
                    "<|im_start|>", f"{m['role']}\n", m["content"], "<|im_end|>", "\n"
                )
            return ids + self._turn("<|im_start|>", "assistant\n", *self.thought) * reply
        if self.preamble is not None:
            content = self.preamble + (messages[0]["content"].strip() if has_system else "")
            messages = [{"role": "system", "content": content}, *messages[bool(has_system) :]]
        ids = [self.control["<|begin_of_text|>"]]
        for m in messages:
            text = m["content"] if m["role"] == "system" and self.preamble else m["content"].strip()
            ids += self._turn(
                "<|start_header_id|>", m["role"], "<|end_header_id|>", f"\n\n{text}", "<|eot_id|>"
            )
        return (
            ids
            + self._turn("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n") * reply
        )

    def _turn(self, *parts: str) -> list[int]:
        """Parts that spell a control token become it; what is between is encoded as one text."""
        ids, text = [], ""
        for part in parts:
            if part in self.control:
                ids += self.encode(text) + [self.control[part]]
                text = ""
            else:
                text += part
        return ids + self.encode(text)
