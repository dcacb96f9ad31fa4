"""Values that no averager holds, and parameters that are not what they were: nothing is mixed up or left behind."""

import os
import time
import warnings
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from ranks import end_ranks, run_ranks
from torch import nn
from torch.utils.data import DataLoader
from toys import quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=20)
STRATEGIES = {
    "sync": lambda **more: EASGDStrategy(tau=2, timeout=TIMEOUT, **more),
    "async": lambda **more: EASGDStrategy(tau=2, mode="async", timeout=TIMEOUT, **more),
    "eamsgd": lambda **more: EASGDStrategy(tau=2, momentum=0.9, timeout=TIMEOUT, **more),
    "rho": lambda **more: EASGDStrategy(tau=2, rho=2.0, timeout=TIMEOUT, **more),
    "int8": lambda **more: EASGDStrategy(tau=2, wire_dtype="int8", timeout=TIMEOUT, **more),
    "cpu": lambda **more: EASGDStrategy(tau=2, center_device="cpu", timeout=TIMEOUT, **more),
    "gloo": lambda **more: EASGDStrategy(tau=2, process_group_backend="gloo", timeout=TIMEOUT, **more),
    "eamsgd_async": lambda **more: EASGDStrategy(tau=2, mode="async", momentum=0.9, timeout=TIMEOUT, **more),
    "round_robin": lambda **more: EASGDStrategy(tau=2, mode="async", order="round_robin", timeout=TIMEOUT, **more),
    "downpour": lambda **more: DownpourStrategy(tau=2, timeout=TIMEOUT, **more),
    "adownpour": lambda **more: DownpourStrategy(tau=2, average="polyak", timeout=TIMEOUT, **more),
    "ddp": lambda **more: "ddp",
}
MODES = ["sync", "async"]


class Net(L.LightningModule):
    """Each rank has data of its own, and validates on all of it."""

    def __init__(self, batches=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.batches = batches

    def loss(self, batch):
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_end(self):
        self.distance = self.trainer.strategy.elastic_distance()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1 + self.trainer.global_rank)
        return DataLoader(torch.randn(self.batches * 8, 4, generator=generator), batch_size=8)

    def val_dataloader(self):
        return DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(9)), batch_size=8)


