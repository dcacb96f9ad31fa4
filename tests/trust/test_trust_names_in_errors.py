"""An error names the class that was used: whatever input makes a ``DownpourStrategy`` raise, it names that class.

And the remedy is one of its own: no argument that it does not have, unless another class is named with it.
"""

import inspect
import os
import re
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import callbacks
from ranks import end_ranks
from test_trees import TREES
from torch import nn
from toys import Quadratic, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.timeout(120)

FOREIGN = set(inspect.signature(EASGDStrategy).parameters) - set(inspect.signature(DownpourStrategy).parameters)

ARGUMENTS = [
    {"tau": 0}, {"tau": 1.5}, {"tau": True}, {"tau": "4"},
    {"momentum": 0}, {"momentum": 1.0}, {"momentum": "0.9"}, {"momentum": True}, {"momentum": 0.9, "tau": 2},
    {"average": "mean"}, {"average": 0}, {"average": 1.5}, {"average": True},
    {"order": "any"}, {"on_worker_loss": "cry"}, {"worker_state": "attic"},
    {"timeout": 5}, {"timeout": timedelta(0)}, {"timeout": "soon"},
    {"alpha": 0.1}, {"mode": "async"}, {"taw": 1}, {"find_unused": True},
    {"ddp_comm_hook": print}, {"model_averaging_period": 4},
]  # fmt: skip

OF_EASGD = [
    {"delay": 1}, {"delay": -1}, {"delay": True}, {"pull_to": "x"}, {"beta": 2.5}, {"rho": -1}, {"alpha": 1, "rho": 1},
    {"center_rule": "x"}, {"outer_momentum": 1}, {"outer_nesterov": True}, {"wire_dtype": "fp8"}, {"mode": "x"},
    {"mode": "async", "devices_per_worker": 2}, {"mode": "async", "center_device": "cpu"}, {"on_nonfinite": "x"},
    {"fault_tolerance": "x"}, {"devices_per_worker": 0}, {"evaluate": "x"}, {"recalibrate_batchnorm": -1},
    {"data_parallel_size": 0}, {"tensor_parallel_size": "x"}, {"start_method": "x"}, {"parallelise_fn": 1},
]  # fmt: skip


def check(message: str) -> None:
    own = re.sub(r"EASGDStrategy\([^)]*\)", "", message)  # another class that is advised, with its own arguments
    assert "DownpourStrategy" in own, message
    assert "EASGDStrategy" not in own, message
    for name in FOREIGN:
        given = re.search(rf"DownpourStrategy\({name}=", own)  # the user's own mistake
        assert given or not re.search(rf"\b{name}=", own), message


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("given", [*ARGUMENTS, {"evaluate": "both"}], ids=str)
def test_bad_arguments(given, tree):
    with pytest.raises((TypeError, ValueError)) as caught:
        TREES[tree][0].DownpourStrategy(**given)
    check(str(caught.value))


def of_ones_own(tree, name):
    """A user's class, and a call of it with arguments."""
    cls = type("OfOnesOwn", (getattr(TREES[tree][0], name),), {})
    needed = inspect.signature(cls).parameters.keys() & {"parallelize_fn"}
    return cls, lambda **given: cls(**dict.fromkeys(needed, print) | given)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy"])
def test_bad_arguments_of_a_users_class(name, tree):
    """Kind: whatever is wrong, the error names the user's class, and no argument that it does not take."""
    cls, make = of_ones_own(tree, name)
    taken = inspect.signature(cls).parameters.keys() | {"strategy", "seconds"}  # of a Trainer, of a timedelta
    told = 0
    for given in [*ARGUMENTS, *OF_EASGD]:
        try:
            make(**given)
        except (TypeError, ValueError) as error:
            told += 1
            message = str(error)
            own = re.sub(r"EASGDStrategy\([^)]*\)", "", message)  # another class that is advised
            assert message.startswith("OfOnesOwn("), message
            assert not re.findall(r"\w+(?:Strategy|Method)\b", own), message
            assert set(re.findall(r"\b(\w+)=", own)) <= taken | given.keys(), message
    assert told > len(ARGUMENTS) / 2


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy"])
def test_a_call_that_does_not_fit(name, tree):
    """Kind: Python's own error would name a class that the user has not called."""
    cls, _ = of_ones_own(tree, name)
    with pytest.raises(TypeError, match=r"^OfOnesOwn\(\.\.\.\): too many positional arguments; see its docstring"):
        cls(*[None] * 6)


