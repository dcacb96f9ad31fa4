"""The stacked benchmark: its traces against ordinary modules with torch's SGD, its gradients, and a dry run."""

import csv
import importlib
import math
import sys

import pytest
import torch
from application import ROOT
from official_data import write_cifar10
from reference import MINIMA
from test_outer_family import family_trace
from torch import nn

sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import outer_rules
from harness.stacked_convolution import with_patches
from harness.stacked_gradients import StackedGradients, Way
from harness.stacked_images import StackedImages, synthetic_images
from harness.stacked_methods import Alone, DataParallel, Downpour, Elastic, PostLocal
from harness.stacked_results import best_rates
from harness.stacked_rules import Member
from harness.stacked_rules import train as train_member

from lightning_easgd.lab.models.convnets import ConvNet7, StridedNet
from lightning_easgd.lab.simulation import LocalSGD
from lightning_easgd.lab.simulation.sweep import read_rows

WORKERS, TAU, STEPS, LR, DECAY = 3, 4, 18, 0.2, 1e-3
BETA, WARMUP = 0.9, 6


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)
    ).double()  # so that only the equations can differ


def batches():
    random = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, WORKERS, 5, 2, 6, 6, generator=random, dtype=torch.float64)
    return images, torch.randint(4, (STEPS, WORKERS, 5), generator=random)


class Modules:
    """p ordinary modules, each with its own torch optimizer, and a center that is a list of tensors."""

    def __init__(self, momentum):
        self.networks = [tiny() for _ in range(WORKERS)]
        options = {"lr": LR, "momentum": momentum, "weight_decay": DECAY, "nesterov": momentum > 0}
        self.optimizers = [torch.optim.SGD(network.parameters(), **options) for network in self.networks]
        self.momentum = momentum
        self.center = [parameter.detach().clone() for parameter in self.networks[0].parameters()]
        self.pushed = [[each.clone() for each in self.center] for _ in self.networks]

    def position(self, worker, parameter):
        buffer = self.optimizers[worker].state[parameter].get("momentum_buffer")
        return parameter.detach() + (0 if buffer is None else LR * self.momentum * buffer)

    def gradients(self, images, labels):
        for network, inputs, classes in zip(self.networks, images, labels, strict=True):
            network.zero_grad()
            nn.functional.cross_entropy(network(inputs), classes).backward()

    def average_gradients(self):
        for parameters in zip(*(network.parameters() for network in self.networks), strict=True):
            mean = sum(parameter.grad for parameter in parameters) / WORKERS
            for parameter in parameters:
                parameter.grad.copy_(mean)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def mean(self):
        columns = zip(*(network.parameters() for network in self.networks), strict=True)
        return [sum(parameters) / WORKERS for parameters in columns]


def reference(method, momentum):
    """Centers after the exchange at each clock, by hand."""
    modules, centers = Modules(momentum), []
    for clock, (images, labels) in enumerate(zip(*batches(), strict=True)):
        due = clock > 0 and clock % TAU == 0
        pulls = None
        if method is Elastic and due:
            alpha = BETA / WORKERS
            pulls = [
                [
                    alpha * (modules.position(w, parameter) - center)
                    for parameter, center in zip(network.parameters(), modules.center, strict=True)
                ]
                for w, network in enumerate(modules.networks)
            ]
            modules.center = [c + sum(d) for c, *d in zip(modules.center, *pulls, strict=True)]
        if method is Downpour and due:
            with torch.no_grad():
                for network, pushed in zip(modules.networks, modules.pushed, strict=True):
                    for number, parameter in enumerate(network.parameters()):
                        modules.center[number] = modules.center[number] + parameter - pushed[number]
                        parameter.copy_(modules.center[number])
                        pushed[number] = modules.center[number].clone()
        if method is PostLocal and clock > WARMUP and (clock - WARMUP - 1) % TAU == 0:
            with torch.no_grad():
                for mean, *parameters in zip(modules.mean(), *(n.parameters() for n in modules.networks), strict=True):
                    for parameter in parameters:
                        parameter.copy_(mean)
        shown = modules.center if method in (Elastic, Downpour) else modules.mean()
        centers.append(torch.cat([each.flatten() for each in shown]))
        modules.gradients(images, labels)
        if method is DataParallel or (method is PostLocal and clock < WARMUP):
            modules.average_gradients()
        modules.step()
        if pulls is not None:
            with torch.no_grad():
                for network, pull in zip(modules.networks, pulls, strict=True):
                    for parameter, move in zip(network.parameters(), pull, strict=True):
                        parameter.sub_(move)
    return torch.stack(centers)