def fit(module, strategy, *, ranks=2, more=None, **trainer):
    """The warnings of this package that the fit gave."""
    options = {"num_sanity_val_steps": 0, "use_distributed_sampler": False} | trainer
    made = quiet_trainer(strategy=STRATEGIES[strategy](**(more or {})), devices=ranks, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(module)
    return [str(each.message) for each in caught if "Strategy" in str(each.message)]


def bits(tensors):
    return {name: tensor.detach().clone().numpy().tobytes() for name, tensor in tensors.items()}


# Teachers, targets, momentum networks


class Taught(Net):
    """A teacher outside of the optimizer, which follows the student by hand after each batch."""

    grad = False

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.teacher = nn.Linear(4, 8).requires_grad_(self.grad)
        self.teacher.load_state_dict(self.net[0].state_dict())
        self.seen, self.before, self.after = [], [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def on_train_batch_start(self, batch, index):
        if len(self.after) < len(self.before):
            self.after.append(bits(self.state_dict()))

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for target, source in zip(self.teacher.parameters(), self.net[0].parameters(), strict=True):
                target.mul_(0.9).add_(source, alpha=0.1)
        self.own = self.teacher.weight.detach().clone()
        self.last = bits(self.state_dict())

    def on_validation_epoch_start(self):
        self.before.append(self.last)
        self.seen.append(self.teacher.weight.detach().clone())


class TaughtWithGrad(Taught):
    """A teacher that was never told to have no gradient."""

    grad = True


class SwappedData(Taught):
    """A teacher that is written to through ``data``, which leaves no trace in its version."""

    def on_train_batch_end(self, *_):
        self.teacher.weight.data = self.teacher.weight.data * 0.9 + self.net[0].weight.data * 0.1
        self.own = self.teacher.weight.detach().clone()
        self.last = bits(self.state_dict())


@pytest.mark.parametrize("strategy", [*MODES, "downpour"])
def test_a_teacher_outside_of_optimizers_is_the_workers_mean(strategy, tmp_path):
    def train(kind):
        module = kind(batches=6)
        fit(module, strategy, max_epochs=2, val_check_interval=3)
        module.trainer.save_checkpoint(tmp_path / f"{kind.__name__}.ckpt")
        return module.seen, module.own, module.teacher.weight.detach().clone(), module.before[:3] == module.after[:3]

    kinds = (Taught, TaughtWithGrad, SwappedData)
    results = run_ranks(lambda: [train(kind) for kind in kinds], 2)
    for kind, (seen, own, final, restored), (seen2, own2, final2, restored2) in zip(kinds, *results, strict=True):
        assert not own.equal(own2), f"the workers' teachers do not differ: {kind} shows nothing"
        assert all(a.equal(b) for a, b in zip(seen, seen2, strict=True)), kind
        assert final.equal(final2), kind
        assert torch.allclose(final, (own + own2) / 2), kind
        assert restored, kind
        assert restored2, kind
        saved = torch.load(tmp_path / f"{kind.__name__}.ckpt", weights_only=True)
        assert saved["state_dict"]["teacher.weight"].equal(final), kind


@pytest.mark.parametrize("strategy", MODES)
def test_a_frozen_base_is_compared_and_not_sent(strategy, monkeypatch):
    """What is the same everywhere costs a checksum: no tensor of it travels, at no meeting."""

    class Based(Net):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(1000, 1000).requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def train():
        from lightning_easgd.averagers import ProcessGroupChannel

        sent = []
        monkeypatch.setattr(
            ProcessGroupChannel, "sum", lambda self, buffer, sum=ProcessGroupChannel.sum: (
                sent.append(buffer.numel()), sum(self, buffer)
            )[1]
        )  # fmt: skip
        module = Based()
        fit(module, strategy, max_epochs=2)
        return max(sent)

    assert max(run_ranks(train, 2)) < 1000


def test_a_teacher_under_fabric():
    def train():
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2, timeout=TIMEOUT))
        fabric.launch()
        net = nn.ModuleDict({"student": nn.Linear(4, 1), "teacher": nn.Linear(4, 1).requires_grad_(False)})
        model, optimizer = fabric.setup(net, torch.optim.SGD(net["student"].parameters(), lr=0.05))
        for batch in torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(fabric.global_rank)):
            optimizer.zero_grad()
            fabric.backward((net["student"](batch) - 1).square().mean())
            optimizer.step()
            with torch.no_grad():
                net["teacher"].weight.lerp_(net["student"].weight, 0.1)
        own = net["teacher"].weight.clone()
        with fabric.strategy.center_weights(model):
            seen = net["teacher"].weight.clone()
        back = net["teacher"].weight.equal(own)
        fabric.strategy.finalize()
        return own, seen, net["teacher"].weight.detach().clone(), back

    (own, seen, final, back), (own2, seen2, final2, back2) = run_ranks(train, 2)
    assert not own.equal(own2)
    assert seen.equal(seen2)
    assert final.equal(final2)
    assert torch.allclose(final, (own + own2) / 2)
    assert back
    assert back2


