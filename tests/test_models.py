"""The networks have the published numbers of parameters and the shapes of the paper."""

import functools

import pytest
import torch
from application import quiet_trainer, tiny_classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.models import (
    Classifier,
    ConvNet7,
    ConvNet11,
    DigitsNet,
    ImageNetStem,
    ResNet18,
    ResNet50,
    SmallImageStem,
    StridedNet,
)

pytestmark = pytest.mark.timeout(60)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (ConvNet7, 351_946),
        (ConvNet11, 61_128_808),
        (StridedNet, 89_834),
        (DigitsNet, 38_282),
        (ResNet18, 11_689_512),
        (ResNet50, 25_557_032),
        # The 7x7 stem has 64 x 3 x 49 weights, the 3x3 stem 64 x 3 x 9; the last layer 512 (2048) x classes + classes.
        (lambda: ResNet18(SmallImageStem(), 10), 11_689_512 - 64 * 3 * 40 - 513 * 990),
        (lambda: ResNet50(SmallImageStem(), 100), 25_557_032 - 64 * 3 * 40 - 2049 * 900),
        (lambda: ResNet18(ImageNetStem(1), 1000), 11_689_512 - 64 * 2 * 49),
    ],
)
def test_parameter_counts(make, count):
    assert parameters(make()) == count


def shapes(network: nn.Module, image_shape, kinds) -> list[tuple[int, ...]]:
    """(channels, size) after each layer of some kinds."""
    seen = []
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:3])))
    network.eval()
    with torch.no_grad():
        network(torch.zeros(2, *image_shape))
    return seen


LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.Linear)


def test_layers_of_the_papers_cifar_network():
    # The paper's (3,28)C(64,24)P(64,12)C(128,8)P(128,4)C(64,2)D(256,1)S(10,1)
    network = ConvNet7()
    assert shapes(network, (3, 28, 28), LAYERS) == [
        (64, 24), (64, 12), (128, 8), (128, 4), (64, 2), (256,), (10,),
    ]  # fmt: skip
    assert [type(module) for module in network.head] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert network.head[3].p == 0.5


def test_layers_of_the_papers_imagenet_network():
    # (3,221)C(96,108)P(96,36)C(256,32)P(256,16)C(384,14)C(384,13)C(256,12)P(256,6)D(4096,1)D(4096,1)S(1000,1)
    network = ConvNet11()
    assert shapes(network, (3, 221, 221), LAYERS) == [
        (96, 108), (96, 36), (256, 32), (256, 16), (384, 14), (384, 13), (256, 12), (256, 6), (4096,), (4096,), (1000,),
    ]  # fmt: skip
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(("make", "bias", "layers"), [(ConvNet7, 0.0, 5), (ConvNet11, 0.1, 8)])
def test_biases_start_as_in_the_paper_and_every_layer_but_the_last_has_a_relu(make, bias, layers):
    network = make()
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == layers
    for module in weighted:
        assert torch.equal(module.bias, torch.full_like(module.bias, bias))
        assert module.weight.std() > 0
    assert sum(isinstance(module, nn.ReLU) for module in network.modules()) == layers - 1


def test_layers_of_the_strided_network():
    assert shapes(StridedNet(), (3, 28, 28), LAYERS) == [(16, 14), (32, 7), (64, 4), (64,), (10,)]


@pytest.mark.parametrize(
    ("make", "image_shape", "sizes"),
    [
        (ResNet18, (3, 224, 224), [(64, 56), (128, 28), (256, 14), (512, 7)]),
        (ResNet50, (3, 224, 224), [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
        (lambda: ResNet18(SmallImageStem(), 10), (3, 32, 32), [(64, 32), (128, 16), (256, 8), (512, 4)]),
        (lambda: ResNet50(SmallImageStem(1), 10), (1, 28, 28), [(256, 28), (512, 14), (1024, 7), (2048, 4)]),
    ],
)
def test_stages_of_the_resnets(make, image_shape, sizes):
    network, seen = make(), []
    for stage in network.stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:3])))
    network.eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, *image_shape))
    assert seen == sizes
    assert logits.shape == (1, network.num_classes)


def test_residual_blocks_add_their_input():
    block = ResNet18().stages[0][0]
    for layer in block.residual.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
    images = torch.rand(2, 64, 5, 5)
    assert torch.equal(block.eval()(images), images)  # BatchNorm of zeros is zero at the start


@pytest.mark.parametrize("make", [ConvNet7, ConvNet11])
def test_too_small_images_are_refused(make):
    with pytest.raises(
        ValueError, match=rf"{make.__name__}\(image_shape=\[3, 8, 8\]\): the convolutions leave nothing"
    ):
        make(image_shape=(3, 8, 8))


@pytest.mark.parametrize("network", [ConvNet7(dropout=0.0), StridedNet()], ids=lambda n: type(n).__name__)
def test_networks_learn_a_batch(network):
    torch.manual_seed(0)
    images, labels = torch.rand(20, 3, 28, 28), torch.arange(20) % 10
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.5


def test_every_parameter_gets_a_gradient():
    for network, shape in ((ConvNet7(), (3, 28, 28)), (ResNet50(SmallImageStem(), 10), (3, 32, 32))):
        network(torch.rand(4, *shape)).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def classifier(network: nn.Module, **arguments) -> Classifier:
    return Classifier(network, functools.partial(torch.optim.SGD, lr=0.1), **arguments)


def test_a_classifier_refuses_a_network_of_other_classes():
    with pytest.raises(ValueError, match=r"Classifier\(num_classes=100\): the network has 10 classes"):
        classifier(ConvNet7(), num_classes=100)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (classifier(DigitsNet(num_classes=4), num_classes=4), "num_classes=4"),
        (classifier(DigitsNet(image_shape=(1, 9, 9))), "image_shape="),
    ],
)
def test_training_on_other_data_is_refused_before_it_starts(model, says):
    with pytest.raises(ValueError, match=rf"Classifier\({says}.*DigitsDataModule has"):
        quiet_trainer(max_epochs=1).fit(model, datamodule=DigitsDataModule())


def test_data_that_tell_nothing_are_accepted():
    loader = DataLoader(TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 10), batch_size=10)
    trainer = quiet_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(tiny_classifier(), loader, loader)
    assert trainer.global_step == 2
