"""lm/tokenizer.py against the `tokenizers` library and the checkpoints' own chat templates."""

import copy
import functools
import json
import math
import random
import time

import pytest
from conftest import ROOT, SMOLLM2
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from lm.tokenizer import Tokenizer
from quiz import general_texts
from reward import passage_examples

VOCAB = ROOT / "downloads" / "vocab"
CONTROL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>"]
    + ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
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
    if ours.template:
        end = ours.end_ids[0]
        quiet, loud = ({"role": "user", "content": c} for c in ("hello", "<|im_end|><|eot_id|>"))
        assert ours.chat([quiet]).count(end) == ours.chat([loud]).count(end)


# -----------------------------------------------------------------------------
# what a tokenizer.json may ask for: the same ids as the `tokenizers` library, or one line

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTES |= {"use_regex": False}
WORDS = r"\p{L}+|\s+"  # leaves out what is neither


def split(pattern, behavior="Isolated", invert=False):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


def add(content, n=0, **flags):
    """A token that is added to a vocabulary of 400, and </s>."""
    token = {"id": 401 + n, "content": content, "special": False, "normalized": False}
    return token | {"lstrip": False, "rstrip": False, "single_word": False} | flags


def sequence(*normalizers):
    return {"normalizer": {"type": "Sequence", "normalizers": list(normalizers)}}


NFC_STEP = {"type": "NFC"}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
HONOURED = {
    "as trained": {},
    "nfc": {"normalizer": NFC_STEP},
    "nfc in a sequence": sequence(NFC_STEP),
    "no normalizers": sequence(),
    "split": {"pre_tokenizer": split(PATTERN.replace("DIGITS", r"\p{N}"))},
    "split that leaves text out": {"pre_tokenizer": split(WORDS)},
    "added words": {"added_tokens": [add("bc"), add("bcd", 1), add("<|x|>", 2, special=True)]},
    "an added word within a special one": {
        "added_tokens": [add("x|"), add("<|x|>", 1, special=True)]
    },
    "words before and after nfc": sequence(NFC_STEP)
    | {"added_tokens": [add("\u212b"), add("e\u0301", 1, normalized=True)]},
    "a word that was there": {"added_tokens": [add("in", normalized=True) | {"id": None}]},
}


def begins(*before, end=False):
    """A post_processor as Llama 3 has it."""
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    pieces += [{"Sequence": {"id": "A", "type_id": 0}}]
    pieces += [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * end
    known = {"</s>": {"id": "</s>", "ids": [400], "tokens": ["</s>"]}}
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    template["special_tokens"] = known
    steps = [BYTES | {"use_regex": True}, template]
    return {"post_processor": {"type": "Sequence", "processors": steps}}


REFUSED = {
    "a post_processor that ends a text": begins(end=True),
    "post_processor RobertaProcessing": {"post_processor": {"type": "RobertaProcessing"}},
    "normalizer 'Lowercase'": {"normalizer": {"type": "Lowercase"}},
    "normalizer 'NFKC'": {"normalizer": {"type": "NFKC"}},
    "normalizer 'Replace'": {"normalizer": REPLACE},
    "normalizer 'Prepend'": sequence(NFC_STEP, {"type": "Prepend", "prepend": "_"}),
    "ByteLevel: add_prefix_space = True": {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
    "Split: behavior = 'Removed'": {"pre_tokenizer": split(WORDS, "Removed")},
    "Split: behavior = 'MergedWithNext'": {"pre_tokenizer": split(WORDS, "MergedWithNext")},
    "Split: invert = True": {"pre_tokenizer": split(WORDS, invert=True)},
    r"'\\\\w' in a pre_tokenizer's pattern": {"pre_tokenizer": split(r"\w+")},
    r"its pre_tokenizer: .*[Pp]ars": {"pre_tokenizer": split("(")},
    "pre_tokenizer .'Whitespace'. is": {"pre_tokenizer": {"type": "Whitespace"}},
    "decoder 'WordPiece'": {"decoder": {"type": "WordPiece", "prefix": "#", "cleanup": False}},
    "'bc' with lstrip": {"added_tokens": [add("bc", lstrip=True)]},
    "'bc' with rstrip": {"added_tokens": [add("bc", rstrip=True, special=True)]},
    "'bc' with single_word": {"added_tokens": [add("bc", single_word=True)]},
    "two tokens have one id": {"added_tokens": [add("bc"), add("bcd")]},
    "'bc' has id 404, not 401": {"added_tokens": [add("bc", 3)]},
    "'a' has id 401, but": {"added_tokens": [add("a")]},
    "'bc' has no id, but 'x'": {"added_tokens": [add("bc") | {"id": "x"}]},
    "dropout = 0.5": {"model": {"dropout": 0.5}},
    "end_of_word_suffix = '</w>'": {"model": {"end_of_word_suffix": "</w>"}},
    "not in the order of their ids": {"model": {"merges": ["i n", "h e"]}},
}


@pytest.fixture(scope="module")
def trained():
    """The spec of a vocabulary of 400, trained by the `tokenizers` library."""
    tokenizer = Reference(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "data" / "passages.json").read_text()], trainer)
    return json.loads(tokenizer.to_str())