class KeptOut(Taught):
    """The teacher and a buffer are kept out of DDP by name."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("counts", torch.zeros(2))
        self._ddp_params_and_buffers_to_ignore = ["teacher.weight", "counts", "net.2.bias"]

    def on_train_batch_end(self, *_):
        super().on_train_batch_end()
        self.counts += 1.0 + self.trainer.global_rank


@pytest.mark.parametrize("strategy", MODES)
def test_what_is_kept_out_of_ddp_stays_each_ranks_own(strategy):
    def train():
        module = KeptOut()
        told = fit(module, strategy, max_epochs=1)
        return bits(module.state_dict()), told, list(module.trainer.strategy.center), module.counts

    (first, told, center, counts), (second, *_, counts2) = run_ranks(train, 2)
    different = {name for name in first if first[name] != second[name]}
    assert different == {"teacher.weight", "counts", "net.2.bias"}
    assert (counts.tolist(), counts2.tolist()) == ([8.0, 8.0], [16.0, 16.0])
    assert "net.2.bias" not in center
    assert told == []


# Buffers


class Normed(Net):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net.insert(1, nn.BatchNorm1d(8))


@pytest.mark.parametrize("strategy", MODES)
def test_broadcast_buffers_false_leaves_them_to_each_rank(strategy):
    def train(value):
        module = Normed()
        module.register_buffer("seed", torch.tensor(float(module_rank())))
        told = fit(module, strategy, more={"broadcast_buffers": value})
        return module.net[1].running_mean.tolist(), module.seed.item(), module.net[0].weight.tolist(), told

    (own, common), (own2, common2) = run_ranks(lambda: (train(False), train(True)), 2)
    (mean, seed, weight, told), (mean2, seed2, weight2, _) = own, own2
    assert mean != mean2
    assert (seed, seed2) == (0.0, 1.0)
    assert weight == weight2
    assert not any("broadcast_buffers" in text for text in told)
    (mean, seed, *_), (mean2, seed2, *_) = common, common2
    assert (mean, seed) == (mean2, seed2)


def module_rank():
    return int(os.environ["RANK"])


class Cached(Net):
    """A cache that is made anew for longer sequences: ranks see sequences of different lengths."""

    lengths = (4, 6)
    dtype = torch.float32

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("cache", torch.zeros(2, dtype=self.dtype), persistent=False)

    def training_step(self, batch, index):
        length = self.lengths[self.trainer.global_rank]
        if len(self.cache) < length:
            value = torch.full((length,), self.trainer.global_rank + 1).to(self.dtype)
            self.register_buffer("cache", value, persistent=False)
        return super().training_step(batch, index)


class CachedBool(Cached):
    dtype = torch.bool


class CachedOnOne(Cached):
    lengths = (2, 6)


class Pairwise(Cached):
    """Two buffers whose sizes differ and whose sum does not: a flat sum would mix them."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("other", torch.zeros(2))

    def training_step(self, batch, index):
        rank = self.trainer.global_rank
        self.register_buffer("cache", torch.full((4 if rank else 2,), 1.0 + 2 * rank))
        self.register_buffer("other", torch.full((2 if rank else 4,), 1.0 + 2 * rank))
        return super().training_step(batch, index)


class Present(Cached):
    """A buffer that one rank has and the other has not."""

    def training_step(self, batch, index):
        if self.trainer.global_rank == 1:
            self.register_buffer("extra", torch.ones(3))
        return Net.training_step(self, batch, index)


class Typed(Cached):
    """Same shape, another dtype."""

    def training_step(self, batch, index):
        self.register_buffer(
            "cache", torch.full((2,), 7).to(torch.int64 if self.trainer.global_rank else torch.float32)
        )
        return Net.training_step(self, batch, index)


class Sparse(Cached):
    """Sparse, and different on each rank."""

    def training_step(self, batch, index):
        self.register_buffer("cache", (torch.eye(4) * (1 + self.trainer.global_rank)).to_sparse(), persistent=False)
        return Net.training_step(self, batch, index)


