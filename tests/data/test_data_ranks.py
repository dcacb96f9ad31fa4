"""Two ranks that train: each draws what its sampling says, epochs differ, and one rank downloads."""

import functools
import hashlib
import http.server
import socketserver
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from official_data import CIFAR10_FOLDER, pack, write_cifar10
from ranks import end_ranks, run_ranks
from toys import quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.lab.data import CenterCrop, CIFAR10DataModule
from lightning_easgd.lab.data.randomness import EpochKeys
from lightning_easgd.lab.models import Classifier, StridedNet

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore:verify=False:UserWarning")]
PLAIN = {"train_transform": CenterCrop(32), "eval_transform": CenterCrop(32), "val_fraction": 0.0}


class Recorder(Callback):
    def __init__(self):
        self.epochs = []
        self.samplers = set()

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, module, batch, index):
        self.samplers.add(type(trainer.train_dataloader.sampler))
        self.epochs[-1] += [hashlib.md5(image.numpy().tobytes()).hexdigest() for image in batch[0]]


def train(data: CIFAR10DataModule):
    torch.manual_seed(0)
    recorder = Recorder()
    network = StridedNet(image_shape=data.image_shape, channels=(4, 4), hidden=8)
    model = Classifier(network, functools.partial(torch.optim.SGD, lr=0.01))
    trainer = quiet_trainer(
        strategy=EASGDStrategy(tau=2), devices=2, max_epochs=2, log_every_n_steps=1, callbacks=[recorder],
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert recorder.samplers == {EpochKeys}
    return recorder.epochs, next(network.parameters()).tolist()


def test_sampling_and_epochs_under_the_trainer(tmp_path):
    write_cifar10(tmp_path)

    def run(sampling, **transforms):
        module = CIFAR10DataModule(root=tmp_path, batch_size=10, sampling=sampling, verify=False, **transforms)
        return train(module)

    everything = None
    for sampling in ("full", "sharded", "dynamic"):
        (first, center), (second, same) = run_ranks(functools.partial(run, sampling, **PLAIN), 2)
        assert center == same
        for own, other in zip(first, second, strict=True):
            together = sorted(own + other)
            if sampling == "full":
                everything = everything or sorted(own)
                assert sorted(own) == sorted(other) == everything
                assert own != other
            else:
                assert together == everything
        assert first[0] != first[1]
    (first, _), (second, _) = run_ranks(functools.partial(run, "full"), 2)
    crops = [set(epoch) for epoch in (*first, *second)]
    assert all(len(one & other) < 15 for one in crops for other in crops if one is not other)  # 1 in 50 by chance


@pytest.fixture
def site(tmp_path):
    write_cifar10(tmp_path / "made")
    pack(tmp_path / "made" / CIFAR10_FOLDER, tmp_path / "cifar-10-python.tar.gz")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_request(self, *arguments):
            requests.append(self.path)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()
        thread.join()


def test_one_rank_downloads_for_all(tmp_path, site):
    url, requests = site
    data = functools.partial(
        CIFAR10DataModule, root=tmp_path / "root", download=True, verify=False, url=url, batch_size=10, **PLAIN
    )
    (first, _), (second, _) = run_ranks(lambda: train(data()), 2)
    assert sorted(first[0]) == sorted(second[0])
    assert requests == ["/cifar-10-python.tar.gz"]
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["cifar-10-python.tar.gz"]


def test_missing_data_end_every_rank(tmp_path):
    outcomes = end_ranks(lambda: train(CIFAR10DataModule(root=tmp_path / "nowhere", verify=False, **PLAIN)), 2)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    assert any("set download=true" in outcome.error for outcome in outcomes if outcome.error)
