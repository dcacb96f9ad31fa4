"""The commands that stand beside recorded results: they took hours, and here each is understood by its own parser.

The pages are part of the documentation's site. A simulation is made, at less expense.
"""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from application import ROOT, composed

from lightning_easgd.lab.simulation import simulate_command

BENCHMARKS = ROOT / "examples" / "benchmarks"
PAGES = sorted((ROOT / "examples").rglob("README.md"))


def commands():
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield from block.splitlines()


class Understood(Exception):
    """Takes the place of what a command would do."""


def parse_benchmark(words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, arguments=None, namespace=None):
        parse(parser, arguments, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    script, *options = words
    assert (ROOT / script).exists()
    name = options.pop(0) if Path(script).name == "run.py" else Path(script).stem
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(Understood):
        importlib.import_module(name).main()


def compose_comparison(words, tmp_path, monkeypatch):
    assert composed(tmp_path, *words, name="compare").grid.methods


def simulate(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert simulate_command.run([*words, "workers=2", "tau=10", "lr=0.1", "steps=50", "target=0.8"]) == 0


def dry_run(words, tmp_path, monkeypatch):
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


PROGRAMS = {
    "python": parse_benchmark,
    "easgd-compare": compose_comparison,
    "easgd-simulate": simulate,
    "easgd-stability": None,  # tests/test_stability.py compares its page with what is printed
    "make": dry_run,
}


@pytest.mark.processes
@pytest.mark.parametrize("command", list(commands()))
def test_command_is_understood(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        del words[0]  # a variable
    assert words[0] in PROGRAMS, f"no rule for {words[0]!r} in tests/test_recorded_commands.py"
    if PROGRAMS[words[0]] is not None:
        PROGRAMS[words[0]](words[1:], tmp_path, monkeypatch)


def test_an_unknown_option_is_not_understood(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse_benchmark(["examples/benchmarks/run.py", "step_cost", "--no-such-option", "1"], tmp_path, monkeypatch)
