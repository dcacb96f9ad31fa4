"""Docstrings as Markdown: the roles, formulas, tables and code blocks of reStructuredText that this package uses."""

import ast
import inspect
import re
from typing import Any

import griffe

METHODS = {
    "EASGDStrategy": "strategies.easgd.EASGDMethod",
    "DownpourStrategy": "strategies.downpour_family.DownpourMethod",
    "LocalStrategy": "strategies.local.LocalMethod",
}

_ROLE = re.compile(r":(attr|class|data|func|meth|mod):`~?([^`]+)`")
_FORMULA = re.compile(r":math:`([^`]+)`")
_FORMULA_BLOCK = re.compile(r"^( *)\.\. math::(.*)\n((?:(?:\1 +.*)?\n)*)", re.MULTILINE)
_CODE_BLOCK = re.compile(r"^( *)\.\. code-block:: (\w+)\n\n", re.MULTILINE)
_FORMULA_MADE = re.compile(r"\$[^$]+\$")
_RULE = re.compile(r"^ *=+(?: +=+)+ *$")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package when all of it has been read, so that names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite all docstrings, and give the strategies those of their methods, as Python does when it runs."""
        # Made by a function, for each class tree: to a reader of the source it is a value.
        made = pkg["strategies.trees.lightning_tree.EASGDModelParallelStrategy"]
        text = inspect.cleandoc(ast.literal_eval(str(pkg["strategies.sharded_workers.DOCUMENTATION"].value)))
        made.docstring = griffe.Docstring(text, parent=made)
        self._rewrite(pkg)
        for name, method in METHODS.items():
            pkg[f"strategies.trees.lightning_tree.{name}"].docstring = pkg[method].docstring

    def _rewrite(self, item: griffe.Object) -> None:
        if item.docstring is not None:
            item.docstring.value = _markdown(item.docstring.value, item)
        for member in item.members.values():
            if not member.is_alias:
                self._rewrite(member)


def _markdown(text: str, item: griffe.Object) -> str:
    text = _FORMULA_BLOCK.sub(_formula_block, text + "\n").rstrip()
    text = _FORMULA.sub(lambda match: f"${match[1].replace(chr(10), ' ')}$", text)
    text = _CODE_BLOCK.sub("\n", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = _ROLE.sub(lambda match: _reference(match[1], match[2], item), text)
    return "\n".join(_tables(text.split("\n")))


def _formula_block(match: re.Match[str]) -> str:
    indent, first, rest = match.groups()
    formula = "\n".join(line.strip() for line in [first, *rest.split("\n")] if line.strip())
    if "&=" in formula:
        formula = f"\\begin{{split}}{formula}\\end{{split}}"
    return f"{indent}$$\n{indent}" + formula.replace("\n", f"\n{indent}") + f"\n{indent}$$\n\n"


def _reference(role: str, name: str, item: griffe.Object) -> str:
    """A link to what is named if the site has it, else its name."""
    shown = name.removeprefix(".") + ("()" if role in ("func", "meth") else "")
    shown = shown if role == "mod" else shown.rpartition("lightning_easgd.")[2].rpartition(".")[2] or shown
    path = name
    if not name.startswith("lightning_easgd"):
        try:
            path = item.resolve(name.removeprefix("."))
        except (griffe.NameResolutionError, KeyError):
            path = f"{item.path}.{name.removeprefix('.')}"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _tables(lines: list[str]) -> list[str]:
    """The lines, with Markdown for simple tables, whose columns are marked by lines of ``=``."""
    done: list[str] = []
    while lines:
        if not _RULE.match(lines[0]):
            done.append(lines.pop(0))
            continue
        end = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
        done += _table(lines[:end])
        lines = lines[end:]
    return done


def _table(lines: list[str]) -> list[str]:
    starts = [match.start() for match in re.finditer("=+", lines[0])]
    columns = [slice(*each) for each in zip(starts, [*starts[1:], None], strict=True)]
    rows: list[list[str]] = []
    header = [""] * len(columns)
    for line in lines[1:-1]:
        cells = [line[column].strip() for column in columns]
        if _RULE.match(line):
            header = rows.pop()
        elif cells[0]:
            rows.append(cells)
        else:  # the row before goes on
            rows[-1] = [" ".join(filter(None, both)) for both in zip(rows[-1], cells, strict=True)]
    indent = " " * starts[0]
    # A bar inside of a formula would end the cell.
    rows = [[_FORMULA_MADE.sub(lambda match: match[0].replace("|", r"\vert "), cell) for cell in row] for row in rows]
    return [f"{indent}| {' | '.join(row)} |" for row in [header, ["---"] * len(columns), *rows]]