@pytest.mark.parametrize("strategy", MODES)
def test_buffers_of_different_shapes_stay_each_ranks_own(strategy):
    cases = {
        Cached: {"cache"}, CachedBool: {"cache"}, CachedOnOne: {"cache"}, Pairwise: {"cache", "other"},
        Present: {"extra"}, Typed: {"cache"}, Sparse: {"cache"},
    }  # fmt: skip

    def train(kind):
        module = kind()
        seen = []
        module.on_validation_epoch_start = lambda: seen.append({n: b.clone() for n, b in module.named_buffers()})
        module.on_train_batch_end = lambda *_: setattr(
            module, "latest", {n: b.clone() for n, b in module.named_buffers()}
        )
        told = fit(module, strategy, max_epochs=2)
        final = dict(module.named_buffers())
        own = {n: module.latest[n] for n in final}
        same = [{n: torch.equal(a[n].to_dense(), own[n].to_dense()) for n in own} for a in (*seen[-1:], final)]
        return told, same, module.net[0].weight.tolist()

    results = run_ranks(lambda: [train(kind) for kind in cases], 2)
    for (kind, names), first, second in zip(cases.items(), *results, strict=True):
        assert first[2] == second[2], kind
        for _, same, _ in (first, second):
            assert all(all(each[name] for name in names & each.keys()) for each in same), kind
        about = [text for text in first[0] if "differ between the ranks" in text]
        assert len(about) == 1, kind
        assert all(name in about[0] for name in names), kind


@pytest.mark.parametrize("strategy", MODES)
def test_buffers_that_differ_where_training_starts(strategy):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.arange(3.0 + module_rank()))
            self.register_buffer("common", torch.full((2,), float(module_rank())))

    def train():
        module = Odd()
        fit(module, strategy)
        return module.cache.tolist(), module.common.tolist(), module.net[0].weight.tolist()

    first, second = run_ranks(train, 2, timeout=60)
    assert (first[0], second[0]) == ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0])
    assert first[1:] == second[1:]
    assert first[1] == [0.0, 0.0]


@pytest.mark.parametrize("strategy", [*MODES, "downpour"])
def test_parameters_that_differ_where_training_starts_are_named(strategy):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2 + module_rank(), 3)

    outcomes = end_ranks(lambda: fit(Odd(), strategy), 2, timeout=60)
    for outcome in outcomes:
        assert outcome.exitcode
        assert "the parameter head.weight is" in outcome.error


class Resized(Net):
    """A buffer that is resized in place in validation, as observers do, and one that is replaced."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("low", torch.zeros(0))
        self.register_buffer("high", torch.tensor([1.0]))
        self.register_buffer("mask", torch.ones(3).expand(2, 3))
        self.training_shapes = []

    def validation_step(self, batch, index):
        self.low.resize_(4)
        self.low.copy_(batch.min(0).values)
        self.high = batch.max(0).values
        super().validation_step(batch, index)

    def on_train_batch_start(self, batch, index):
        self.training_shapes.append((tuple(self.low.shape), self.high.tolist(), tuple(self.mask.shape)))


@pytest.mark.parametrize("strategy", MODES)
def test_a_buffer_that_is_resized_in_validation_stays_so_as_with_ddp(strategy):
    def train():
        module = Resized()
        fit(module, strategy, val_check_interval=2)
        return module.training_shapes, module.net[0].weight.tolist()

    (shapes, weight), (_, other) = run_ranks(train, 2)
    assert weight == other
    assert shapes[:2] == [((0,), [1.0], (2, 3))] * 2
    assert [(low, len(high), mask) for low, high, mask in shapes[2:]] == [((4,), 4, (2, 3))] * (len(shapes) - 2)
    assert len(shapes) > 2


# Parameters of unusual kinds


class EmptyGroup(Net):
    """The decay / no-decay split of a model that has nothing in one of the groups."""

    first = False

    def configure_optimizers(self):
        groups = [{"params": list(self.net.parameters())}, {"params": [], "weight_decay": 0.0}]
        return torch.optim.SGD(groups[::-1] if self.first else groups, lr=0.05)


class EmptyFirst(EmptyGroup):
    first = True


class ZeroSize(Net):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.nothing, self.none = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(0))

    def training_step(self, batch, index):
        return self.loss(batch) + self.nothing.sum() + self.none.sum()


class OnlyZeroSize(ZeroSize):
    """One optimizer has nothing but parameters without elements."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.05),
            torch.optim.SGD([self.nothing, self.none], lr=0.05),
            torch.optim.SGD([{"params": []}], lr=0.05),
        ]


