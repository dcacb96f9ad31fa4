"""The figures of ``easgd-stability``: ADMM beside EASGD, the stable regions, the center's variance against p."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_easgd.lab.demo_extra import blank_figure
from lightning_easgd.stability import admm, center_error, round_robin, synchronous

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_INCHES = (4.4, 3.8)


def draw(directory: Path, points: int = 120) -> list[Path]:
    """Draw all figures as PNG files, with so many points along each side of a map; return the files."""
    figures = {
        "admm.png": _admm(points),
        "regions.png": _regions(points),
        "center_variance.png": _center_variance(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=90)
    return [directory / name for name in figures]


def _admm(points: int) -> "Figure":
    """The paper's figure 1, and a trajectory that seems to converge."""
    figure, (three, eight, trajectory) = blank_figure(_INCHES, 3)
    lr, rho = np.linspace(0, 0.01, points + 1)[1:], np.linspace(0, 10, points + 1)[1:]
    for axes, workers in ((three, 3), (eight, 8)):
        radii = admm.radius(workers, lr[None, :], rho[:, None])
        image = axes.pcolormesh(lr, rho, radii, cmap="viridis", shading="nearest", rasterized=True)
        axes.contour(lr, rho, radii, levels=[1 + 1e-7], colors="white", linewidths=1)
        axes.set(title=f"ADMM, p = {workers}: spectral radius", xlabel="learning rate η", ylabel="penalty ρ")
        figure.colorbar(image, ax=axes, format="%.4f")
    turns = np.arange(0, 50_001, 25)
    chaotic = admm.center_trajectory(3, 0.001, 2.5, start=1000, turns=50_000)
    elastic = round_robin.center_trajectory(3, 0.001, 0.0025, start=1000, turns=50_000)
    trajectory.plot(turns, np.abs(chaotic[turns]), label="ADMM", color="C3", linewidth=1)
    trajectory.plot(turns, np.abs(elastic[turns]), label="EASGD", color="black")
    trajectory.set(
        title="p = 3, η = 0.001, ρ = 2.5", xlabel="turns", ylabel="|center|, start at 1000", yscale="log",
        ylim=(1e-3, None),
    )  # fmt: skip
    trajectory.legend()
    return figure


def _regions(points: int) -> "Figure":
    figure, (plain, momentum, period) = blank_figure(_INCHES, 3)
    scaled_lr = np.linspace(0, 2, points)
    for workers in (1, 4, 16):
        plain.plot(scaled_lr, synchronous.largest_moving_rate(workers, scaled_lr), label=f"synchronous, p = {workers}")
    in_turn = round_robin.largest_moving_rate(scaled_lr)
    plain.plot(scaled_lr, in_turn, label="round-robin, any p", color="black", linestyle="--")
    plain.set(title="EASGD, τ = 1: stable below the line", ylim=(0, 1.05))
    for index, delta in enumerate((0.0, 0.5, 0.9, 0.99)):
        _boundary(momentum, points, f"C{index}", f"δ = {delta:g}", momentum=delta, tau=1)
    momentum.set(title="EAMSGD, p = 4, τ = 1", ylim=(0, 0.45))
    for index, tau in enumerate((1, 2, 10)):
        _boundary(period, points, f"C{index}", f"τ = {tau}", momentum=0.9, tau=tau)
    period.set(title="EAMSGD, p = 4, δ = 0.9", ylim=(0, 0.45))
    for axes in (plain, momentum, period):
        axes.set(xlabel="learning rate × curvature, ηh", ylabel="moving rate α, β = pα")
        axes.legend(fontsize="small")
    return figure


def _boundary(axes: "Axes", points: int, color: str, label: str, *, momentum: float, tau: int) -> None:
    """The boundary of the stable region of four workers."""
    scaled_lr, alpha = np.linspace(0.005, 2.2, points), np.linspace(0.002, 0.6, points)
    radii = synchronous.radius(
        scaled_lr[None, :], alpha[:, None], 4 * alpha[:, None], workers=4, momentum=momentum, tau=tau
    )
    axes.contour(scaled_lr, alpha, radii, levels=[1.0], colors=color)
    axes.plot([], [], color=color, label=label)


def _center_variance() -> "Figure":
    figure, (against_workers, against_steps) = blank_figure(_INCHES, 2)
    workers = np.unique(np.geomspace(1, 1024, 60).round())
    lr = 0.1
    for beta in (0.1, 0.5, 0.9, 1.5):
        variance = center_error.steady_variance(lr=lr, curvature=1.0, alpha=beta / workers, workers=workers)
        (line,) = against_workers.loglog(workers, variance, label=f"β = {beta:g}")
        limit = center_error.many_workers_limit(lr, beta) / workers
        against_workers.loglog(workers, limit, color=line.get_color(), linestyle=":", linewidth=1)
    against_workers.loglog(workers, lr / (2 - lr) / workers, color="black", linestyle="--", label="mini-batches of p")
    against_workers.set(
        title="steady state, ηh = 0.1 (dotted: p → ∞)", xlabel="workers p", ylabel="variance of the center, σ²/h²"
    )
    steps = np.unique(np.geomspace(1, 3000, 200).round())
    for count in (1, 4, 16, 64):
        variance = center_error.variance(steps, lr=lr, curvature=1.0, alpha=0.9 / count, workers=count)
        against_steps.loglog(steps, variance, label=f"p = {count}")
    against_steps.set(title="β = 0.9, ηh = 0.1", xlabel="steps t", ylabel="variance of the center, σ²/h²")
    for axes in (against_workers, against_steps):
        axes.legend(fontsize="small")
    return figure
