"""The embedded corpus: real text that every Python has, so that a fresh clone trains without a download.

It is the reference documentation in `pydoc_data.topics` and the source of the standard library, without
what is tables (`encodings`), tests, or a copy of something else. Other Pythons have other corpora: the
content enters the fingerprint.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tokenize

from core.errors import UserError

_LEFT_OUT = {"pydoc_data", "encodings", "test", "idlelib", "lib2to3", "__pycache__"}


def embedded_names() -> list[str]:
    """Names of all documents, sorted: `stdlib/json/decoder.py`, `topics/lambda`.

    Raises:
        UserError: where this Python was installed without the library's source.
    """
    root = _library()
    modules = []
    for folder, folders, names in os.walk(root):
        if folder == root:
            # What distributions put beside the library (site-packages, sitecustomize) and what the build
            # generated (paths and flags of one machine) is no module of the standard library.
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            names = [name for name in names if name.removesuffix(".py") in sys.stdlib_module_names]
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        paths = (os.path.join(folder, name) for name in names if name.endswith(".py"))
        modules += [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    if not modules:
        raise UserError(
            f"the embedded corpus is the source of the standard library, and {root} has none: "
            "use a Python installed with its source, or name text files in data.sources"
        )
    return sorted([f"stdlib/{name}" for name in modules] + [f"topics/{name}" for name in _topics()])


def embedded_bytes(name: str) -> bytes:
    """The text of the document `name` as UTF-8."""
    kind, _, rest = name.partition("/")
    if kind == "topics":
        return _topics()[rest].encode()
    with tokenize.open(os.path.join(_library(), rest)) as file:  # each file declares its encoding (PEP 263)
        return file.read().encode()


def _library() -> str:
    return sysconfig.get_paths()["stdlib"]


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics  # 0.7 MB that `--help` has no use for

    return topics
