"""Every method of the paper, as its configuration makes it: step by step, and at the variable that is evaluated."""

import numpy as np
import pytest
import torch
from application import CONF, composed, options
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import OmegaConf
from ranks import run_ranks
from reference import synchronous_trace
from test_asynchronous import DOWNPOUR, Rows
from test_configs import FROM_TRAINER, keyword_arguments
from test_elastic import ASYNCHRONOUS, ASYNCHRONOUS_MOMENTUM, SYNCHRONOUS
from toys import MINIMA, Quadratic, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy
from lightning_easgd.lab.building import build_strategy, build_trainer
from lightning_easgd.lab.recorders import IterateAverage

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")]
LR = 0.1
PAPER = {
    "easgd", "easgd_async", "eamsgd", "eamsgd_async", "downpour", "mdownpour", "adownpour", "mvadownpour",
    "sgd", "msgd", "asgd", "mvasgd",
}  # fmt: skip


def test_every_method_of_the_paper_is_there():
    assert set(options("method")) == PAPER | {"ddp", "post_local_sgd", "local", "replicated_sgd", "local_sgd", "diloco"}


@pytest.mark.parametrize("method", options("method"))
def test_every_method_instantiates(tmp_path, method):
    trainer = build_trainer(composed(tmp_path, f"method={method}", "callbacks=compare"))
    assert trainer.world_size == (1 if method in ("sgd", "msgd", "asgd", "mvasgd") else 4)
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    assert ("IterateAverage" in kinds) == (method in ("asgd", "mvasgd"))
    if "IterateAverage" in kinds:
        assert kinds.index("IterateAverage") < kinds.index("LearningCurve")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("adownpour", {"average": "polyak", "momentum": None}),
        ("mvadownpour", {"average": 0.001, "momentum": None}),
        ("mdownpour", {"average": None, "momentum": 0.9, "tau": 1}),
        ("easgd_async", {"mode": "async", "momentum": None}),
        ("eamsgd", {"mode": "sync", "momentum": 0.9}),
    ],
)
def test_settings_of_the_strategies(tmp_path, method, settings):
    strategy = build_strategy(composed(tmp_path, f"method={method}").strategy)
    assert {name: getattr(strategy, name) for name in settings} == settings


def test_post_local_sgd_yaml_has_every_argument():
    keys = set(OmegaConf.load(CONF / "strategy" / "post_local_sgd.yaml")) - {"_target_"}
    assert keys == keyword_arguments(PostLocalSGDStrategy.__init__) - FROM_TRAINER


# Through the Trainer, with strategy and optimizer of the configuration


class Optimized:
    """Takes the optimizer of a configuration."""

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Local(Optimized, Quadratic):
    """Records x after each step."""

    def on_train_batch_end(self, *_):
        self.trace.append(self.position())


class InTurn(Optimized, Rows):
    pass


class Centered(Optimized, Quadratic):
    pass


def train(tmp_path, module, method: str, ranks: int, *overrides: str, callbacks=(), **trainer):
    """Trains as `easgd-train method=...` would; returns what each rank has recorded, and x in the end."""
    config = composed(tmp_path, f"method={method}", f"optimizer.lr={LR}", *overrides)

    def fit():
        module.make_optimizer = instantiate(config.optimizer)
        fitted(module, build_strategy(config.strategy), ranks, callbacks=list(callbacks), **trainer)
        return module.trace, module.x.item()

    return run_ranks(fit, ranks)


def rows_of(results) -> np.ndarray:
    """(x_1, x_2, center) after each step."""
    first, second = (np.array(trace) for trace, _ in results)
    return np.column_stack([first[:, 0], second[:, 0], second[:, 1]])


@pytest.mark.parametrize(
    ("method", "module", "overrides", "expected"),
    [
        ("easgd", Centered, ["strategy.tau=1", "strategy.alpha=0.2"], SYNCHRONOUS),
        ("eamsgd", Centered, ["strategy.tau=2", "strategy.alpha=0.15"],
         synchronous_trace(2, 6, 2, 0.15, 0.3, delta=0.9)),
        ("easgd_async", InTurn, ["strategy.tau=2", "strategy.alpha=0.2", "strategy.order=round_robin"], ASYNCHRONOUS),
        ("eamsgd_async", InTurn, ["strategy.tau=2", "strategy.alpha=0.2", "strategy.order=round_robin"],
         ASYNCHRONOUS_MOMENTUM),
        ("downpour", InTurn, ["strategy.tau=2", "strategy.order=round_robin"], DOWNPOUR),
    ],
    ids=["easgd", "eamsgd", "easgd_async", "eamsgd_async", "downpour"],
)  # fmt: skip
def test_methods_with_a_center_follow_the_golden_traces(tmp_path, method, module, overrides, expected):
    results = train(tmp_path, module(), method, 2, *overrides)
    assert rows_of(results) == pytest.approx(np.array(expected), abs=3e-6)
    assert {x for _, x in results} == {results[0][0][-1][1]}, "after fit the module is the center"


