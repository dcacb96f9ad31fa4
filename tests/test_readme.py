"""Every code block of README.md and docs/ is executed or compared with what it describes; one without a rule fails.

The Python blocks of a page are one script, and what stands on several pages is executed once.
"""

import contextlib
import inspect
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from application import ROOT
from preloaded import python, python_of_torch
from ranks import free_port
from test_configs import FROM_TRAINER
from test_packaging import PROJECT, sources

from lightning_easgd import EASGDStrategy
from lightning_easgd.lab import plots, report
from lightning_easgd.lab.simulation import simulate_command
from lightning_easgd.lab.stability import stability_command
from lightning_easgd.method.elastic import elastic_pull_, elastic_push_

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What README.md repeats is executed where it stands at length.
DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
RESULTS = ROOT / "examples" / "results" / "digits"

# What README's Python blocks take for granted, and a trainer that is cheap whatever a block asks for.
PREAMBLE = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)
    def forward(self, inputs):
        return self.net(inputs)
    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, index):
        self(batch[0])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(L.LightningDataModule):
    def loader(self):
        return DataLoader(TensorDataset(torch.randn(384, 4), torch.randint(3, (384,))), batch_size=8)
    train_dataloader = val_dataloader = test_dataloader = loader

original, made = L.Trainer, []
def cheap(**arguments):
    changed = dict(accelerator="cpu", devices=1 if arguments.get("num_nodes", 1) > 1 else 2, logger=False,
                   enable_progress_bar=False, enable_checkpointing=False)
    made.append(original(**({"max_epochs": 1} | arguments | changed)))
    return made[-1]
L.Trainer = cheap
model, data = Model(), Data()
"""
EPILOGUE = """
assert type(made[-1].strategy).__module__.startswith("lightning_easgd.")
assert made[-1].strategy.communication.exchanges > 0
if made[-1].is_global_zero:
    print(f"trained {made[-1].global_step}")
"""
CHEAP = ("trainer.devices=2", "trainer.limit_train_batches=20", "callbacks.progress_bar.refresh_rate=0", "plot=false")
SUBSTITUTIONS = {"trainer.max_epochs=60": "trainer.max_epochs=2", "strategy.tau=4,16": "strategy.tau=4"}


class Block(NamedTuple):
    document: Path
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        return self.text.replace("\\\n", " ").splitlines()

    @property
    def name(self) -> str:
        return f"{self.document.stem}_{self.line}_{self.language}"


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(document, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def cases() -> list[Block]:
    """What is to be executed: the blocks, without what is repeated."""
    chosen: list[Block] = []
    seen: set[tuple[str, str]] = set()
    for document in DOCUMENTS:
        scripts = []
        for block in blocks(document):
            parts = block.commands if block.language == "console" else [block.text]
            new = {(block.language, part) for part in parts} - seen
            seen |= new
            if not new:
                continue
            if block.language != "python":
                chosen.append(block)
            elif "num_nodes=" not in block.text:  # else it is the script of a torchrun command
                scripts.append(block.text + (EPILOGUE if ".fit(" in block.text else ""))
        if scripts:
            chosen.append(Block(document, 0, "python", "\n".join(scripts)))
    return chosen


def run(arguments: list[str], cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    # A `make test` around this would hand its own settings on to a make in here.
    environment = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS")
    }
    done = subprocess.run(
        arguments, cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


# Languages


def run_script(block: Block, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(PREAMBLE + block.text)
    done = run([python(), str(script)], folder)
    assert done.stdout.count("trained ") == block.text.count("trained")


def run_alone(text: str, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(PREAMBLE + text + EPILOGUE)
    # Another interpreter: in the usual one the names are there without the import.
    assert "trained 24" in run([python_of_torch(), str(script)], folder).stdout


def check_diff(block: Block, folder: Path) -> None:
    lines = block.text.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    compile("\n".join(before), "before", "exec")
    run_alone("\n".join(after), folder)
    without_import = "\n".join(line for line in after if "import lightning_easgd" not in line)
    with pytest.raises(AssertionError, match="invalid strategy name"):
        run_alone(without_import, folder)


def check_console(block: Block, folder: Path) -> None:
    for command in block.commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program in PROGRAMS, f"no rule for the command {program!r} in tests/test_readme.py"
        if program == "torchrun":
            arguments.append(next(each.text for each in blocks(block.document) if "num_nodes=" in each.text))
        PROGRAMS[program]([SUBSTITUTIONS.get(argument, argument) for argument in arguments], folder)


def check_update_rule(block: Block, folder: Path) -> None:
    if "┌" in block.text:  # a drawing
        assert max(map(len, block.text.splitlines())) <= 125
        return
    assert block.text == "worker i:  xᵢ ← xᵢ − η gᵢ(xᵢ) − α (xᵢ − x̃)\ncenter:    x̃  ← x̃ + (β / p) Σᵢ (xᵢ − x̃)\n"
    alpha, beta, p, step = 0.3, 0.8, 3, 0.01
    workers, center = torch.tensor([1.0, -2.0, 4.0]), torch.tensor(0.5)
    moved, difference = (workers - step).clone(), workers - center
    elastic_pull_([moved], [difference], alpha)
    pushed = center.clone()
    elastic_push_([pushed], [difference.sum()], beta / p)
    torch.testing.assert_close(moved, workers - step - alpha * (workers - center))
    torch.testing.assert_close(pushed, center + (beta / p) * (workers - center).sum())


def check_output(block: Block, folder: Path) -> None:
    """It is what the command before it prints, of a training what its files say."""
    before = [each for each in blocks(block.document) if each.line < block.line and each.language == "console"][-1]
    program, *arguments = shlex.split(before.text)
    if program == "easgd-stability":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert stability_command.run(arguments) == 0
        assert block.text == printed.getvalue()
    else:
        assert program == "make"
        assert block.text == report.render(RESULTS) + "\n"


def check_shell(block: Block, folder: Path) -> None:
    """Bash reads it, and it sets what a worker reads."""
    run(["bash", "-n", "-c", block.text], folder)
    assert set(re.findall(r"([A-Z_]+)=", block.text)) <= {"TORCHFT_LIGHTHOUSE", "REPLICA_GROUP_ID"}


def check_job(block: Block, folder: Path) -> None:
    """A job of Kubernetes' whose pods are told apart by their index, and set what a worker reads."""
    job = yaml.safe_load(block.text)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    assert "REPLICA_GROUP_ID=$JOB_COMPLETION_INDEX" in container["command"][-1]
    assert [variable["name"] for variable in container["env"]] == ["TORCHFT_LIGHTHOUSE"]


