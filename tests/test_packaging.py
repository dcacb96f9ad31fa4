"""What is shipped: all packages, all configurations, and a wheel that works without the clone."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from application import CONF, ROOT, only_run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lightning_easgd

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


QUIETLY = ("--quiet", "--no-deps", "--no-build-isolation")


def test_every_package_is_listed():
    folders = {path.parent for path in (ROOT / "lightning_easgd").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"lightning_easgd.conf"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_configurations_are_found_through_the_package():
    shipped = files("lightning_easgd.conf")
    for path in CONF.rglob("*.yaml"):
        assert shipped.joinpath(*path.relative_to(CONF).parts).is_file(), path


def test_citation_and_changelog_agree_with_the_version():
    """The version stands in one place; what repeats it is compared, and so is the date of the release."""
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lightning_easgd.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_easgd.__version__
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == [
        "Zhang", "Choromanska", "LeCun",
    ]  # fmt: skip
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [Unreleased]\n\n## [{lightning_easgd.__version__}] - {citation['date-released']}\n" in changes


def test_the_metadata_say_what_is_tested():
    project = PROJECT["project"]
    supported = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = {entry["python"] for entry in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]}
    assert min(supported, key=lambda version: int(version[2:])) == project["requires-python"].removeprefix(">=")
    assert supported <= tested
    commands = [step.get("run", "") for step in workflow["jobs"]["package"]["steps"]]
    assert "python -m build" in commands
    assert "python -m twine check --strict dist/*" in commands
    assert {"urls", "keywords", "license", "authors", "readme", "description"} <= project.keys()


@pytest.mark.parametrize("name", ["python", "lightning", "licence"])
def test_badges_are_true(name):
    project = PROJECT["project"]
    supported = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    lightning = next(line for line in project["dependencies"] if line.startswith("lightning>="))
    facts = {
        "python": ("Python", f"{supported[0]} to {supported[-1]}"),
        "lightning": ("Lightning", f"{re.match(r'lightning>=([0-9.]+)', lightning)[1]} and later"),
        "licence": ("licence", project["license"]),
    }
    picture = (ROOT / "docs" / "badges" / f"{name}.svg").read_text()
    assert tuple(re.findall(r"<text[^>]*>([^<]*)</text>", picture)) == facts[name]
    assert f"![{' '.join(facts[name])}](docs/badges/{name}.svg)" in (ROOT / "README.md").read_text()


def test_makefile_names_the_problem_with_an_old_python(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", f"PYTHON={old}", "train"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert "older than Python 3.11" in done.stderr


def test_ci_script_is_executable_and_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def sources(folder: Path) -> Path:
    """A copy of what is built: setuptools leaves files behind, and old ones would get into the wheel."""
    for name in ("lightning_easgd", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def run(*arguments: object, cwd: Path) -> str:
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd, env=outside | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def link_requirements(of: Distribution, extra: str, into: Path) -> None:
    """Link what a package and one of its extras declare, and no more, into a folder of packages; and so on from each.

    It stands for pip, which would copy a gigabyte out of the network for it.
    """
    pending, linked = [(of, {"", extra})], set()
    while pending:
        package, extras = pending.pop()
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": each}) for each in extras):
                continue
            if (key := (canonicalize_name(requirement.name), *sorted(requirement.extras))) in linked:
                continue
            linked.add(key)
            found = distribution(requirement.name)
            for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (into / name).exists():
                    (into / name).symlink_to(found.locate_file(name))
            pending.append((found, {"", *requirement.extras}))


@pytest.mark.timeout(300)
def test_wheel_works_outside_the_clone(tmp_path):
    (tmp_path / "sources").mkdir()
    build = ("-m", "build", "--no-isolation", "--outdir", tmp_path)
    run(sys.executable, *build, sources(tmp_path / "sources"), cwd=tmp_path)
    (wheel,) = tmp_path.glob(f"lightning_easgd-{lightning_easgd.__version__}-py3-none-any.whl")
    (archive,) = tmp_path.glob(f"lightning_easgd-{lightning_easgd.__version__}.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive, cwd=tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    configurations = {f"lightning_easgd/conf/{path.relative_to(CONF).as_posix()}" for path in CONF.rglob("*.yaml")}
    assert names >= configurations | {"lightning_easgd/py.typed"}
    assert not any(name.startswith(("conf/", "tests/")) for name in names)
    # The wheel was made from the source distribution; the archive of a clone on a hosting site gives the same package.
    (tmp_path / "clone").mkdir()
    of_clone = shutil.make_archive(str(tmp_path / "clone-main"), "zip", sources(tmp_path / "clone"))
    run(sys.executable, "-m", "pip", "wheel", *QUIETLY, "--wheel-dir", tmp_path / "of_clone", of_clone, cwd=ROOT)
    (other,) = (tmp_path / "of_clone").glob("*.whl")
    assert names_in(other) == names_in(wheel)

    venv.create(tmp_path / "venv", symlinks=True)
    scripts = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python")
    run(*pip, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (metadata,) = packages.glob("lightning_easgd-*.dist-info")
    link_requirements(Distribution.at(metadata), "demo", packages)
    run(*pip, "check", cwd=tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    # Inside a clone its package shadows the installed one.
    shown = run(scripts / "python", "-m", "lightning_easgd.train", "--cfg", "job", cwd=tmp_path / "sources")
    assert "DigitsDataModule" in shown
    run(scripts / "easgd-train", "experiment=digits_quick", "strategy.start_method=fork", cwd=work)
    checkpoint = only_run(work) / "checkpoints" / "last.ckpt"
    assert (only_run(work) / "figure.png").exists()
    assert "test/accuracy" in run(scripts / "easgd-evaluate", f"ckpt_path={checkpoint}", cwd=work)
