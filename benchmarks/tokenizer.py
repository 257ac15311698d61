"""Training a byte-level BPE: ours against the trainers of `tokenizers` and `sentencepiece`; and encoding.

    python -m benchmarks.tokenizer [--sizes 10 100] [--rounds 3] [--json FILE]

The text is Python source that lies on every machine with the development environment: the `.py` files of
the standard library and of the installed packages, in an order that mixes them, up to each size. All trainers
get the same texts, in memory; the clock runs from there to the finished vocabulary. Each runs in a process of
its own and they take turns, so that no other load on the machine favors one: what counts is the ratio of each
round.

Ours and `tokenizers` split with Llama 3's pattern and learn byte-level merges, which must be the same.
`sentencepiece` learns merges of characters from lines, without normalization, on as many threads as there are
cores; it skips lines of more than 4192 bytes, as it does by default.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TRAINERS = ("ours", "tokenizers", "sentencepiece")
ENCODERS = ("ours, one core", "tokenizers, all cores")
ENCODED_MB = 4


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100], metavar="MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [train_all(size, options.rounds, Path(folder)) for size in options.sizes]
        results.append(encode_all(options.rounds, Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def train_all(size: int, rounds: int, folder: Path) -> dict:
    vocab_size = 8192 if size < 100 else 32768
    texts = source_code(size * 1_000_000)
    path = folder / f"{size}.pickle"
    path.write_bytes(pickle.dumps(texts))
    runs: dict[str, list[dict]] = {name: [] for name in TRAINERS}
    for _ in range(rounds):
        for name in TRAINERS:
            runs[name].append(in_own_process("train", name, path, vocab_size))
    same = {run["merges"] for name in ("ours", "tokenizers") for run in runs[name]}
    assert len(same) == 1, "the merges differ from those of tokenizers"
    seconds = {name: [run["seconds"] for run in runs[name]] for name in TRAINERS}
    ratios = [mine / min(others) for mine, *others in zip(*seconds.values(), strict=True)]
    print(f"\n{size} MB in {len(texts)} files, vocabulary {vocab_size}, {rounds} rounds")
    print("| trainer | seconds, median | least | most | peak memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, times in seconds.items():
        memory = max(run["megabytes"] for run in runs[name])
        shown = [f"{value:.2f}" for value in (statistics.median(times), min(times), max(times))]
        print(f"| {name} | {' | '.join(shown)} | {memory:.0f} |")
    print(f"ours / the faster other, by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)
    return {"megabytes": size, "vocab_size": vocab_size, "runs": runs, "ratios": ratios}


def encode_all(rounds: int, folder: Path) -> dict:
    texts = source_code(ENCODED_MB * 1_000_000)
    path = folder / "encode.pickle"
    path.write_bytes(pickle.dumps(texts))
    runs: dict[str, list[dict]] = {name: [] for name in ENCODERS}
    for _ in range(rounds):
        for name in ENCODERS:
            runs[name].append(in_own_process("encode", name, path, 8192))
    assert len({run["ids"] for encoder in runs.values() for run in encoder}) == 1, "the ids differ"
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"\nencoding {size:.1f} MB, vocabulary 8192\n| encoder | MB/s, median | least | most |")
    print("| --- | --- | --- | --- |")
    for name, encoder in runs.items():
        speeds = [size / run["seconds"] for run in encoder]
        print(
            f"| {name} | {statistics.median(speeds):.1f} | {min(speeds):.1f} | {max(speeds):.1f} |",
            flush=True,
        )
    return {"encoded_megabytes": size, "runs": runs}


def source_code(size: int) -> list[str]:
    """`.py` files of the standard library and the installed packages, at least `size` bytes of them."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    paths = {(str(path.relative_to(folder)), path) for folder in folders for path in folder.rglob("*.py")}
    texts: list[str] = []
    for _, path in sorted(paths, key=lambda named: hashlib.sha256(named[0].encode()).digest()):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        size -= path.stat().st_size
        if size <= 0:
            return texts
    sys.exit(f"error: the installed packages lack {size:,} bytes of source code: ask for less with --sizes")


def in_own_process(*arguments: str | int | Path) -> dict:
    """Run `measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(what: str, name: str, path: str, vocabulary: str) -> dict:
    vocab_size = int(vocabulary)
    texts: list[str] = pickle.loads(Path(path).read_bytes())
    if what == "encode":
        return measure_encoder(name, texts, vocab_size)
    train = {"ours": train_ours, "tokenizers": train_tokenizers, "sentencepiece": train_sentencepiece}[name]
    started = time.perf_counter()
    merges = train(texts, vocab_size)
    seconds = time.perf_counter() - started
    kilobytes = sum(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"seconds": seconds, "megabytes": kilobytes / 1000, "merges": digest(merges())}


def measure_encoder(name: str, texts: list[str], vocab_size: int) -> dict:
    from llm.tokenizer import Tokenizer, save, train_bpe

    bpe = train_bpe(texts, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        save(bpe, folder)
        engine = Tokenizer.load(folder)
    bpe.encode("once, to build the tables")
    started = time.perf_counter()
    ids = list(map(bpe.encode, texts)) if name == ENCODERS[0] else engine.encode_batch(texts)
    return {"seconds": time.perf_counter() - started, "ids": digest(ids)}


def train_ours(texts: list[str], vocab_size: int) -> Callable[[], list]:
    from llm.tokenizer import train_bpe
    from llm.tokenizer.bpe import BYTE_TO_CHAR

    bpe = train_bpe(texts, vocab_size, special_tokens=())
    spelled = ["".join(BYTE_TO_CHAR[byte] for byte in token) for token in bpe.vocabulary]
    return lambda: [[spelled[left], spelled[right]] for left, right in bpe.merges]


def train_tokenizers(texts: list[str], vocab_size: int) -> Callable[[], list]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from llm.tokenizer.patterns import PATTERNS

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS["llama3"]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return lambda: json.loads(tokenizer.to_str())["model"]["merges"]


def train_sentencepiece(texts: list[str], vocab_size: int) -> Callable[[], list]:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=io.BytesIO(),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        num_threads=os.cpu_count(),
        minloglevel=2,
    )
    return list


def digest(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        main()
