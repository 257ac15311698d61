"""`python -m llm.tokenizer`: what it prints, and what it says to bad input."""

from __future__ import annotations

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from core.errors import UserError
from llm.tokenizer import Tokenizer
from llm.tokenizer.__main__ import main
from llm.tokenizer.reading import read_text
from llm.tokenizer.visible import visible

TEXT = "the théâtre, the other theater\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    (root / "texts").mkdir()
    (root / "texts" / "one.txt").write_text(TEXT, encoding="utf-8")
    (root / "texts" / "empty.txt").write_text("")
    train(root / "texts" / "*.txt", root / "tokenizer")
    return root


def train(source, out, vocab_size=270):
    main(["train", "--input", str(source), "--vocab-size", str(vocab_size), "--out", str(out)])


def test_encode_and_decode_are_each_other_s_inverse(folder, capfdbinary, monkeypatch):
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    for text in ("the théâtre\n\n", "<|eot_id|>", "  😀"):
        main(["encode", *tokenizer, text])
        ids = capfdbinary.readouterr().out
        assert list(map(int, ids.split())) == Tokenizer.load(folder / "tokenizer").encode(text)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        main(["encode", *tokenizer])
        assert capfdbinary.readouterr().out == ids
        main(["decode", *tokenizer, *ids.decode().split()])
        assert capfdbinary.readouterr().out == text.encode()


def test_inspect_shows_the_vocabulary_or_how_a_text_splits(folder, capfd):
    tokenizer = ["--tokenizer", str(folder / "tokenizer")]
    main(["inspect", *tokenizer])
    shown = capfd.readouterr().out
    assert "270 ids" in shown and "<|begin_of_text|>" in shown and "·the" in shown
    main(["inspect", *tokenizer, "the the"])
    shown = capfd.readouterr().out
    assert "the·the" in shown and "7 bytes" in shown and "bytes per token" in shown


def test_tokens_are_shown_on_one_line():
    assert visible(b" a\n\t") == "·a\\n\\t"
    assert visible("é".encode()) == "é"
    assert visible(b"\xc3") == "\\xc3"


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_file_is_read_in_parts(tmp_path, monkeypatch, block):
    monkeypatch.setattr("llm.tokenizer.reading.BLOCK", block)
    path = tmp_path / "text"
    path.write_bytes((TEXT + "😀\r\n").encode())
    parts = list(read_text(str(path)))
    assert "".join(parts) == TEXT + "😀\r\n" and len(parts) > 5


@pytest.mark.parametrize("block", [3, 4, 1000])
@pytest.mark.parametrize(
    ("data", "offset"),
    [(b"caf\xe9 is latin", 3), (b"caf\xc3\xa9\xff", 5), (b"abc\xe2\x82", 3), (b"\xe2\x28a", 0)],
)
def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path, monkeypatch, block, data, offset):
    monkeypatch.setattr("llm.tokenizer.reading.BLOCK", block)
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"bad.txt is not UTF-8 at byte {offset} \(0x{data[offset]:02x}\)"):
        train(tmp_path / "bad.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_named(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for source, message in (
        (tmp_path / "*.md", r"no file matches '.*\*\.md'"),
        (tmp_path / "missing.txt", "no file matches '.*missing.txt'"),
        (tmp_path / "empty.txt", "names nothing but empty files"),
        (tmp_path, r"is a folder: name its files, such as '.*/\*\*/\*\.txt'"),
    ):
        with pytest.raises(UserError, match=message):
            train(source, tmp_path / "out")
    with pytest.raises(UserError, match="already holds a tokenizer"):
        train(folder / "texts" / "one.txt", folder / "tokenizer")
    with pytest.raises(
        UserError, match="larger than this corpus supports: its 7 distinct words make at most 280 tokens"
    ):
        train(folder / "texts" / "one.txt", tmp_path / "out", vocab_size=1000)
    with pytest.raises(UserError, match="270 is no token id"):
        main(["decode", "--tokenizer", str(folder / "tokenizer"), "270"])
    with pytest.raises(UserError, match="the text is not UTF-8 at byte 1"):
        main(["encode", "--tokenizer", str(folder / "tokenizer"), "a\udcff"])


def test_the_command_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "llm.tokenizer", "encode", "--tokenizer", str(tmp_path), "hi"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: there is no tokenizer in")
    assert result.stderr.count("\n") == 1


def test_help_does_without_jax():
    code = "import sys, llm.tokenizer.__main__ as m; assert 'jax' not in sys.modules; m.main(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "inspect" in result.stdout, result.stderr
