"""The documentation's site, its notebook, and what stands beside the code for contributors."""

import ast
import importlib
import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from application import ROOT
from lightning.pytorch.trainer.connectors import accelerator_connector
from preloaded import python

import lightning_easgd
from lightning_easgd.transport import strangers


def needed(module: str):
    """A module of the extra; without it the tests fail, they are not left out."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        pytest.fail(f"{module} is in the extra `docs`: make test, or pip install -e '.[docs,release]'")


class Html(HTMLParser):
    """What a page links to, what can be linked to in it, and what it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {""}
        self.undescribed: list[str] = []
        self.text: list[str] = []
        self._code = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])
        if tag == "link":
            self.loaded.append(given["href"])
        if tag == "img" and not given.get("alt"):
            self.undescribed.append(given["src"])
        self._code += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag):
        self._code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.text.append(data)


def problems(site: Path) -> list[str]:
    """What is wrong with the links, the pictures and the markup of a built site."""
    pages = {path: Html(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: the picture {picture} has no description" for picture in page.undescribed]
        found += [f"{name}: loads {target}" for target in page.loaded if urlsplit(target).scheme not in ("", "data")]
        text = "".join(page.text)
        found += [
            f"{name}: {rest} is markup" for rest in re.findall(r":\w+:`|\.\. \w+::|\$\$|\$\\|\\\[|={9,}|\]\(", text)
        ]
        if name == "404.html":  # its addresses begin at the server's root
            continue
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if file.is_dir():
                file /= "index.html"
            if not file.exists():
                found.append(f"{name}: {target} leads nowhere")
            elif parts.fragment and unquote(parts.fragment) not in pages[file].anchors:
                found.append(f"{name}: {target} names no place there")
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    found += [f"a style loads {target}" for target in re.findall(r"url\(['\"]?(https?:[^)'\"]*)", styles)]
    return found


@pytest.mark.timeout(300)
def test_site(tmp_path):
    needed("mkdocs")
    site = tmp_path / "site"
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [python(), "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not problems(site)

    configuration = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = set(re.findall(r"[\w/]+\.md", json.dumps(configuration["nav"])))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} <= named
    assert all((site / name).with_suffix(".html").exists() for name in named)
    # What users import has its place in the reference, and formulas are drawn.
    anchors = set().union(*(Html(path.read_text()).anchors for path in (site / "reference").glob("*.html")))
    for module in ("lightning_easgd", "lightning_easgd.callbacks", "lightning_easgd.method.elastic"):
        for name in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), name)
            if isinstance(value, type) and not getattr(value, "_is_protocol", False):
                assert {f"{module}.{name}", f"{value.__module__}.{name}"} & anchors, name
    method = (site / "method.html").read_text()
    assert method.count("<math") > 20
    assert "arithmatex" not in method
    assert (site / "files/examples/results/digits/figure.png").exists()


@pytest.mark.parametrize(
    ("markup", "complaint"),
    [
        ('<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ('<a href="#gone">x</a>', "#gone names no place there"),
        ('<a href="other.html#gone">x</a>', "other.html#gone names no place there"),
        ('<img src="other.html">', "has no description"),
        ('<script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
        ("<p>:class:`Name`</p>", "is markup"),
        (r"<p>$\max($</p>", "is markup"),
        ("<style>p { background: url(https://example.org/x.png) }</style>", None),
        ('<a href="other.html#place">x</a><code>$$</code>', None),
    ],
)
def test_problems_are_found(tmp_path, markup, complaint):
    (tmp_path / "index.html").write_text(markup)
    (tmp_path / "other.html").write_text('<p id="place">text</p>')
    found = problems(tmp_path)
    assert (not found) if complaint is None else any(complaint in each for each in found)


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_notebook(tmp_path):
    """In a real kernel, from the first cell to the last, but for the one that installs."""
    nbclient, nbformat = needed("nbclient"), needed("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    (install,) = [cell for cell in cells if "install" in cell.metadata.get("tags", [])]
    assert install.source.endswith('%pip install --quiet "..[demo]"')
    install.source = ""
    client = nbclient.NotebookClient(
        notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}, kernel_name="python3"
    )
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    shown = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in shown)
    before, after = map(float, re.findall(r"accuracy at the center: ([\d.]+)%", printed))
    assert min(before, after) > 90
    assert "exchanges=" in printed
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("worker_1" in output.get("data", {}).get("text/plain", "") for output in shown)


def test_security_says_how_strangers_are_treated():
    text = (ROOT / "SECURITY.md").read_text()
    assert f"A connection has {strangers.GREETING_TIMEOUT:g} s to greet" in text
    assert f"at most {strangers.MOST_STRANGERS} wait" in text


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_templates(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 0
    assert all(part["attributes"]["label"] for part in asked)


@pytest.mark.processes  # uname
def test_versions_can_be_told_as_the_template_asks(capsys):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    description = next(part for part in form["body"] if part.get("id") == "versions")["attributes"]["description"]
    command = re.search(r'python -c "(.*?)";', description, re.DOTALL)[1]
    exec(command)
    assert lightning_easgd.__version__ in capsys.readouterr().out


def test_the_messages_of_the_troubleshooting_exist():
    """What the page quotes is part of a text of this package or of Lightning's choice of a strategy."""
    sources = [*(ROOT / "lightning_easgd").rglob("*.py"), Path(accelerator_connector.__file__)]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    texts = [node.value for node in nodes if isinstance(node.value, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    quoted = [part.strip() for cell in cells for quote in re.findall(r'"([^"]+)"', cell) for part in quote.split("...")]
    assert len(quoted) > 10
    assert not [part for part in quoted if part != "communication" and not any(part in text for text in texts)]