class Counting(Net):
    """An integer parameter, which counts by hand, given to the optimizer or not."""

    given = True

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    def training_step(self, batch, index):
        self.count += 1 + self.trainer.global_rank
        return super().training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters() if self.given else self.net.parameters(), lr=0.05)


class CountingApart(Counting):
    given = False


class Complex(Net):
    """A complex parameter behind one with an odd number of elements."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.odd = nn.Parameter(torch.zeros(1))
        self.z = nn.Parameter(torch.full((3,), 1 + 1j))

    def training_step(self, batch, index):
        goal = 0.5 - 0.5j * self.trainer.global_rank
        return self.loss(batch) + (self.z - goal).abs().square().sum() + self.odd.square().sum()


KINDS = [EmptyGroup, EmptyFirst, ZeroSize, OnlyZeroSize, Counting, CountingApart, Complex]
# Every kind in both modes and by two of the other strategies, each of which has one kind at least.
OTHERS = [name for name in STRATEGIES if name not in ("ddp", *MODES)]
ROUND = [(OTHERS[(2 * number + more) % len(OTHERS)], kind) for number, kind in enumerate(KINDS) for more in (0, 1)]


@pytest.mark.parametrize(
    "cases", [*([(mode, kind) for kind in KINDS] for mode in MODES), ROUND], ids=[*MODES, "others"]
)
def test_parameters_of_every_kind_train(cases):
    def train(strategy, kind):
        module = kind()
        start = bits(module.state_dict())
        fit(module, strategy)
        final = {name: value.clone() for name, value in module.state_dict().items()}
        return start, bits(final), final, module.trainer.strategy.communication.exchanges, module.distance

    results = run_ranks(lambda: [train(*case) for case in cases], 2)
    for case, first, second in zip(cases, *results, strict=True):
        assert first[1] == second[1], case
        assert first[0]["net.0.weight"] != first[1]["net.0.weight"], case
        assert first[3] > 0, case
        assert first[4] > 0, case
        if case[1] in (Counting, CountingApart):
            assert first[2]["count"].tolist() == [8, 8], case  # rank 0's
        if case[1] is Complex:
            assert not first[2]["z"].equal(torch.full((3,), 1 + 1j)), case
            assert first[2]["z"].isfinite().all(), case


def test_a_complex_parameter_is_pulled_as_its_two_parts_are():
    class Parts(Complex):
        def __init__(self):
            super().__init__()
            del self.z
            self.re, self.im = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        @property
        def z(self):
            return torch.complex(self.re, self.im)

        @z.deleter
        def z(self):
            del self._parameters["z"]

    def train(kind, strategy):
        module = kind()
        fit(module, strategy)
        center = module.trainer.strategy.center
        z = center["z"] if "z" in center else torch.complex(center["re"], center["im"])
        return torch.view_as_real(z)

    names = ("sync", "eamsgd")
    traces, _ = run_ranks(lambda: [(train(Complex, name), train(Parts, name)) for name in names], 2)
    for name, (of_complex, of_parts) in zip(names, traces, strict=True):
        assert torch.allclose(of_complex, of_parts, atol=1e-6), name


class Frozen(Net):
    """A large frozen layer that is given to the optimizer with the rest."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.base = nn.Linear(100, 100).requires_grad_(False)


