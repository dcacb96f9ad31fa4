"""Files of the repository that the site shows: a page links to them as on a code host, and finds them here, too.

A relative link that leaves `docs/` becomes a link within the site: Markdown, code and folders become pages, everything
else is copied. So a figure or a table lies in the repository once, and the site needs no other host.
"""

import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# The pages of the navigation that lie elsewhere, by their address on the site.
PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "results/benchmarks.md": "examples/benchmarks/README.md",
    "results/cifar10.md": "examples/results/cifar10_tau_small/README.md",
    "results/gpu.md": "examples/results/gpu/README.md",
    "results/rules.md": "examples/results/outer_rules/README.md",
    "results/simulation.md": "examples/results/simulation/README.md",
    "results/stability.md": "examples/results/stability/README.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".txt": "text"}
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


@dataclass
class _Site:
    """What lies where: addresses on the site by path in the repository, and the other way round."""

    root: Path
    addresses: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, address: str, path: str) -> None:
        self.addresses[path] = address
        self.sources[address] = path


_site: _Site | None = None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to."""
    global _site  # noqa: PLW0603  the hooks of MkDocs are functions of a module
    root = Path(config.config_file_path).parent
    _site = _Site(root)
    for file in files:
        if file.inclusion.is_included():
            _site.add(file.src_uri, f"docs/{file.src_uri}")
    waiting = [(path, (root / path).read_text(encoding="utf-8")) for path in _site.addresses if path.endswith(".md")]
    for address, path in PAGES.items():
        text = (root / path).read_text(encoding="utf-8")
        _site.add(address, path)
        files.append(File.generated(config, address, content=text))
        waiting.append((path, text))
    while waiting:
        source, text = waiting.pop()
        for match in _LINK.finditer(text):
            path = _path(source, match[2])
            if path is None or path in _site.addresses or not (root / path).exists():
                continue
            content = _page(root, path)
            if content is None:
                _site.add(f"files/{path}", path)
                files.append(File.generated(config, f"files/{path}", abs_src_path=str(root / path)))
            else:
                address = f"files/{path.removesuffix('.md')}.md"
                _site.add(address, path)
                files.append(File.generated(config, address, content=content))
                waiting.append((path, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let links lead to where things are on the site."""
    assert _site is not None
    site, here = _site, page.file.src_uri
    source = site.sources[here]

    def moved(match: re.Match[str]) -> str:
        address = site.addresses.get(_path(source, match[2]) or "")
        if address is None:
            return match[0]
        return match[1] + posixpath.relpath(address, posixpath.dirname(here) or ".") + match[3]

    return _LINK.sub(moved, markdown)


def _path(source: str, target: str) -> str | None:
    """The path in the repository to which a relative link of a file there leads."""
    if ":" in target or target.startswith("/"):
        return None
    # A folder's listing stands for the folder itself.
    folder = posixpath.dirname(source) if posixpath.splitext(source)[1] else source
    path = posixpath.normpath(posixpath.join(folder, target))
    return None if path.startswith("..") else path


def _page(root: Path, path: str) -> str | None:
    """A page that shows a file or a folder, None for what is to be copied."""
    file = root / path
    if file.is_dir():
        names = sorted(each.name for each in file.iterdir() if not each.name.startswith(("_", ".")))
        pictures = [f"![{Path(name).stem}]({name})\n" for name in names if name.endswith(".png")]
        return "\n".join([f"{NOT_SEARCHED}# {path}\n", *pictures, *(f"- [{name}]({name})" for name in names)]) + "\n"
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    if file.suffix in LANGUAGES or file.name in ("Makefile", "Dockerfile"):
        language = LANGUAGES.get(file.suffix, file.name.lower())
        return f"{NOT_SEARCHED}# {path}\n\n````{language}\n{file.read_text(encoding='utf-8')}````\n"
    return None
