"""The figures of the layout: python tests/layout_figures.py [root of a checkout]

Of an old revision: git worktree add ../before 72595d6, then python tests/layout_figures.py ../before
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

LABORATORY = {"lab", "data", "models", "simulation", "compare", "train.py", "evaluate.py", "report.py", "plots.py"}


def modules(package):
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }


def edges(package):
    """Module → the modules of the package that it imports, also inside of functions and under TYPE_CHECKING."""
    known = modules(package)
    graph = {}
    for name, path in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                graph[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & known.keys()
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & known.keys()
        graph[name] -= {name}
    return graph


def circles(graph):
    """The number of modules that can reach themselves, gathering packages left out."""
    inside = 0
    for name, targets in graph.items():
        stack, seen = list(targets), set()
        while "." in name and stack:
            target = stack.pop()
            if target not in seen:
                seen.add(target)
                stack += graph.get(target, ())
        inside += name in seen
    return inside


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    package = root / "lightning_easgd"
    lines = Counter()
    for path in package.rglob("*.py"):
        top = path.relative_to(package).parts[0]
        lines["laboratory" if top in LABORATORY else "core"] += len(path.read_text().splitlines())
    code = (
        "from lightning_easgd import EASGDStrategy as s; from lightning_easgd.fabric import EASGDStrategy as f;"
        "print(*(sum(c.__module__.startswith('lightning_easgd') for c in each.__mro__) for each in (s, f)))"
    )
    mro = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    graph = edges(package)
    rooms = {path.parent for path in package.rglob("*.py")}
    print(
        f"files {len(graph)}, rooms {len(rooms)}, of them at the top {len({r for r in rooms if r.parent == package})}"
    )
    print(f"lines of the core {lines['core']}, of the laboratory {lines['laboratory']}")
    print(f"modules in a circle {circles(graph)}")
    print(f"classes of this package in EASGDStrategy's method resolution order: Trainer, Fabric {mro.strip()}")
    longest = sorted((len(p.read_text().splitlines()), str(p.relative_to(package))) for p in package.rglob("*.py"))
    print("longest files " + ", ".join(f"{name} {count}" for count, name in longest[:-6:-1]))


if __name__ == "__main__":
    main()