def test_frozen_parameters_of_an_optimizer_do_not_travel():
    def train(kind, strategy):
        module = kind()
        fit(module, strategy)
        return module.trainer.strategy.communication.bytes_sent

    names = ("sync", "gloo", "int8", "async", "downpour")
    sent, _ = run_ranks(lambda: {name: (train(Frozen, name), train(Net, name)) for name in names}, 2)
    for name, (with_base, without) in sent.items():
        assert with_base == without, name


def test_a_frozen_parameter_takes_part_when_it_is_unfrozen():
    class Thawed(Frozen):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.base.requires_grad_(True)

        def training_step(self, batch, index):
            shift = self.base(torch.ones(100)).mean() - self.trainer.global_rank
            return self.loss(batch) + shift.square()

    def train(strategy):
        module = Thawed(batches=5)
        start = module.base.weight.detach().clone()
        fit(module, strategy, max_epochs=3)
        return start, module.trainer.strategy.center["base.weight"], module.base.weight.detach().clone()

    names = ("sync", "gloo", "int8", "async")
    results = run_ranks(lambda: [train(name) for name in names], 2)
    for name, (start, named, final), (*_, final2) in zip(names, *results, strict=True):
        assert not start.equal(final), name
        assert final.equal(final2), name
        assert named.equal(final), name


# Parameters that are not what they were: the identity counts, not the number


class Changed(Net):
    """Does something to the optimizer at the start of the second epoch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.apart = []

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.change(self.trainer.optimizers[0])

    def on_train_end(self):
        super().on_train_end()
        self.final_averaged = set(self.trainer.strategy.center)

    def new(self, rank):
        return nn.Parameter(torch.full((1,), 5.0 + rank))


class Replaced(Changed):
    def change(self, optimizer):
        self.net[2].bias = self.new(self.trainer.global_rank)
        optimizer.param_groups[0]["params"][-1] = self.net[2].bias


class Added(Changed):
    def change(self, optimizer):
        self.extra = self.new(self.trainer.global_rank)
        optimizer.add_param_group({"params": [self.extra]})

    def training_step(self, batch, index):
        extra = getattr(self, "extra", None)
        return self.loss(batch) + (0 if extra is None else extra.square().sum())


class Deleted(Changed):
    def configure_optimizers(self):
        return torch.optim.SGD([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=0.05)

    def change(self, optimizer):
        del optimizer.param_groups[0]


class Swapped(Changed):
    """The same parameters in another order."""

    def change(self, optimizer):
        optimizer.param_groups[0]["params"].reverse()


class Anew(Changed):
    """All optimizers are made anew, as to reset them."""

    def change(self, optimizer):
        self.trainer.strategy.setup_optimizers(self.trainer)


class AnewWithOther(Changed):
    def change(self, optimizer):
        self.net[2].bias = self.new(self.trainer.global_rank)
        self.trainer.strategy.setup_optimizers(self.trainer)


def changed(kind, strategy):
    module = kind()
    fit(module, strategy, max_epochs=2)
    strategy = module.trainer.strategy
    return bits(dict(module.named_parameters())), module.final_averaged, strategy.communication.exchanges


REFUSED = {Replaced: "net.2.bias", Added: "extra", AnewWithOther: "net.2.bias", Deleted: "net.0.weight"}


@pytest.mark.parametrize("strategy", ["sync", "gloo", "int8", "eamsgd", "async"])
def test_parameters_that_change_in_mid_training(strategy):
    """Averaged from then on, never each rank its own."""
    kinds = (Swapped, Anew, *(() if strategy == "async" else REFUSED))
    results = run_ranks(lambda: [changed(kind, strategy) for kind in kinds], 2)
    for kind, (first, averaged, exchanges), (second, *_) in zip(kinds, *results, strict=True):
        assert first == second, kind
        assert exchanges == 7, kind
        assert ("net.0.weight" in averaged) == (kind is not Deleted), kind
        assert "net.2.bias" in averaged, kind


@pytest.mark.parametrize(("kind", "name"), REFUSED.items())
def test_parameters_that_change_in_mid_training_are_refused_by_name_where_the_center_is_served(kind, name):
    for outcome in end_ranks(changed, 2, kind, "async"):
        assert outcome.exitcode
        assert name in outcome.error
        assert "fixed size" in outcome.error


def test_a_new_parameter_begins_at_rank_zeros_value():
    """The center of what is added starts where rank 0 has it; each worker is pulled there from its own."""

    class Still(Changed):
        def change(self, optimizer):
            self.extra = self.new(self.trainer.global_rank)
            optimizer.add_param_group({"params": [self.extra], "lr": 0.0})

        def training_step(self, batch, index):
            extra = getattr(self, "extra", None)
            return self.loss(batch) + (0 if extra is None else extra.sum())

        def on_train_batch_end(self, outputs, batch, index):
            if "extra" in self.trainer.strategy.center:
                self.apart.append((self.extra.item(), self.trainer.strategy.center["extra"].item()))

    def train(backend):
        module = Still(batches=3)
        fit(module, "sync", max_epochs=3, more={"alpha": 0.25, "process_group_backend": backend}, limit_val_batches=0)
        return module.apart

    x, center = [5.0, 6.0], 5.0
    expected = []
    for exchange in range(3):  # at t = 4, 6, 8
        differences = [value - center for value in x]
        x = [value - 0.25 * difference for value, difference in zip(x, differences, strict=True)]
        center += 0.25 * sum(differences)
        expected += [(*x, center)] * (2 if exchange < 2 else 1)
    backends = (None, "gloo")
    for backend, first, second in zip(backends, *run_ranks(lambda: [*map(train, backends)], 2), strict=True):
        assert [a for a, _ in first] == pytest.approx([row[0] for row in expected]), backend
        assert [a for a, _ in second] == pytest.approx([row[1] for row in expected]), backend
        assert [c for _, c in first] == pytest.approx([row[2] for row in expected]), backend


# Ranks that do not agree


class Ordered(Net):
    """Rank 1's optimizer has its parameters in another order, as those of a set have."""

    reverse = True

    def configure_optimizers(self):
        parameters = list(self.parameters())
        return torch.optim.SGD(parameters[::-1] if self.reverse and module_rank() else parameters, lr=0.05)