def stacked(method, momentum, convolution):
    gradients = StackedGradients(tiny(), Way(convolution, "float64", rows=2))
    run = method(gradients.start, LocalSGD(LR, momentum, DECAY), WORKERS, TAU)
    if method is PostLocal:
        run.warmup_steps = WARMUP
    centers = []
    for clock, (images, labels) in enumerate(zip(*batches(), strict=True)):
        run.meet(clock)
        centers.append(run.center.clone())
        run.step(gradients(run.points, images, labels, torch.arange(WORKERS))[0])
    return torch.stack(centers)


@pytest.mark.parametrize("convolution", ["patches", "grouped"])
@pytest.mark.parametrize(
    ("method", "momentum"),
    [(Elastic, 0.0), (Elastic, 0.9), (Downpour, 0.0), (DataParallel, 0.0), (DataParallel, 0.9), (PostLocal, 0.0),
     (Alone, 0.9)],
)  # fmt: skip
def test_a_trace_is_that_of_ordinary_modules(method, momentum, convolution):
    expected, found = reference(method, momentum), stacked(method, momentum, convolution)
    assert (expected[-1] - expected[0]).norm() > 0.1
    assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize("network", [ConvNet7(dropout=0.0), StridedNet()], ids=["convnet7", "strided_net"])