def iterates(steps: int, momentum: float = 0.0) -> list[float]:
    """x_0, x_1, … of SGD with Nesterov's momentum on ½(x - 1)² + x, whose minimum is 0: x_0 is 1."""
    x, v, found = 1.0, 0.0, [1.0]
    for _ in range(steps):
        v = momentum * v - LR * (x + momentum * v - MINIMUM)
        x += v
        found.append(x)
    return found


def averages(found, rate) -> list[float]:
    z = [found[0]]
    for t, x in enumerate(found[1:], start=1):
        a = 1 / (t + 1) if rate == "polyak" else rate
        z.append((1 - a) * z[-1] + a * x)
    return z


MINIMUM = -2.0


class Alone(Local):
    """One worker on ½(x + 2)²; what validation sees is recorded."""

    def __init__(self, steps: int = 6) -> None:
        super().__init__(steps=steps)
        self.validated = []

    def training_step(self, batch, index):
        return 0.5 * (self.x - MINIMUM).square().sum()

    def validation_step(self, batch, index):
        self.validated.append(self.x.item())

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1))


@pytest.mark.parametrize(
    ("method", "centers"),
    [
        # The last step's update is not sent any more; with momentum at the center x̃ is the look-ahead point.
        ("downpour", iterates(5)),
        ("adownpour", averages(iterates(5), "polyak")),
        ("mvadownpour", averages(iterates(5), 0.001)),
    ],
)
def test_one_worker_of_the_downpour_family(tmp_path, method, centers):
    ((_, x),) = train(tmp_path, Alone(), method, 1)
    assert x == pytest.approx(centers[-1], abs=1e-6)


def test_one_worker_of_mdownpour(tmp_path):
    x, v = 1.0, 0.0
    for _ in range(5):
        u = -LR * (x - MINIMUM)
        v = 0.9 * v + u
        x += 0.9 * v + u
    ((_, found),) = train(tmp_path, Alone(), "mdownpour", 1)
    assert found == pytest.approx(x, abs=1e-6)


def sequential(tmp_path, method: str, module=None, **trainer):
    """Fits in this process, with callbacks of the configuration."""
    config = composed(tmp_path, f"method={method}", f"optimizer.lr={LR}", "callbacks=none")
    module = module or Alone()
    module.make_optimizer = instantiate(config.optimizer)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    assert build_strategy(config.strategy) == "auto"
    ckpt_path = trainer.pop("ckpt_path", None)
    callbacks += trainer.pop("callbacks", [])
    fit = quiet_trainer(devices=1, callbacks=callbacks, num_sanity_val_steps=0, **trainer)
    fit.fit(module, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("method", "momentum"), [("sgd", 0.0), ("msgd", 0.9)])
def test_sequential_methods(tmp_path, method, momentum):
    module = sequential(tmp_path, method, val_check_interval=2)
    assert module.trace == pytest.approx(iterates(6, momentum)[1:], abs=1e-6)
    if momentum == 0.0:
        assert module.validated == pytest.approx(iterates(6)[2::2], abs=1e-6)


@pytest.mark.parametrize(("method", "rate"), [("asgd", "polyak"), ("mvasgd", 0.001)])
def test_the_average_of_the_iterates_is_what_is_evaluated(tmp_path, method, rate):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    at_end = EndSeen()
    module = sequential(tmp_path, method, val_check_interval=2, callbacks=[at_end, saver], enable_checkpointing=True)
    found = iterates(6)
    z = averages(found, rate)
    assert module.trace == pytest.approx(found[1:], abs=1e-6), "training goes on from x, not from z"
    assert module.validated == pytest.approx(z[2::2], abs=1e-6)
    assert module.x.item() == pytest.approx(z[-1], abs=1e-6)
    assert at_end.x == pytest.approx(z[-1], abs=1e-6), "callbacks that evaluate at the end see z"
    for step in range(1, 7):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert checkpoint["state_dict"]["x"].item() == pytest.approx(z[step], abs=1e-6)


class EndSeen(Callback):
    def on_train_end(self, trainer, module):
        self.x = module.x.item()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_average_goes_on(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    sequential(tmp_path, "asgd", Alone(3), callbacks=[saver], enable_checkpointing=True)
    resumed = sequential(tmp_path, "asgd", Alone(3), max_epochs=2, ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.trace == pytest.approx(iterates(6)[4:], abs=1e-6)
    assert resumed.x.item() == pytest.approx(averages(iterates(6), "polyak")[-1], abs=1e-6)


@pytest.mark.parametrize("rate", [0, 1.5, "mean", True])
def test_unknown_rates_are_refused(rate):
    with pytest.raises(ValueError, match=r"IterateAverage\(rate="):
        IterateAverage(rate)


def test_weights_that_would_be_the_iterates_are_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_weights_only=True)
    with pytest.raises(TypeError, match="it would save the iterate"):
        sequential(tmp_path, "asgd", callbacks=[saver], enable_checkpointing=True)


# Several workers without a center


def test_ddp_steps_along_the_mean_gradient(tmp_path):
    x, expected = 1.0, []
    for _ in range(6):
        x -= LR * (x - np.mean(MINIMA[:2]))
        expected.append(x)
    for trace, end in train(tmp_path, Local(), "ddp", 2):
        assert trace == pytest.approx(expected, abs=1e-6)
        assert end == pytest.approx(expected[-1], abs=1e-6)


def test_local_workers_never_meet(tmp_path):
    for minimum, (trace, _) in zip(MINIMA, train(tmp_path, Local(), "local", 2), strict=False):
        assert trace == pytest.approx([minimum + (1 - minimum) * 0.9**t for t in range(1, 7)], abs=1e-6)


class Validated(Local):
    """Records what validation sees, and what checkpoints hold."""

    def __init__(self) -> None:
        super().__init__(steps=8)
        self.validated = []

    validation_step = Alone.validation_step

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2))

    def on_save_checkpoint(self, checkpoint):
        self.validated.append(("saved", checkpoint["state_dict"]["x"].item()))