class InOrder(Ordered):
    reverse = False


def test_the_order_of_parameters_in_an_optimizer_is_each_ranks_own():
    def train(kind, strategy):
        module = kind()
        fit(module, strategy)
        return bits(module.state_dict())

    names = ("sync", "gloo", "int8", "eamsgd", "round_robin")
    for results in run_ranks(lambda: {name: (train(Ordered, name), train(InOrder, name)) for name in names}, 2):
        for name, (mixed, straight) in results.items():
            assert mixed == straight, name


@pytest.mark.parametrize("strategy", [*MODES, "downpour"])
def test_optimizers_of_different_parameters_are_told(strategy):
    class Odd(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[0 if module_rank() else 2].parameters(), lr=0.05)

    for outcome in end_ranks(lambda: fit(Odd(), strategy), 2, timeout=60):
        assert outcome.exitcode
        assert "different parameters on different ranks" in outcome.error
        assert "net.0.weight" in outcome.error


@pytest.mark.parametrize("strategy", ["sync", "gloo"])
def test_a_parameter_that_is_replaced_on_one_rank_ends_the_run_at_once(strategy):
    class OnOne(Replaced):
        def change(self, optimizer):
            if module_rank() == 1:
                super().change(optimizer)

    started = time.monotonic()
    for outcome in end_ranks(changed, 2, OnOne, strategy, timeout=60):
        assert outcome.exitcode
        assert "different exchanges" in outcome.error
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("strategy", ["async", "downpour"])
def test_what_was_written_to_while_it_was_frozen_is_refused_where_it_is_unfrozen(strategy):
    class Thawed(Frozen):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.base.weight.fill_(5.0)
                self.base.requires_grad_(True)

    for outcome in end_ranks(lambda: fit(Thawed(), strategy, max_epochs=2), 2, timeout=60):
        assert outcome.exitcode
        assert "base.weight" in outcome.error
        assert "while it was frozen" in outcome.error


