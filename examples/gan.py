"""A GAN with two optimizers under elastic averaging: each optimizer has its own clock and its own center.

    python examples/gan.py

Two workers learn a ring of eight Gaussians in the plane (synthetic data, seconds on a CPU). Optimization is manual, and
the discriminator makes two steps for each step of the generator.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_easgd  # noqa: F401  registers the name "easgd"

MODES = 8
RADIUS = 2.0
SPREAD = 0.1
NOISE = 8


def ring(samples: int, seed: int) -> Tensor:
    """Points from eight Gaussians on a circle, shape (samples, 2)."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randint(MODES, (samples,), generator=generator) * (2 * torch.pi / MODES)
    centers = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centers + SPREAD * torch.randn(samples, 2, generator=generator)


def network(inputs: int, outputs: int) -> nn.Sequential:
    """A perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


class RingGAN(L.LightningModule):
    """The non-saturating GAN, with two optimizers stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = network(NOISE, 2)
        self.discriminator = network(2, 1)

    def forward(self, samples: int) -> Tensor:
        """Generated points, shape (samples, 2)."""
        return self.generator(torch.randn(samples, NOISE, device=self.device))

    def training_step(self, batch: Tensor, index: int) -> None:
        """A step of the discriminator, and after every second one a step of the generator."""
        for_generator, for_discriminator = self.optimizers()
        softplus = nn.functional.softplus
        real, fake = self.discriminator(batch), self.discriminator(self(len(batch)).detach())
        self.descend(for_discriminator, softplus(-real).mean() + softplus(fake).mean())
        if index % 2:
            self.descend(for_generator, softplus(-self.discriminator(self(len(batch)))).mean())

    def descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """One optimizer step."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: Tensor, index: int) -> None:
        """How far the points that the center generates are from the ring."""
        distance = (self(len(batch)).norm(dim=1) - RADIUS).abs().mean()
        self.log("distance", distance, batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers of each worker; parameters are averaged with the clock of their own optimizer."""
        return [
            torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.99))
            for network in (self.generator, self.discriminator)
        ]


def main() -> None:
    """Train, then say how far the center's points are from the ring."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy="easgd", accelerator="cpu", devices=2, max_epochs=8, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    model = RingGAN()
    loaders = (
        DataLoader(ring(12800, seed=1), batch_size=64, shuffle=True),
        DataLoader(ring(1024, seed=2), batch_size=512),
    )
    (before,) = trainer.validate(model, loaders[1], verbose=False)
    trainer.fit(model, *loaders)
    if trainer.is_global_zero:
        after = trainer.callback_metrics["distance"]
        print(f"mean distance from the ring: {before['distance']:.2f} before, {after:.2f} after training")
        print(f"{trainer.strategy.communication.exchanges} exchanges of two optimizers")


if __name__ == "__main__":
    main()
