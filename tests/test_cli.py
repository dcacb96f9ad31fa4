"""LightningCLI: arguments of the strategies on the command line, in YAML, and in the help."""

import inspect
import re
from datetime import timedelta

import lightning.pytorch.cli
import pytest
import pytorch_lightning.cli
import yaml
from test_trees import Quadratic as OtherQuadratic
from toys import Quadratic

import lightning_easgd
import lightning_easgd.pl
from lightning_easgd.method.schedules import ExponentialSchedule

pytestmark = [
    pytest.mark.timeout(60),
    # LightningCLI itself uses what newer releases of jsonargparse deprecate.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

STRATEGIES = ["EASGDStrategy", "DownpourStrategy", "LocalStrategy"]


@pytest.fixture
def parsed(monkeypatch):
    """What LightningCLI makes of a command line."""

    def parse(*arguments: str, cli=lightning.pytorch.cli.LightningCLI, model=Quadratic):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        return cli(
            model,
            run=False,
            seed_everything_default=False,
            trainer_defaults={"accelerator": "cpu", "devices": 2, "logger": False},
        )

    return parse


EVERYTHING = {
    "tau": 16,
    "beta": 0.8,
    "alpha": 0.1,
    "mode": "async",
    "order": "round_robin",
    "on_worker_loss": "continue",
    "momentum": 0.95,
    "evaluate": "worker",
    "start_method": "spawn",
    "timeout": "0:01:30",
}


def test_nested_arguments(parsed):
    nested = [f"--trainer.strategy.{name}={value}" for name, value in EVERYTHING.items()]
    strategy = parsed("--trainer.strategy", "lightning_easgd.EASGDStrategy", *nested).trainer.strategy
    check(strategy)


def check(strategy):
    assert type(strategy) is lightning_easgd.EASGDStrategy
    assert (strategy.tau, strategy.rates.beta, strategy.rates.alpha, strategy.momentum) == (16, 0.8, 0.1, 0.95)
    assert (strategy.mode, strategy.order, strategy.on_worker_loss) == ("async", "round_robin", "continue")
    assert strategy.evaluate == "worker"
    assert strategy._timeout == timedelta(seconds=90)
    assert strategy._start_method == "spawn"


def test_yaml(tmp_path, parsed):
    file = tmp_path / "run.yaml"
    strategy = {"class_path": "lightning_easgd.EASGDStrategy", "init_args": EVERYTHING}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    check(parsed("--config", str(file)).trainer.strategy)
    changed = parsed("--config", str(file), "--trainer.strategy.init_args.tau", "3").trainer.strategy
    assert changed.tau == 3
    assert changed.momentum == 0.95


def test_a_schedule_is_a_class_of_its_own(parsed):
    chosen = ["--trainer.strategy.rho", "lightning_easgd.method.schedules.ExponentialSchedule"]
    values = [f"--trainer.strategy.rho.{name}={value}" for name, value in (("start", 0.1), ("end", 2), ("steps", 50))]
    strategy = parsed("--trainer.strategy", "lightning_easgd.EASGDStrategy", *chosen, *values).trainer.strategy
    assert strategy.rates.rho == ExponentialSchedule(0.1, 2.0, 50)


@pytest.mark.parametrize(("name", "mode"), [("easgd", "sync"), ("easgd_async_fork", "async")])
def test_names(name, mode, parsed):
    assert parsed("--trainer.strategy", name).trainer.strategy.mode == mode


@pytest.mark.parametrize("name", STRATEGIES)
def test_printed_configuration_has_every_argument_and_is_read_again(name, tmp_path, capsys, parsed):
    with pytest.raises(SystemExit) as end:
        parsed("--trainer.strategy.class_path", f"lightning_easgd.{name}", "--print_config")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    strategy = yaml.safe_load(printed)["trainer"]["strategy"]
    assert strategy["class_path"] == f"lightning_easgd.{name}"
    assert set(strategy["init_args"]) == set(arguments(name))
    (tmp_path / "printed.yaml").write_text(printed)
    assert type(parsed("--config", str(tmp_path / "printed.yaml")).trainer.strategy).__name__ == name


def arguments(name: str) -> list[str]:
    parameters = inspect.signature(getattr(lightning_easgd, name)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", STRATEGIES)
def test_help_explains_every_argument(name, capsys, monkeypatch, parsed):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        parsed("--trainer.strategy.help", f"lightning_easgd.{name}")
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for argument in arguments(name):
        entries = [
            number for number, line in enumerate(lines) if re.match(rf"  --trainer\.strategy\.{argument}[ ,]", line)
        ]
        text = " ".join(lines[entries[-1] : entries[-1] + 2]).split("(type:")[0]
        assert len(text.split()) >= 4, text  # name, placeholder and words


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["lightning_easgd.EASGDStrategy", "--trainer.strategy.tua", "4"], "tua"),
        (["lightning_easgd.EASGDStrategy", "--trainer.strategy.tau", "4.5"], "tau"),
        (["lightning_easgd.EASGDStrategy", "--trainer.strategy.timeout", "soon"], "timeout"),
        (["lightning_easgd.EASGDStrategy", "--trainer.strategy.mode", "asink"], "asink"),
        (["easgd", "--trainer.strategy.tau", "4"], "strategy"),
    ],
)
def test_what_is_wrong_is_refused(given, complaint, capsys, parsed):
    with pytest.raises(SystemExit) as end:
        parsed("--trainer.strategy", *given)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_other_tree(parsed):
    given = ("--trainer.strategy", "lightning_easgd.pl.EASGDStrategy", "--trainer.strategy.tau", "16")
    strategy = parsed(*given, cli=pytorch_lightning.cli.LightningCLI, model=OtherQuadratic).trainer.strategy
    assert type(strategy) is lightning_easgd.pl.EASGDStrategy
    assert strategy.tau == 16


def test_a_class_of_another_tree_is_refused(parsed):
    message = r"(?i)lightning_easgd\.pl\.EASGDStrategy.*must be .* `lightning\.pytorch\.strategies\.Strategy`"
    with pytest.raises(ValueError, match=message):
        parsed("--trainer.strategy", "lightning_easgd.pl.EASGDStrategy")
