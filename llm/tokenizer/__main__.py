"""`python -m llm.tokenizer train | import | encode | decode | inspect`: the tokenizer alone."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from core.errors import UserError, run_command
from llm.tokenizer import Tokenizer, save, train_bpe
from llm.tokenizer.files import refuse_existing
from llm.tokenizer.patterns import PATTERNS
from llm.tokenizer.reading import decode_utf8, find_files, read_text
from llm.tokenizer.visible import visible

LONGEST = 24  # tokens that `inspect` shows
_PLACE = "its folder, its tokenizer.json or a SentencePiece .model"


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


def train(options: argparse.Namespace) -> None:
    refuse_existing(options.out)
    files = find_files(options.input)
    size = sum(map(os.path.getsize, files))
    print(f"{len(files)} files, {size:,} bytes", file=sys.stderr)
    texts = (text for path in files for text in read_text(path))
    bpe = train_bpe(texts, options.vocab_size, options.pattern, size=size, name="--vocab-size")
    save(bpe, options.out)
    print(f"wrote a tokenizer of {options.vocab_size} tokens to {options.out}", file=sys.stderr)


def import_(options: argparse.Namespace) -> None:
    refuse_existing(options.out)
    tokenizer = Tokenizer.load(options.model)
    tokenizer.save(options.out)
    print(f"wrote a tokenizer of {tokenizer.vocab_size} ids to {options.out}", file=sys.stderr)


def encode(options: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(options.tokenizer)
    print(*tokenizer.encode(_text(options.text)))


def decode(options: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(options.tokenizer)
    for token in options.ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise UserError(f"{token} is no token id: this tokenizer's are 0 to {tokenizer.vocab_size - 1}")
    # Bytes rather than text: what was encoded comes back exactly, even where it is cut within a character.
    sys.stdout.buffer.write(tokenizer.decode_bytes(options.ids))
    sys.stdout.flush()
    if sys.stdout.isatty():
        print()


def inspect(options: argparse.Namespace) -> None:
    from rich.console import Console

    tokenizer = Tokenizer.load(options.tokenizer)
    console = Console(highlight=False)
    if options.text is None:
        _show_vocabulary(tokenizer, console)
    else:
        _show_split(tokenizer, _text(options.text), console)


def _show_vocabulary(tokenizer: Tokenizer, console) -> None:
    from rich.table import Table

    ordinary = {
        i: token
        for i in range(tokenizer.vocab_size)
        if i not in tokenizer.special_ids.values() and (token := tokenizer.token_bytes(i))
    }
    print(f"{tokenizer.path}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")
    roles = {tokenizer.bos_id: "begin of text", tokenizer.eos_id: "end of text", tokenizer.pad_id: "padding"}
    special = Table("id", "token", "role", box=None, title="special tokens", title_justify="left")
    for name, i in sorted(tokenizer.special_ids.items(), key=lambda item: item[1]):
        special.add_row(str(i), name, roles.get(i, ""))
    console.print(special)
    lengths = Counter(min(len(token), 16) for token in ordinary.values())
    histogram = Table(
        "bytes", "tokens", "", box=None, title="length of ordinary tokens", title_justify="left"
    )
    for length, count in sorted(lengths.items()):
        bar = "█" * round(40 * count / max(lengths.values()))
        histogram.add_row(f"{length}{'+' if length == 16 else ''}", str(count), bar)
    console.print(histogram)

    longest = Table("id", "bytes", "token", box=None, title="the longest", title_justify="left")
    for i, token in sorted(ordinary.items(), key=lambda item: (-len(item[1]), item[0]))[:LONGEST]:
        longest.add_row(str(i), str(len(token)), visible(token))
    console.print(longest)


def _show_split(tokenizer: Tokenizer, text: str, console) -> None:
    from rich.text import Text

    ids = tokenizer.encode(text)
    line = Text()
    for n, i in enumerate(ids):
        token = tokenizer.token_bytes(i)
        line.append(visible(token), style=("black on cyan", "black on yellow", "black on green")[n % 3])
        line.append("\n" * token.count(b"\n"))
    console.print(line)
    console.print(*ids)
    size = len(text.encode())
    ratio = f", {size / len(ids):.2f} bytes per token" if ids else ""
    console.print(f"{size} bytes, {len(text)} characters, {len(ids)} tokens{ratio}")


def _text(argument: str | None) -> str:
    """The text given as an argument, or all of standard input."""
    if argument is None:
        return decode_utf8(sys.stdin.buffer.read(), "standard input")
    return decode_utf8(os.fsencode(argument), "the text")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m llm.tokenizer", description="The tokenizer alone.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("train", help="learn a tokenizer from UTF-8 text files")
    command.add_argument("--input", required=True, nargs="+", metavar="GLOB", help="'**' for any folders")
    command.add_argument(
        "--vocab-size",
        required=True,
        type=int,
        metavar="N",
        help="number of ids, 256 bytes and specials included",
    )
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write it to")
    command.add_argument(
        "--pattern", default="llama3", choices=PATTERNS, help="how text is split first (default: %(default)s)"
    )
    command.set_defaults(run=train)

    command = commands.add_parser("import", help="write another maker's tokenizer as tokenizer.json")
    command.add_argument("--model", required=True, type=Path, metavar="PATH", help=_PLACE)
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write it to")
    command.set_defaults(run=import_)

    for name, run, text in (
        ("encode", encode, "print the ids of a text, by default of standard input"),
        ("decode", decode, "print the text of ids"),
        ("inspect", inspect, "show the vocabulary, or how a text is split into tokens"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--tokenizer", required=True, type=Path, metavar="PATH", help=_PLACE)
        if name == "decode":
            command.add_argument("ids", nargs="+", type=int, metavar="ID")
        else:
            command.add_argument("text", nargs="?", metavar="TEXT")
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    run_command(main)