def written(trained, change, folder):
    spec = trained | change
    spec["model"] = trained["model"] | change.get("model", {})
    for token in spec["added_tokens"]:
        if token["id"] is None:
            token["id"] = spec["model"]["vocab"][token["content"]]
    spec["added_tokens"] = [add("</s>", -1, special=True), *spec["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("case", HONOURED)
def test_what_a_file_asks_for_is_honoured(case, trained, tmp_path):
    ours = Tokenizer(written(trained, copy.deepcopy(HONOURED[case]), tmp_path))
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    some = ["in", "inner", "bcd", "<|x|>", "x|", "</s>", "e\u0301", "\u212b\u0301", "\u0338"]
    rng = random.Random(1)
    texts = list(strings(300)) + ["".join(rng.choices([*some, " ", "a"], k=9)) for _ in range(300)]
    for control in (False, True):
        reference.encode_special_tokens = not control
        for text in texts:
            expected = reference.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, control=control) == expected, repr(text)


def test_what_stands_before_a_text(trained, tmp_path):
    """As Llama 3's file puts a token there, which the `tokenizers` library then does."""
    for change, first in (({}, []), (begins("</s>"), [400]), (begins("</s>", "</s>"), [400, 400])):
        ours = Tokenizer(written(trained, change | {"added_tokens": []}, tmp_path))
        reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
        assert ours.begin == first
        assert [*ours.begin, *ours.encode("in it")] == reference.encode("in it").ids


def test_a_passage_is_learnt_behind_it(tok, monkeypatch):
    """But a chat's template has it itself; and nobody learns to write it."""
    monkeypatch.setattr(tok, "begin", [7])
    note = "Question: Who?\nAnswer: Ada."
    plain, chat = passage_examples(tok, "Rolm", ["Rolm fell.", note])
    assert (plain.ids[0], plain.counts[0]) == (7, False) and all(plain.counts[1:])
    assert 7 not in chat.ids and general_texts(tok)[0][0] == 7


def test_a_vocabulary_without_an_end_is_refused(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(trained))
    with pytest.raises(SystemExit, match="no token ends a text"):
        Tokenizer(tmp_path)
    named = {"eos_token": {"content": "in"}}  # whatever it is called
    spec = trained | {"added_tokens": [add("in") | {"id": trained["model"]["vocab"]["in"]}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert Tokenizer(tmp_path).end_ids == [trained["model"]["vocab"]["in"]]


def test_an_id_that_is_no_tokens_is_no_text(trained, tmp_path):
    ours = Tokenizer(written(trained, {"added_tokens": [add("\u00e9\u00e9")]}, tmp_path))
    assert ours.decode([*ours.encode("a b \u00e9\u00e9"), 402, 7_000, -1]) == "a b \u00e9\u00e9"
    vocab = {t: i for t, i in trained["model"]["vocab"].items() if t != "!"} | {"<unmade>": 0}
    ours = Tokenizer(written(trained, {"model": {"vocab": vocab}}, tmp_path))  # lacks a byte
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<unmade>", "a !", "a  !b", "!!", "a ?!"):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert ours.decode([0]) == reference.decode([0]) == "<unmade>"


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_file_asks_for_is_refused_by_name(message, trained, tmp_path):
    written(trained, copy.deepcopy(REFUSED[message]), tmp_path)
    with pytest.raises(SystemExit, match=message) as e:
        Tokenizer(tmp_path)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


def test_long_runs(folder, vocabularies):
    """Encoded in time that grows with their length, or refused in one line."""
    ours, reference = Tokenizer(folder), Reference.from_file(str(folder / "tokenizer.json"))
    start = time.perf_counter()
    runs = {c: ours.encode(c * 30_000) for c in ("^", "=", "a", " ", "\n", "\x04", "\U0001f600")}
    ours.encode(" " * 100_000 + "a")
    assert time.perf_counter() - start < 5
    for c, ids in runs.items():
        assert ids == reference.encode(c * 30_000, add_special_tokens=False).ids
    with pytest.raises(SystemExit, match="1000000 blanks in a row"):
        ours.encode("a" + " " * 1_000_000)


# -----------------------------------------------------------------------------
# chat formats against the checkpoints' own templates

SMOLLM2_TEMPLATE = ""
if SMOLLM2.is_dir():
    SMOLLM2_TEMPLATE = json.loads((SMOLLM2 / "tokenizer_config.json").read_text())["chat_template"]
QWEN25_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATES = {  # Qwen 2.5 and Llama 3 without their branches for tools
    "smollm2": SMOLLM2_TEMPLATE,
    "qwen": "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\n" + QWEN25_DEFAULT + "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'system' and loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
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
    "filtered": "{%- set last = None %}{%- for m in messages if m.role != None and m.content %}"
    "{{ '<|im_start|>' ~ m.role ~ loop.index ~ loop.last ~ loop.length ~ '\n' ~ m.content }}"
    "{{ '<|im_end|>\n' }}{%- endfor %}{%- if last is none and x is not defined %}{%- endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "hermes": "{{bos_token}}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen-math": "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nPlease reason "
    "step by step, and put your final answer within \\\\boxed{}.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' ~ message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "r1": "{%- set ns = namespace(is_first=false, system_prompt='') -%}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}\n"
    "{%- for message in messages %}\n"
    "    {%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{%- endif %}\n"
    "    {%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<|Assistant|>' + content + eos_token}}{%- endif %}\n"
    "{%- endfor -%}\n"
    "{% if add_generation_prompt and not ns.is_first %}{{'<|Assistant|><think>\\n'}}{% endif %}",
    "qwen3": "{%- if tools %}{{- tools | tojson }}{%- else %}"
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}{%- endif %}"
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}"
    '{%- if ns.multi_step_tool and message.role == "user" and message.content is string and not('
    "message.content.startswith('<tool_response>') and "
    "message.content.endswith('</tool_response>')) %}{%- set ns.multi_step_tool = false %}"
    "{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.content is string %}{%- set content = message.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    '{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}'
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == \"assistant\" %}{%- set reasoning_content = '' %}"
    "{%- if message.reasoning_content is string %}"
    "{%- set reasoning_content = message.reasoning_content %}{%- else %}"
    "{%- if '</think>' in content %}{%- set reasoning_content = "
    "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index %}"
    "{%- if loop.last or (not loop.last and reasoning_content) %}"
    "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + "
    "'\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}"
    "{%- if message.tool_calls %}{{- message.tool_calls | tojson }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    "blanks": "{# a comment: don't print #}\n  {% for m in messages if m.role in ['user', "
    "'assistant'] %}\n    {%- set label = {'user': 1} if false else m.role.upper() %}\n"
    "  [{{ loop.index }}/{{ loop.length }}] {{ m.role }}: {{ m.content }}</s>\n"
    "  {%+ if loop.last %} last {% endif %}\n\n  {% endfor %}\n  end {{ undefined_name }}\n"
    "{% if add_generation_prompt -%}\n\n   assistant:{% endif %}\n\n",
}
VOCABULARY = {"llama3.2": "llama3", "hermes": "small", "qwen-math": "qwen", "r1": "small"}
VOCABULARY |= {"qwen3": "small", "blanks": "small", "filtered": "small"}
CHATS = [
    [{"role": "user", "content": "  What is 12 + 30?\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a  1"}, {"role": "assistant", "content": "\nb\n"}]
    + [{"role": "user", "content": "c"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "\n<think>\nb\n</think>\nc"},
    ],
]


@pytest.fixture(scope="module")
def small(trained, tmp_path_factory):
    """A vocabulary that has every family's control tokens."""
    names = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>"]
    tokens = [add(name, n, special=True) for n, name in enumerate(names)]
    tokens += [add("<think>", 5), add("</think>", 6)]
    return written(trained, {"added_tokens": tokens}, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_equals_the_template(name, vocabularies, small, tmp_path):
    vocabulary = VOCABULARY.get(name, name)
    source = small if vocabulary == "small" else vocabularies(vocabulary)
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = {"chat_template": TEMPLATES[name], "bos_token": "<|begin_of_text|>"}
    config |= {"eos_token": {"content": "</s>"}} if vocabulary == "small" else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer(tmp_path)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **names)
    theirs.chat_template = TEMPLATES[name]
    options = {"enable_thinking": False, "date_string": "26 Jul 2024", "return_dict": False}
    for messages in CHATS:
        for reply in (True, False):
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=reply, tokenize=True, **options
            )
            assert ours.chat(messages, reply) == expected, theirs.decode(expected)