LANGUAGES = {
    "python": run_script,
    "bash": check_shell,
    "yaml": check_job,
    "diff": check_diff,
    "console": check_console,
    "text": check_update_rule,
    "output": check_output,
}


# Programs of the console blocks


def run_train(arguments: list[str], folder: Path) -> None:
    epochs = [] if "max_epochs" in "".join(arguments) else ["trainer.max_epochs=1"]
    before = set(folder.rglob("time.csv"))
    done = run([python(), "-m", "lightning_easgd.lab.train", *arguments, *CHEAP, *epochs], folder)
    runs = {path for path in folder.rglob("time.csv") if "earlier" not in path.parts} - before
    jobs = len(re.findall(r"\[HYDRA\] \t#", done.stdout)) or 1
    assert len(runs) == jobs == done.stdout.count("run directory")


def run_evaluate(arguments: list[str], folder: Path) -> None:
    assert "test/accuracy" in run([python(), "-m", "lightning_easgd.lab.evaluate", *arguments], folder).stdout


RECIPES = {
    "test": ("ruff check", "mypy", "pytest"),
    "test-fast": ("pytest -m 'not processes'",),
    "lint": ("ruff check", "mypy"),
    "docs": ("mkdocs build",),
}


def run_make(arguments: list[str], folder: Path) -> None:
    """The recipe of the target is what is said of it; the training command is run, at less expense."""
    recipe = run(["make", "--dry-run", *arguments], ROOT).stdout.splitlines()
    if arguments[0] in RECIPES:
        assert all(any(part in line for line in recipe) for part in RECIPES[arguments[0]])
        return
    program, *options = shlex.split(recipe[-1])
    assert Path(program).name == "easgd-train"
    run_train(options, folder)


def run_python(arguments: list[str], folder: Path) -> None:
    if arguments[0] == "-m":
        assert arguments[1] == "lightning_easgd.lab.train"
        run_train(arguments[2:], folder)
        return
    script, *options = arguments
    expected = SCRIPTS[script]
    done = run([python(), str(ROOT / script), *options, *expected.cheap], folder)
    assert re.search(expected.output, done.stdout), done.stdout


def run_torchrun(arguments: list[str], folder: Path) -> None:
    """Both nodes are this one, with one rank each."""
    *options, name, text = arguments
    (folder / name).write_text(PREAMBLE + text + EPILOGUE)
    endpoint = f"127.0.0.1:{free_port()}"
    changed = [
        option.partition("=")[0] + {"--nproc-per-node": "=1", "--rdzv-endpoint": f"={endpoint}"}.get(
            option.partition("=")[0], "=" + option.partition("=")[2]
        )
        for option in options
    ]  # fmt: skip
    command = [python(), "-m", "torch.distributed.run", *changed, "--rdzv-id=docs", name]
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(run, command, folder) for _ in range(2)]
        assert sum("trained 24" in node.result().stdout for node in nodes) == 1


def run_simulate(arguments: list[str], folder: Path) -> None:
    cheap = ("workers=2", "tau=10", "lr=0.1", "steps=50", "target=0.5")
    with contextlib.chdir(folder):
        assert simulate_command.run([*arguments, *cheap]) == 0
    assert any(folder.rglob("*.png"))


def run_stability(arguments: list[str], folder: Path) -> None:
    with contextlib.chdir(folder):
        assert stability_command.run([*arguments, *(["points=12"] if arguments[0] == "draw" else [])]) == 0


