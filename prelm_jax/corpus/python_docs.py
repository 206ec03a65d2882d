"""The documentation inside every Python: topics of the language reference, docstrings of the standard library."""

import ast
import functools
import os
import re
import sysconfig
import warnings

from prelm_jax.storage import opened

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


def files() -> list[str]:
    """The source files of the standard library, without tests, installed packages and old tools."""
    paths = []
    for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - EXCLUDED)
        paths += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return paths


@functools.cache  # Parsing the library takes seconds, and a corpus is read several times.
def documents() -> list[str]:
    """A document for each topic of the language reference, then one for each module: its docstrings."""
    from pydoc_data.topics import topics

    texts = [_unwrap(topic) for _, topic in sorted(topics.items())]
    for path in files():
        with opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of invalid escapes in the file.
            try:
                tree = ast.parse(file.read())
            except (SyntaxError, ValueError):
                continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # A module has none.
        texts.append("\n".join(filter(None, (_unwrap(ast.get_docstring(node) or "") for node in nodes))))
    return [text for text in texts if text]


def _unwrap(text: str) -> str:
    """One paragraph a line: a line of 50 characters or more was wrapped, so the next line continues it."""
    lines = [""]
    for line in map(str.strip, text.split("\n")):
        if len(lines[-1]) >= 50 and re.match(r"[\w\"'(`*]", line) and not line.startswith("* "):
            lines[-1] += " " + line
        elif re.search(r"\w", line):  # Not the underline of a heading.
            lines.append(line)
        else:
            lines.append("")
    return "\n".join(filter(None, lines))