def post_local(tau: int, warmup: int, steps: int) -> np.ndarray:
    """(x_1, x_2) after each step: averaged after the steps warmup + 1, + 1 + tau, …."""
    minima, x, rows = np.array(MINIMA[:2]), np.ones(2), []
    for t in range(steps):
        gradient = x - minima
        x = x - LR * (gradient.mean() if t < warmup else gradient)
        if t >= warmup and (t - warmup) % tau == 0:
            x = np.full(2, x.mean())
        rows.append(x)
    return np.array(rows)


@pytest.mark.parametrize(("tau", "warmup"), [(3, 0), (3, 2), (4, 1)])
def test_post_local_sgd(tmp_path, tau, warmup):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    config = composed(
        tmp_path,
        "method=post_local_sgd",
        f"strategy.tau={tau}",
        f"strategy.warmup_steps={warmup}",
        f"optimizer.lr={LR}",
    )

    def fit():
        strategy, module, at_end = build_strategy(config.strategy), Validated(), EndSeen()
        module.make_optimizer = instantiate(config.optimizer)
        settings = {"val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
        fitted(module, strategy, 2, callbacks=[at_end, saver], **settings)
        return module.trace, module.validated, module.x.item(), at_end.x, strategy.communication

    rows = post_local(tau, warmup, 8)
    means = rows.mean(axis=1)
    for rank, (trace, seen, end, at_end, communication) in enumerate(run_ranks(fit, 2)):
        assert trace == pytest.approx(rows[:, rank], abs=1e-6), "validations and checkpoints change nothing"
        validated = [value for value in seen if isinstance(value, float)]
        saved = [value[1] for value in seen if not isinstance(value, float)]
        assert validated == pytest.approx(means[1::2], abs=1e-6)
        assert saved == pytest.approx(means[2::3], abs=1e-6)
        assert end == at_end == pytest.approx(means[-1], abs=1e-6)
        assert communication.exchanges == len(range(warmup, 8, tau))
        assert communication.bytes_sent == 4 * (communication.exchanges + warmup)


def test_workers_differ_where_they_are_averaged_in_validation():
    """The control of the test above: without the mean, rank 0 would have been scored at another point."""
    rows = post_local(3, 0, 8)
    assert abs(rows[1, 0] - rows[1].mean()) > 0.1


# DOWNPOUR's instability


class Noisy(Quadratic):
    """p workers on ½h(x - ξ)², h = 0.6, ξ standard normal; records the center now and then."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__(lr=lr, steps=steps, record=False)

    def setup(self, stage):
        self.noise = torch.Generator().manual_seed(100 + self.trainer.global_rank)

    def training_step(self, batch, index):
        return 0.3 * (self.x - torch.randn(1, generator=self.noise)).square().sum()


def downpour(tau):
    return DownpourStrategy(order="round_robin", tau=tau)


def easgd(tau):
    return EASGDStrategy(mode="async", order="round_robin", tau=tau)


def test_downpour_is_unstable_at_long_periods_where_easgd_is_not():
    """η h = 0.06, p = 4: all workers push what they have moved from one center, p (1 - (1 - ηh)^τ) > 2 from τ = 12."""
    cases = [
        (downpour, 1, 0.1, True),
        (downpour, 4, 0.1, True),
        (downpour, 16, 0.1, False),
        (downpour, 64, 0.1, False),
        (easgd, 16, 0.1, True),
        (easgd, 64, 0.1, True),
        (easgd, 16, 3.5, False),  # control, η h > 2: an EASGD that is unstable is seen
        (downpour, 64, 0.01, True),  # control: with a rate that is small enough, DOWNPOUR is seen to be stable
    ]

    def distances():
        """How far the center ends from the minimum 0, where it began at 1."""
        return [
            abs(fitted(Noisy(lr, steps=max(96, min(12 * tau, 384))), make(tau), 4).x.item())
            for make, tau, lr, _ in cases
        ]

    for case, distance in zip(cases, run_ranks(distances, 4, timeout=100)[0], strict=True):
        assert (distance < 1) if case[-1] else not (distance < 10), (case, distance)
