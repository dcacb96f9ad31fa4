"""The rooms of the package, and what each may import: data flows one way."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from preloaded import python_of_torch

PACKAGE = Path(__file__).parents[1] / "lightning_easgd"

# Each room may import those before it.
ROOMS = [
    "stability",
    "tensors",
    "method",
    "transport",
    "served_center",
    "averagers",
    "strategies",
    "callbacks",
    "lab",
]
# Modules beside the rooms, and after which room each comes.
FACES = {
    "registration": "stability",
    "import_hook": "stability",
    "metrics": "tensors",
    "sampling": "transport",
    "pl": "strategies",
    "fabric": "strategies",
    "train": "lab",
    "evaluate": "lab",
    "plots": "lab",
    "__init__": "strategies",
}
# What each may import beside Python's own library and this package, wherever in a file; the laboratory anything.
TORCH = {"torch", "typing_extensions"}
LIGHTNING = {"lightning", "lightning_utilities"}
OTHERS = {
    "stability": {"numpy"},
    "tensors": TORCH,
    "method": TORCH | {"lightning_utilities"},  # its warnings on rank 0; it is small, and knows no Lightning
    "transport": TORCH | {"torchft"},  # an extra, imported where workers come and go
    "served_center": TORCH,
    "averagers": TORCH,
    # Each class tree has a file; the state of NumPy's generator is saved; checkpoints lie on any file system.
    "strategies": TORCH | LIGHTNING | {"lightning_fabric", "pytorch_lightning", "numpy", "fsspec"},
    "callbacks": TORCH | LIGHTNING | {"numpy"},
    "import_hook": {"typing_extensions"},
    "metrics": TORCH | {"torchmetrics"},
    "sampling": TORCH,
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def place(parts):
    """The place in the order of a module whose path in the package has these parts."""
    if parts[0] in ROOMS:
        return 2 * ROOMS.index(parts[0])
    return 2 * ROOMS.index(FACES[parts[0]]) + 1


def core():
    """The files that are neither of the laboratory nor one of its faces."""
    return [path for path in modules() if place(path.relative_to(PACKAGE).with_suffix("").parts) < place(["lab"])]


def imports(path):
    """The modules that a file imports, wherever in it and by whatever word, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module, node.lineno
            if node.module == "lightning_easgd":
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            names = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
            assert names or path.name == "import_hook.py", f"{path}:{node.lineno}: nobody can read what is imported"
            yield from ((name, node.lineno) for name in names)


def _called(call):
    """The last word of what is called."""
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def inner(path):
    """What a file imports of this package, as parts of paths."""
    for name, line in imports(path):
        first, *rest = name.split(".")
        if first == "lightning_easgd" and rest and rest[0] != "__version__":
            yield tuple(rest), line


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_back(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    back = [
        f"{path.name}:{line} imports {'.'.join(theirs)}" for theirs, line in inner(path) if place(theirs) > place(own)
    ]
    assert not back


@pytest.mark.parametrize("path", core(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_of_others_what_is_listed(path):
    allowed = OTHERS.get(path.relative_to(PACKAGE).with_suffix("").parts[0], set()) | {"lightning_easgd"}
    found = {(name.split(".")[0], line) for name, line in imports(path)}
    assert not {each for each in found if each[0] not in allowed | sys.stdlib_module_names}


@pytest.mark.parametrize("path", core(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_used_of_the_package_stands_in_the_import(path):
    """``import lightning_easgd`` gives every room as an attribute, which nothing here would see."""
    lines = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
    aliases = [alias for line in lines for alias in line.names]
    ours = [each for each in aliases if each.name.split(".")[0] == "lightning_easgd"]
    assert not [each.name for each in ours if each.asname is None or each.name == "lightning_easgd"]


def test_there_is_no_circle():
    """Of modules: a package's ``__init__`` that gathers names counts as each module that it imports."""
    graph = {}
    for path in modules():
        own = path.relative_to(PACKAGE).with_suffix("").parts
        graph[own] = {
            theirs if (PACKAGE / Path(*theirs)).with_suffix(".py").exists() else (*theirs, "__init__")
            for theirs, _ in inner(path)
        }
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join(".".join(each) for each in [*path[path.index(module) :], module])
        if module in done or module not in graph:
            return
        path.append(module)
        for theirs in sorted(graph[module]):
            visit(theirs)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize(
    ("interpreter", "imports", "without"),
    [
        (lambda: sys.executable, "lightning_easgd", ("torch", "lightning.", "matplotlib")),
        (
            python_of_torch,
            "lightning_easgd.callbacks, lightning_easgd.fabric, lightning_easgd.sampling, lightning_easgd as package;"
            " package.EASGDStrategy",
            ("hydra", "omegaconf", "lightning_easgd.lab"),
        ),
    ],
)
def test_the_package_imports_no_laboratory(interpreter, imports, without, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys, {imports}\nprint([name for name in sys.modules if name.startswith({without})])")
    output = subprocess.run([interpreter(), script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_contributors_page_says_the_same():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    table = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert table == ROOMS
    assert sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()) == sorted(ROOMS)
    linked = set(re.findall(r"\]\(([^)#]+)\)", page))
    in_text = rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py)`"
    named = {f"lightning_easgd/{target}" for target in re.findall(in_text, page)}
    missing = [target for target in linked | named if not (PACKAGE.parent / target).exists()]
    assert linked
    assert named
    assert not missing


def test_the_contributors_page_names_what_other_settings_need_of_a_data_set():
    conf = PACKAGE.parent / "conf"
    others = [path.read_text() for path in conf.rglob("*.yaml") if path.parent.name != "data"]
    needed = set(re.findall(r"\$\{data\.(\w+)\}", "\n".join(others)))
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    (paragraph,) = re.findall(r"^\*\*A data set\*\*.*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert needed
    assert needed <= set(re.findall(r"`(\w+)`", paragraph))
    for path in (conf / "data").glob("*.yaml"):
        assert all(f"\n{key}: " in path.read_text() for key in needed), path


@pytest.mark.parametrize("module", ["lightning_easgd", "lightning_easgd.pl", "lightning_easgd.fabric"])
@pytest.mark.parametrize("name", ["EASGDStrategy", "DownpourStrategy", "LocalStrategy", "EASGDModelParallelStrategy"])
def test_a_strategy_is_no_tower(module, name):
    classes = getattr(importlib.import_module(module), name).__mro__
    ours = [each for each in classes if each.__module__.startswith("lightning_easgd")]
    assert len(ours) <= 5
    once = Counter(
        attribute
        for each in ours
        for attribute, value in vars(each).items()
        if (callable(value) or isinstance(value, property))
        and not attribute.startswith("__")
        and not getattr(value, "__isabstractmethod__", False)
    )
    # What a body says to do nothing about, or asks of the method, is overridden where it is done: once.
    assert {attribute for attribute, count in once.items() if count > 2} == set()