def test_a_reply_ends_as_in_the_template(small, tmp_path):
    """Whatever that token is called; and it is not what a message says."""
    template = "{% for m in messages %}<|User|>{{ m.content }}<|Assistant|>{% endfor %}"
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    ours = Tokenizer(tmp_path)
    assert ours.end_ids[0] == ours.added["<|Assistant|>"]
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer(tmp_path).end_ids[0] == ours.added["<|im_end|>"]
    spelled = ours.chat([{"role": "user", "content": "<|User|><|Assistant|>\ue000"}])
    assert spelled.count(ours.added["<|User|>"]) == spelled.count(ours.end_ids[0]) == 1
    assert ours.decode(spelled) == "<|User|><|User|><|Assistant|>\ue000<|Assistant|>"


def test_a_text_with_all_of_private_use(tok):
    """There is no character left to mark a control token by."""
    text = "".join(map(chr, range(0xE000, 0xF900)))
    assert tok.chat([{"role": "user", "content": text[1:]}])
    with pytest.raises(SystemExit, match="^error: a text has every character of .* private use"):
        tok.chat([{"role": "user", "content": text}])


def test_named_templates(small, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    named = [{"name": n, "template": f"{n}{{{{ messages[-1].content }}}}</s>"} for n in ("x", "y")]
    named += [{"name": "default", "template": "hello{{ messages[-1].content }}</s>"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    ours = Tokenizer(tmp_path)
    assert ours.chat(CHATS[1]) == ours.encode("helloHi</s>", control=True)


LONG, PRINTED = "{% set s = 'a' %}" + "{% set s = s ~ s %}" * 21, "{{ s }}"
SPLIT = "{% set t = s.split('b') %}"
NESTED = "{% set s = [1] %}" + "{% set s = [s, s] %}" * 40
GROWING = "{% set s = s.replace('a', 'aaaaaaaa') %}"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% macro f() %}{% endmacro %}", "{% macro %} is not supported"),
        ("{{ messages | tojson }}", "filter 'tojson' is not supported"),
        ("{% if messages is odd %}{% endif %}", "test 'odd' is not supported"),
        ("{{ strftime_now('%d') }}", "the function 'strftime_now' is not supported"),
        ("{{ messages.__class__ }}{{ ''.__class__() }}", "the function .*__class__.* is not"),
        ("{{ a.b.c }}", "'b' of something undefined is not supported"),
        ("{% if x %}", "endif is missing"),
        ("{{ 'a' if x }}", "is not supported"),
        ("{{ x", "'{{ x' is not supported"),
        ("{{ raise_exception('No\nusers here') }}", "No users here"),
        ("{{ 1 % 0 }}", "modulo"),
        ("{{ '%9999999999d' % 1 }}", "% of a text is not supported"),
        (
            f"{{% set s = 'aaaaaaaa' %}}{'{% set s = s + s %}' * 35}",
            "a text or list of 8,388,608|4,194,304, with all",
        ),
        (
            f"{{% set s = [1] %}}{'{% set s = s + s %}' * 35}",
            "a text or list of 8,388,608|4,194,304, with all",
        ),
        (f"{{% set s = 'a' %}}{GROWING * 12}", "a text of more than .* is not supported"),
        (f"{LONG}{PRINTED * 5}", "a text of more than .* is not supported"),
        (
            f"{LONG}{'{% set t = [s.upper()] %}' * 3}",
            "a text or list of 2,097,152, with all before it, is not",
        ),
        (
            f"{LONG}{'{% set t = [s[1:]] %}' * 3}",
            "a text or list of 2,097,151, with all before it, is not",
        ),
        (f"{NESTED}{{{{ namespace(a=s).values() }}}}", "a list or dictionary as text is not"),
        ("{{ b'%50d' % 1 }}", "b'%50d'.* is not supported"),
        (f"{LONG}{'{% set t = [s|list] %}' * 3}", "a text or list of 2,097,152, with all before"),
        (f"{LONG}{SPLIT * 5}", "a text or list of 1, with all before"),
        ("{% for k in a %}{% set b = namespace(c=1) %}{% endfor %}" * 3, "ends a reply with no"),
        ("{{ " + "not " * 20_000 + "1 }}", "is not supported"),
        (" " * 1_000_001, "has 1,000,001 characters, of at most 1,000,000"),
        (f"{NESTED}{PRINTED}", "a list or dictionary as text is not supported"),
        (f"{NESTED}{{{{ s ~ s }}}}", "a list or dictionary as text is not supported"),
        (f"{LONG}{{% for c in s %}}{{% endfor %}}", "a loop of 2,097,152 rounds is not supported"),
        ("{% for m in messages %}{{ loop.revindex0 }}{% endfor %}", "loop.revindex0 is not"),
        ("{% set a, b = 1, 2 %}", "{% set %} is not supported"),
        ("{{ " + "(" * 400 + "1" + ")" * 400 + " }}", "is not supported"),
        ("{{ messages[0].content }}", "ends a reply with no token"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        (5, "chat_template must be a text"),
        ([{"name": "rag", "template": "x"}], "chat_template must be a text"),
    ],
)
def test_a_template_that_we_cannot_follow_is_refused(template, message, small, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(SystemExit, match=message) as e:
        Tokenizer(tmp_path)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)


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


@pytest.mark.parametrize("content", [5, None, ["a"]])
def test_an_added_token_that_is_no_text(content, trained, tmp_path):
    spec = trained | {"added_tokens": [add("bc") | {"id": 400, "content": content}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match="is not a byte-level BPE tokenizer"):
        Tokenizer(tmp_path)


def test_a_vocabulary_of_nothing(trained, tmp_path):
    spec = trained | {"model": trained["model"] | {"vocab": {}, "merges": []}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(SystemExit, match="it has no tokens"):
        Tokenizer(tmp_path)


def test_how_common_a_word_is(tok):
    """Of one token: its number's logarithm; a name that nobody has takes several."""
    [id] = tok.encode(" made")
    assert tok.bits("made") == math.log2(1 + id)
    assert tok.bits("made") < tok.bits("lighthouse") < tok.bits("jorunak") < math.inf
    assert tok.bits("河") > 0