def test_convolutions_by_patches_have_the_same_outputs_and_gradients(network):
    images = torch.randn(2, 3, 28, 28)
    changed = with_patches(network)
    assert [name for name, _ in changed.named_parameters()] == [name for name, _ in network.named_parameters()]
    for each in (network, changed):
        each(images).square().sum().backward()
    for ours, theirs in zip(changed.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_patches_are_summed_alike_in_parts(monkeypatch):
    network = with_patches(ConvNet7(dropout=0.0).double())
    images = torch.randn(5, 3, 28, 28, dtype=torch.float64)
    found = []
    for reached in (2**31 - 1, 2 * 8 * 64 * 25 * 64):  # all images at once; two at a time in the second convolution
        monkeypatch.setattr("harness.stacked_convolution._REACHED", reached * 8)
        found.append(torch.autograd.grad(network(images).square().sum(), list(network.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_workers_have_dropout_masks_of_their_own_and_scores_none():
    gradients = StackedGradients(ConvNet7(), Way("patches", "float32", rows=4))
    images, labels = torch.randn(1, 4, 3, 28, 28), torch.zeros(1, 4, dtype=torch.int64)
    first, second = gradients(gradients.start.repeat(2, 1), images, labels, torch.tensor([0, 0]))[0]
    assert (first - second).abs().max() > 1e-4
    scores = {gradients.error(gradients.start, images[0], labels[0]).item() for _ in range(3)}
    assert len(scores) == 1
    assert gradients.error(gradients.start * float("nan"), images[0], labels[0]).item() == pytest.approx(0.9)


def test_workers_draw_the_whole_set_each_in_its_own_order():
    (images, labels), test = synthetic_images(40)
    images[:] = 0
    images[:, 0] = np_arange_images(len(images))
    drawn = StackedImages((images, labels), test, workers=2, batch_size=10, device=torch.device("cpu"), seed=0)
    epoch = [drawn.draw(clock) for clock in range(4)]
    means, stds = drawn._mean[0].item(), drawn._std[0].item()
    numbers = torch.cat([batch[:, :, 0, 3, 3] for batch, _ in epoch], 1).mul(stds).add(means).mul(255).round().long()
    assert numbers.sort(1).values.tolist() == [list(range(40))] * 2
    assert numbers[0].tolist() != numbers[1].tolist()
    classes = torch.cat([batch for _, batch in epoch], 1)
    assert classes.tolist() == [[labels[number] for number in row] for row in numbers.tolist()]


def np_arange_images(count):
    import numpy as np

    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 32, 32))


def test_crops_are_windows_of_the_image_or_mirrored_ones():
    train, test = synthetic_images(20)
    drawn = StackedImages(train, test, workers=1, batch_size=20, device=torch.device("cpu"), seed=0)
    rows = torch.arange(20)
    crops, images = drawn._crops(rows), torch.from_numpy(train[0])
    mirrored = 0
    for crop, image in zip(crops, images, strict=True):
        windows = image.unfold(1, 28, 1).unfold(2, 28, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        plain, other = ((windows == each).flatten(1).all(1).any().item() for each in (crop, crop.flip(-1)))
        assert plain or other
        mirrored += other
    assert 0 < mirrored < 20


def test_the_best_rate_is_named_and_whether_it_ends_its_grid():
    errors = {0.1: 0.5, 0.2: 0.3, 0.4: 0.6}
    curves = [
        {"workers": 4, "method": "easgd", "lr": lr, "seed": seed, "step": step, "test_error": error, "train_loss": 1.0}
        for lr, error in errors.items()
        for seed in range(2)
        for step in range(3)
    ]
    (row,) = best_rates(curves)
    assert (row["lr"], row["test_error"], row["at_end"]) == (0.2, 0.3, "no")


@pytest.mark.parametrize("chosen", [[], ["--seeds", "2", "--methods", "easgd", "post_local_sgd"]])
def test_dry_run(tmp_path, chosen):
    seeds = {"0"}
    if chosen:
        seeds = {"0", "1"}
        write_cifar10(tmp_path)
        chosen = [*chosen, "--data", str(tmp_path)]
    importlib.import_module("stacked").main(["--device", "cpu", "--dry", *chosen, "--output", str(tmp_path)])
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    everything = {"easgd", "eamsgd", "eamsgd_0.9", "downpour", "ddp", "ddp_momentum", "post_local_sgd", "sgd", "msgd"}
    assert {row["method"] for row in rows} == ({"easgd", "post_local_sgd"} if chosen else everything)
    assert {row["step"] for row in rows} == {"0", "2", "4"}
    assert {row["seed"] for row in rows} == seeds
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert (tmp_path / "best.csv").is_file()
    assert (tmp_path / "speed.csv").is_file()


class Quadratics:
    """Workers whose losses are ½(x - b_i)², where the network's gradients are asked for."""

    start = torch.ones(1, dtype=torch.float64)

    def __call__(self, points, images, labels, of):
        return points - torch.tensor(MINIMA, dtype=torch.float64)[: len(of), None], torch.zeros(len(of))


class NoImages:
    def draw(self, clock):
        return None, None


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (Member(1.0, momentum=0.0), {"alpha": 1.0, "beta": 1.0, "pull_to": "new"}),
        (
            Member(0.7, 0.9, 0.5, outer_nesterov=True, momentum=0.0),
            {"alpha": 0.7, "beta": 0.9, "mu": 0.5, "nesterov": True, "pull_to": "new"},
        ),
        (Member(0.9, 0.8, 0.4, momentum=0.0), {"alpha": 0.9, "beta": 0.8, "mu": 0.4, "pull_to": "new"}),
        (
            Member(0.3, 0.9, pull_to="old", momentum=0.9, exchanges_position=True),
            {"alpha": 0.3, "beta": 0.9, "delta": 0.9},
        ),
    ],
)
def test_members_of_the_family_follow_their_recursions(member, expected):
    """The same as the strategy's, but that an exchange comes after a step rather than before the next."""
    trace = family_trace(3, 13, tau=3, **expected)
    centers = {
        step: center.item()
        for step, center in train_member(
            member, Quadratics(), NoImages(), workers=3, tau=3, lr=0.1, schedule="constant", steps=12, read_at=bool
        )
    }
    later = 0 if expected.get("pull_to") == "new" else 1
    for step in (3, 6, 9, 12):
        assert centers[step] == pytest.approx(trace[step - 1 + later, -1], abs=1e-12)


def test_ddp_is_one_model_with_the_mean_gradient():
    (*_, (_, center)) = train_member(
        Member(None, momentum=0.0), Quadratics(), NoImages(), workers=3, tau=1, lr=0.1, schedule="cosine", steps=5,
        read_at=bool,
    )  # fmt: skip
    x, mean = 1.0, sum(MINIMA[:3]) / 3
    for step in range(5):
        x -= 0.1 * (1 + math.cos(math.pi * step / 5)) / 2 * (x - mean)
    assert center.item() == pytest.approx(x, abs=1e-12)


def test_outer_rules_dry_run_goes_on_where_it_was(tmp_path, capsys):
    options = ["--dry", "--output", str(tmp_path), "--schedules", "cosine", "--methods", "ddp", "eamsgd"]
    outer_rules.main(options)
    made = capsys.readouterr().out.count("seed=")
    rows = read_rows(tmp_path / "results.csv")
    assert {row["method"] for row in rows} == {"ddp", "eamsgd"}
    for row in rows:  # the best is no end of what was tried
        tried = [float(rate) for rate in row["rates_tried"].split()]
        assert min(tried) < row["lr"] < max(tried)
    assert made >= 8
    outer_rules.main(options)
    assert capsys.readouterr().out.count("seed=") == 0