def test_a_buffer_that_is_a_view_of_a_parameter_follows_it():
    class Viewed(Net):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.register_buffer("view", self.net[0].weight.data)
            self.states = []

        def on_train_batch_end(self, *_):
            self.last = bits(self.state_dict())

        def on_validation_end(self):
            self.compare = True

        def on_train_batch_start(self, batch, index):
            if getattr(self, "compare", False):
                self.compare = False
                self.states.append(bits(self.state_dict()) == self.last)

    def train(strategy):
        module = Viewed()
        fit(module, strategy, val_check_interval=2)
        return module.states, bits(module.state_dict())

    results = run_ranks(lambda: [*map(train, MODES)], 2)
    for mode, (first, final), (second, final2) in zip(MODES, *results, strict=True):
        assert first == second == [True] * 3, mode
        assert final == final2, mode


@pytest.mark.parametrize("strategy", MODES)
def test_a_complex_buffer_that_is_seen_conjugated_is_the_workers_mean(strategy):
    class Conjugated(Net):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            start = 3.0 if os.environ["RANK"] == "0" else 4.0
            self.register_buffer("other", torch.full((2,), complex(start, 1.0)).conj())
            self.begun = []

        def on_train_start(self):
            self.begun = self.other.resolve_conj().tolist()

        def training_step(self, batch, index):
            with torch.no_grad():
                self.other += 1j * self.global_rank
            return super().training_step(batch, index)

    def train():
        module = Conjugated()
        fit(module, strategy)
        return module.begun, module.other.resolve_conj().tolist()

    for begun, ended in run_ranks(train, 2):
        assert begun == [3 - 1j] * 2  # rank 0's
        assert ended == [3 + 3j] * 2  # of 8 steps, from -1 on: the mean of -1 and 7


def test_several_modules_of_fabric_name_what_stays_each_ranks_own():
    def train():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2, timeout=TIMEOUT))
        fabric.launch()
        one, two = nn.Linear(2, 1), nn.Linear(2, 1)
        two.register_buffer("own", torch.zeros(1))
        two._ddp_params_and_buffers_to_ignore = ["own"]
        one, first = fabric.setup(one, torch.optim.SGD(one.parameters(), lr=0.1))
        two, second = fabric.setup(two, torch.optim.SGD(two.parameters(), lr=0.1))
        for _ in range(5):
            first.zero_grad(), second.zero_grad()
            fabric.backward((two(torch.ones(1, 2)) + one(torch.ones(1, 2))).sum())
            first.step(), second.step()
            two.own += fabric.global_rank + 1
        fabric.strategy.finalize()
        return two.own.item()

    assert run_ranks(train, 2) == [5.0, 10.0]


@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_a_run_that_is_resumed_averages_what_it_averaged(strategy, tmp_path):
    """Also what is frozen by then."""

    class Later(Net):
        frozen = False

        def on_fit_start(self):
            if self.frozen:
                self.net[0].requires_grad_(False)

    def train(resumed):
        module = Later()
        path = tmp_path / "x.ckpt"
        fit(module, strategy, max_epochs=2 if resumed else 1, limit_val_batches=0)
        if not resumed:
            module.trainer.save_checkpoint(path)
            return None
        module = Later()
        module.frozen = True
        made = quiet_trainer(strategy=STRATEGIES[strategy](), devices=2, max_epochs=2, use_distributed_sampler=False)
        made.fit(module, ckpt_path=path)
        return "net.0.weight" in made.strategy.center, bits(module.state_dict())

    first, second = run_ranks(lambda: (train(False), train(True))[1], 2)
    assert first == second
    assert first[0]
