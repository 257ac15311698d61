"""The embedded corpus: what is in it, and what is said where Python has none."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from core.errors import UserError
from llm.data.corpus import open_corpus


@pytest.fixture(scope="module")
def embedded():
    return open_corpus(["embedded"])


def test_it_is_the_library_and_its_reference(embedded):
    texts = {document.name: document.text for document in embedded.documents()}
    library = Path(sysconfig.get_paths()["stdlib"])
    assert texts["stdlib/json/decoder.py"] == (library / "json/decoder.py").read_text(encoding="utf-8")
    assert "anonymous functions" in texts["topics/lambda"]
    assert 6e6 < sum(len(text.encode()) for text in texts.values()) == embedded.num_bytes < 15e6
    parts = {part for name in texts for part in name.split("/")}
    assert not parts & {
        "test",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "sitecustomize.py",
    }
    assert not any(name.startswith("stdlib/_sysconfigdata") for name in texts)


def test_about_a_twentieth_of_it_is_held_out(embedded):
    train, held = ({d.name for d in embedded.documents(split)} for split in ("train", "heldout"))
    assert not train & held
    assert 0.02 < len(held) / len(train | held) < 0.08


def test_its_fingerprint_is_that_of_its_content(embedded, tmp_path, monkeypatch):
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("json/decoder.py", "textwrap.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((library / name).read_bytes())
    assert open_corpus(["embedded"]).fingerprint == embedded.fingerprint
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    copied = open_corpus(["embedded"])
    (tmp_path / "textwrap.py").touch()
    assert open_corpus(["embedded"]).fingerprint == copied.fingerprint != embedded.fingerprint
    (tmp_path / "textwrap.py").write_text("# another text\n" * 10)
    assert open_corpus(["embedded"]).fingerprint != copied.fingerprint


def test_a_declared_encoding_is_followed(tmp_path, monkeypatch):
    (tmp_path / "textwrap.py").write_bytes("# -*- coding: latin-1 -*-\n# café au lait\n".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    texts = {document.name: document.text for document in open_corpus(["embedded"]).documents()}
    assert "café" in texts["stdlib/textwrap.py"]


def test_what_distributions_add_is_left_out(tmp_path, monkeypatch):
    for name in ("textwrap.py", "sitecustomize.py", "_sysconfigdata__linux_x86_64-linux-gnu.py"):
        (tmp_path / name).write_text("# some source code\n" * 3)
    for folder in (
        "dist-packages/numpy",
        "site-packages/jax",
        "config-3.11-x86_64-linux-gnu",
        "unittest/test",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "code.py").write_text("# some source code\n" * 3)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    names = [document.name for document in open_corpus(["embedded"]).documents()]
    assert [name for name in names if name.startswith("stdlib/")] == ["stdlib/textwrap.py"]


def test_a_python_without_source_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "textwrap.pyc").write_bytes(b"compiled")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="has none: use a Python installed with its source"):
        open_corpus(["embedded"])