def run_pip(arguments: list[str], folder: Path) -> None:
    """What would be installed; that the wheel works is shown in test_packaging."""
    install, target = arguments
    path, extras = re.fullmatch(r"(\.)(?:\[(.*)\])?", target).groups()
    assert (install, path) == ("install", ".")
    assert set(filter(None, (extras or "").split(","))) <= set(PROJECT["project"]["optional-dependencies"])
    clone = folder / "clone"
    clone.mkdir()
    options = ("--dry-run", "--no-deps", "--no-build-isolation", "--ignore-installed")
    done = run([sys.executable, "-m", "pip", "install", *options, target], sources(clone))
    assert "Would install lightning_easgd" in done.stdout


def run_lighthouse(arguments: list[str], folder: Path) -> None:
    """It has these options; tests/test_membership.py has one running."""
    known = run([str(Path(sys.executable).with_name("torchft_lighthouse")), "--help"], folder).stdout
    named = re.findall(r"torchft_lighthouse (--\w+)", (ROOT / "docs" / "preemptible.md").read_text(encoding="utf-8"))
    assert {argument for argument in (*arguments, *named) if argument.startswith("--")} <= set(known.split())


PROGRAMS = {
    "torchft_lighthouse": run_lighthouse,
    "easgd-train": run_train,
    "easgd-evaluate": run_evaluate,
    "easgd-simulate": run_simulate,
    "easgd-stability": run_stability,
    "make": run_make,
    "torchrun": run_torchrun,
    "python": run_python,
    "pip": run_pip,
}


class Script(NamedTuple):
    cheap: tuple[str, ...]
    output: str


SCRIPTS = {
    "examples/quickstart.py": Script((), r"accuracy at the center: 9\d\.\d%\n45 exchanges in 460 steps"),
    "examples/existing_project.py": Script((), r"(ddp|easgd): test accuracy 9\d\.\d%"),
    "examples/fabric_loop.py": Script((), r"accuracy at the end: 9\d\.\d%"),
    "examples/cli.py": Script(
        ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_epochs", "1"), r"val/accuracy"
    ),
    "examples/benchmarks/run.py": Script(
        ("--parameters", "5000", "--rounds", "1", "--steps", "10", "--methods", "local", "easgd", "ddp"),
        r"parameters +method +ms_per_step +ratio",
    ),
    "examples/benchmarks/data_loading.py": Script(
        ("--images", "600", "--files", "8", "--rounds", "1"), r"batched +\d+ images/s"
    ),
}


@pytest.mark.processes
@pytest.mark.timeout(500)
@pytest.mark.parametrize("block", cases(), ids=lambda block: block.name)
def test_block(block, tmp_path):
    assert block.language in LANGUAGES, f"no rule for {block.language!r} blocks in tests/test_readme.py"
    LANGUAGES[block.language](block, tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_no_fence_escapes(document):
    assert document.read_text(encoding="utf-8").count("```") == 2 * len(blocks(document))


def test_readme_is_short():
    assert README.count("\n") <= 150
    first_screen = README.partition("## ")[0]
    for part in ("pip install .", "```diff", "worker i:", "figure.png", "make train"):
        assert part in first_screen, part
    assert len(re.findall(r"!\[[^\]]*\]\(docs/badges/", README)) <= 4


def test_arguments_are_those_of_the_strategy():
    named = inspect.signature(EASGDStrategy.__init__).parameters.values()
    signature = {p.name: p.default for p in named if p.kind == p.KEYWORD_ONLY and p.name not in FROM_TRAINER}
    page = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    rows = page.partition("| argument of `EASGDStrategy` |")[2].partition("\n\n")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", rows, re.MULTILINE))
    assert table.pop("timeout") == f"{signature.pop('timeout').total_seconds() / 60:.0f} minutes"
    assert table == {name: f"`{default!r}`" for name, default in signature.items()}


def test_citation_is_that_of_the_citation_file():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
    citation = f"{authors}. *{paper['title']}*. {paper['collection-title']} {paper['volume']}, {paper['year']}."
    assert citation in " ".join(README.split())


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert "LICENSE" in targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_targets_exist():
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    targets = set(re.findall(r"`make ([\w-]+)", text)) | set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE))
    assert {"train", "test", "docs"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_recorded_run_names_no_place_of_this_machine():
    files = {path for path in RESULTS.rglob("*") if path.suffix in (".csv", ".yaml", ".txt")}
    assert {"config.yaml", "versions.txt", "accuracy.csv", "time.csv"} <= {path.name for path in files}
    for path in files:
        assert not re.search(r"(^|[\s'\"=:])/\w", path.read_text(), re.MULTILINE), path


def test_the_figure_can_be_drawn_from_the_recorded_files(tmp_path):
    copy = shutil.copytree(RESULTS, tmp_path / "digits", ignore=shutil.ignore_patterns("*.png", "checkpoints"))
    assert plots.draw(copy).stat().st_size > 10_000