@pytest.mark.parametrize(
    "trainer",
    [
        {"sync_batchnorm": True},
        {"strategy": DownpourStrategy(parallel_devices=[torch.device("mps", 0)]), "accelerator": "auto"},
    ],
    ids=str,
)
def test_trainers(trainer):
    with pytest.raises(ValueError, match="Downpour") as caught:
        quiet_trainer(**({"strategy": DownpourStrategy(), "devices": 2} | trainer))
    check(str(caught.value))


def test_readings():
    strategy = DownpourStrategy()
    for read in (lambda: strategy.center, lambda: strategy.known_center):
        with pytest.raises(RuntimeError) as caught:
            read()
        check(str(caught.value))
    for read in (lambda: strategy.communication, strategy.elastic_distance):
        strategy._start_method = "fork"
        with pytest.raises(RuntimeError) as caught:
            read()
        check(str(caught.value))


class Shape(Quadratic):
    """Each rank has another model."""

    def configure_model(self) -> None:
        self.more = nn.Parameter(torch.zeros(1 + self.trainer.global_rank))


class Added(Quadratic):
    def on_train_batch_start(self, *_) -> None:
        if self.trainer.global_step == 2:
            self.late = nn.Parameter(torch.zeros(1))
            self.trainer.optimizers[0].add_param_group({"params": [self.late]})


class Sharded(Quadratic):
    def configure_optimizers(self):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)


class Adam(Quadratic):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Late(Quadratic):
    def on_train_batch_start(self, *_) -> None:
        self.trainer.strategy.optimizer_step(torch.optim.SGD(self.parameters(), lr=0.1), lambda: None)


class Raising(Quadratic):
    def on_train_batch_start(self, *_) -> None:
        if self.trainer.global_rank == 1 and self.trainer.global_step == 2:
            raise ValueError("DownpourStrategy has no part in it")


class Killed(Quadratic):
    def on_train_batch_start(self, *_) -> None:
        if self.trainer.global_rank == 1 and self.trainer.global_step == 2:
            os._exit(3)


class Finetuning(callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module) -> None: ...
    def finetune_function(self, *_) -> None: ...


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "arguments", "trainer"),
    [
        (Sharded, {}, {}),
        (Adam, {"momentum": 0.9}, {}),
        (Late, {}, {}),
        (Shape, {}, {}),
        (Added, {}, {}),
        (Raising, {"timeout": timedelta(seconds=10)}, {}),
        (Killed, {"timeout": timedelta(seconds=10)}, {}),
        (Quadratic, {}, {"callbacks": [Finetuning()]}),
    ],
    ids=lambda value: getattr(value, "__name__", ",".join(value) if isinstance(value, dict) else None),
)
def test_fits(module, arguments, trainer):
    def train():
        fitted(module(record=False, steps=40), DownpourStrategy(**arguments), 2, **trainer)

    errors = [outcome.error for outcome in end_ranks(train, 2) if outcome.error]
    assert errors
    for error in errors:
        last = error.strip().splitlines()[-1]
        check(last)


class OfOnesOwn(EASGDStrategy):
    pass


class Thawed(Quadratic):
    """What is frozen is written to, and trained from the third step on."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def on_train_batch_start(self, *_) -> None:
        if self.trainer.global_step == 2:
            self.frozen.data.add_(1)
            self.frozen.requires_grad_(True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "trainer"), [(Added, {}), (Thawed, {}), (Quadratic, {"callbacks": [Finetuning()]})],
    ids=["added", "thawed", "finetuning"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("strategy", "remedy"),
    [
        (lambda: OfOnesOwn(mode="async", tau=2), "OfOnesOwn(mode='sync')"),
        (lambda: DownpourStrategy(tau=2), "EASGDStrategy(mode='sync')"),
    ],
    ids=["easgd", "downpour"],
)
def test_what_a_served_center_cannot_have_a_class_that_can_has(module, trainer, strategy, remedy):
    """Kind: the remedy is the user's own class where that can, with its argument."""

    def train():
        fitted(module(record=False, steps=40), strategy(), 2, **trainer)

    errors = [outcome.error.strip().splitlines()[-1] for outcome in end_ranks(train, 2) if outcome.error]
    assert [error for error in errors if "a served center has" in error]
    for error in errors:
        if "a served center has" in error:
            assert f"se {remedy}" in error
            assert "EASGD" not in error.replace(remedy, "")
