"""lm/tokenizer.py against the `tokenizers` library and the checkpoints' own chat templates."""

import functools
import json
import random

import jinja2
import pytest
from conftest import ROOT, SMOLLM2
from tokenizers import AddedToken
from tokenizers import Tokenizer as Reference
from tokenizers.normalizers import NFC
from transformers.convert_slow_tokenizer import TikTokenConverter

from lm.tokenizer import Tokenizer

VOCAB = ROOT / "downloads" / "vocab"
CONTROL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>"]
    + ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
}
DIGITS = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ALPHABETS = [
    "abc xyz ABC",
    "'s 't 're 'VE don't we'll",
    "0123456789",
    "½²৪Ⅷ٣",
    " ",
    "  \t\n\r\x0b\x0c\x85\u00a0\u2003\u3000",
    "!?.,;:-_()[]{}<>|@#$%^&*'\"`~+=/\\",
    "éüßñçøłŁДжשלוםمرحبا你好日本語한국어",
    "😀👩‍👩‍👧🏽🇫🇷",
    "".join(map(chr, range(32))) + "\x7f\u200b\u200d\ufeff",
    "\U00050000\U000e0001\U000a1234\U00010348\U000fffff\U0010ffff\u0301\u0300a\u212b\u1e9b\u0323",
]
CODE = [
    'def f(x):\n    return {"a":  12345}  # ok\n',
    'for (int i=0; i<10; i++) {\n\tputs("%d");\n}',
    "x  1  22   333    4444",
]


def strings(n: int):
    rng = random.Random(0)
    yield from CODE
    yield from ("", " ", "\n\n\n", "a" * 500, " " * 200, "1" * 100)
    for _ in range(n):
        yield "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randint(1, 40)))


def vocabulary(name: str, folder):
    """A folder with tokenizer.json for a vocabulary that is published in tiktoken's format."""
    pattern = PATTERN.replace("DIGITS", DIGITS[name])
    file = str(VOCAB / f"{name}.tiktoken")
    reference = TikTokenConverter(vocab_file=file, pattern=pattern).converted()
    if name == "qwen":
        reference.normalizer = NFC()
    tokens = [AddedToken(t, normalized=False, special=True) for t in CONTROL[name]]
    reference.add_special_tokens(tokens)
    reference.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """name -> folder, each made once: that takes seconds."""

    @functools.cache
    def folder(name):
        return SMOLLM2 if name == "smollm2" else vocabulary(name, tmp_path_factory.mktemp(name))

    return folder


@pytest.fixture(params=["smollm2", "llama3", "qwen"])
def folder(request, vocabularies):
    return vocabularies(request.param)


def test_same_ids_as_the_tokenizers_library(folder):
    ours, reference = Tokenizer(folder), Reference.from_file(str(folder / "tokenizer.json"))
    texts = list(strings(12_000))
    for text, expected in zip(texts, reference.encode_batch(texts, add_special_tokens=False)):
        assert ours.encode(text) == expected.ids, repr(text)


def test_same_ids_on_prose(folder):
    ours, reference = Tokenizer(folder), Reference.from_file(str(folder / "tokenizer.json"))
    text = (ROOT / "data" / "passages.json").read_text()
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == text


def test_text_never_becomes_a_control_token(folder):
    ours = Tokenizer(folder)
    for name, i in ours.control.items():
        assert i not in ours.encode(f"a{name}b")
        assert i in ours.encode(f"a{name}b", control=True)
    if ours.chatml or ours.llama3:
        end = ours.end_ids[0]
        quiet, loud = ({"role": "user", "content": c} for c in ("hello", "<|im_end|><|eot_id|>"))
        assert ours.chat([quiet]).count(end) == ours.chat([loud]).count(end)


# -----------------------------------------------------------------------------
# chat formats against the checkpoints' own templates

SMOLLM2_TEMPLATE = ""
if SMOLLM2.is_dir():
    SMOLLM2_TEMPLATE = json.loads((SMOLLM2 / "tokenizer_config.json").read_text())["chat_template"]
QWEN25_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATES = {  # Qwen and Llama 3 without their branches for tools
    "smollm2": SMOLLM2_TEMPLATE,
    "qwen": "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\n" + QWEN25_DEFAULT + "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'system' and loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    "qwen3": "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'system' and loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    "llama3": "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama3.2": "{{- '<|begin_of_text|>' }}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: 26 Jul 2024\n\n' }}"
    "{{- system_message }}"
    "{{- '<|eot_id|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
}
CHATS = [
    [{"role": "user", "content": "  What is 12 + 30?\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a  1"}, {"role": "assistant", "content": "\nb\n"}]
    + [{"role": "user", "content": "c"}],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", [True, False])
def test_chat_equals_the_template(name, reply, vocabularies, tmp_path):
    """Qwen 3 does not think aloud."""
    source = vocabularies({"qwen3": "qwen", "llama3.2": "llama3"}.get(name, name))
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[name]}))
    ours, template = Tokenizer(tmp_path), jinja2.Template(TEMPLATES[name])
    for messages in CHATS:
        how = {"add_generation_prompt": reply, "enable_thinking": False}
        text = template.render(messages=messages, **how)
        assert ours.chat(messages, reply) == ours.encode(text, control=True), text


def test_no_chat_tokens_no_chat(tmp_path):
    spec = json.loads((SMOLLM2 / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if "im_" not in t["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match="cannot chat"):
        Tokenizer(tmp_path).chat(CHATS[0])


@pytest.mark.parametrize(
    "text, message",
    [("{", "not valid JSON"), ("{}", "not a byte-level BPE"), (None, "no tokenizer.json")],
)
def test_bad_tokenizer_file(text, message, tmp_path):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        Tokenizer(tmp_path)
