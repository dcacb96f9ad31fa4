"""The figures of ``easgd-stability``: ADMM beside EASGD, the stable regions, the center's variance against p."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_easgd.lab.figure_style import (
    METHODS,
    LineStyle,
    blank_figure,
    legend_under,
    method_styles,
    plot,
    readable_log,
    save,
    value_styles,
)
from lightning_easgd.stability import admm, center_error, round_robin, synchronous

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_LOWEST, _HIGHEST = 1e-3, 1e7  # of the trajectories: what seems to converge, and what is lost


def draw(directory: Path, points: int = 120) -> list[Path]:
    """Draw all figures as PNG files, with so many points along each side of a map; return the files."""
    figures = {
        "admm.png": _admm(points),
        "regions.png": _regions(points),
        "center_variance.png": _center_variance(),
    }
    return [save(figure, directory / name) for name, figure in figures.items()]


def _admm(points: int) -> "Figure":
    """The paper's figure 1, and a trajectory that seems to converge."""
    figure, (three, eight, trajectory) = blank_figure(3, "Round-robin ADMM diverges where EASGD does not")
    lr, rho = np.linspace(0, 0.01, points + 1)[1:], np.linspace(0, 10, points + 1)[1:]
    for axes, workers in ((three, 3), (eight, 8)):
        radii = admm.radius(workers, lr[None, :], rho[:, None])
        image = axes.pcolormesh(1000 * lr, rho, radii, cmap="viridis", shading="nearest", rasterized=True)
        axes.contour(1000 * lr, rho, radii, levels=[1 + 1e-7], colors="white", linewidths=1.5)
        axes.set(title=f"ADMM, p = {workers}", xlabel="learning rate η, 10⁻³", ylabel="penalty ρ")
        figure.colorbar(image, ax=axes, format="%.3f", label="spectral radius")
    turns = np.arange(0, 50_001, 25)
    chaotic = admm.center_trajectory(3, 0.001, 2.5, start=1000, turns=50_000)
    elastic = round_robin.center_trajectory(3, 0.001, 0.0025, start=1000, turns=50_000)
    in_turn = METHODS["round_robin"]
    (other,) = method_styles(["ADMM, round-robin"]).values()
    for values, style in ((chaotic, other), (elastic, in_turn)):
        plot(trajectory, turns / 1000, np.abs(values[turns]), style, linestyle="-", linewidth=1)
    trajectory.set(
        title="p = 3, η = 0.001, ρ = 2.5", xlabel="thousands of turns", ylabel="|center|, which starts at 1000",
        ylim=(_LOWEST, _HIGHEST),
    )  # fmt: skip
    readable_log(trajectory.yaxis)
    legend_under(trajectory)
    return figure


def _regions(points: int) -> "Figure":
    figure, (plain, momentum, period) = blank_figure(3, "Where training is stable: left of and below each line")
    scaled_lr = np.linspace(0, 2, points)
    numbers = (1, 4, 16)
    for workers, style in zip(numbers, value_styles([f"synchronous, p = {p}" for p in numbers]), strict=True):
        plot(plain, scaled_lr, synchronous.largest_moving_rate(workers, scaled_lr), style)
    plot(plain, scaled_lr, round_robin.largest_moving_rate(scaled_lr), METHODS["round_robin"])
    plain.set(title="EASGD, τ = 1", ylim=(0, 1.05))
    deltas = (0.0, 0.5, 0.9, 0.99)
    for delta, style in zip(deltas, value_styles([f"δ = {delta:g}" for delta in deltas]), strict=True):
        _boundary(momentum, points, style, momentum=delta, tau=1)
    momentum.set(title="EAMSGD, p = 4, τ = 1", ylim=(0, 0.45))
    taus = (1, 2, 10)
    for tau, style in zip(taus, value_styles([f"τ = {tau}" for tau in taus]), strict=True):
        _boundary(period, points, style, momentum=0.9, tau=tau)
    period.set(title="EAMSGD, p = 4, δ = 0.9", ylim=(0, 0.45))
    for axes in (plain, momentum, period):
        axes.set(xlabel="learning rate × curvature, ηh", ylabel="moving rate α = β / p")
        legend_under(axes)
    return figure


def _boundary(axes: "Axes", points: int, style: LineStyle, *, momentum: float, tau: int) -> None:
    """The boundary of the stable region of four workers."""
    scaled_lr, alpha = np.linspace(0.005, 2.2, points), np.linspace(0.002, 0.6, points)
    radii = synchronous.radius(
        scaled_lr[None, :], alpha[:, None], 4 * alpha[:, None], workers=4, momentum=momentum, tau=tau
    )
    axes.contour(scaled_lr, alpha, radii, levels=[1.0], colors=style.color, linestyles=style.dashes)
    axes.plot([], [], color=style.color, linestyle=style.dashes, label=style.label)


def _center_variance() -> "Figure":
    figure, (against_workers, against_steps) = blank_figure(2, "Noise of the center, synchronous EASGD, ηh = 0.1")
    workers = np.unique(np.geomspace(1, 1024, 60).round())
    lr, betas = 0.1, (0.1, 0.5, 0.9, 1.5)
    for beta, style in zip(betas, value_styles([f"β = {beta:g}" for beta in betas]), strict=True):
        variance = center_error.steady_variance(lr=lr, curvature=1.0, alpha=beta / workers, workers=workers)
        plot(against_workers, workers, variance, style)
        limit = center_error.many_workers_limit(lr, beta) / workers
        against_workers.plot(workers, limit, color=style.color, linestyle=":", linewidth=1)
    against_workers.plot([], color="gray", linestyle=":", label="p → ∞")
    batches = lr / (2 - lr) / workers
    plot(against_workers, workers, batches, METHODS["ddp"], label="one process, batches × p", markersize=0)
    against_workers.set(title="in the steady state", xlabel="workers p", ylabel="variance of the center, σ²/h²")
    steps = np.unique(np.geomspace(1, 3000, 200).round())
    counts = (1, 4, 16, 64)
    for count, style in zip(counts, value_styles([f"p = {count}" for count in counts]), strict=True):
        variance = center_error.variance(steps, lr=lr, curvature=1.0, alpha=0.9 / count, workers=count)
        plot(against_steps, steps, variance, style)
    against_steps.set(title="from the start, β = 0.9", xlabel="steps t", ylabel="variance of the center, σ²/h²")
    for axes in (against_workers, against_steps):
        axes.set(xscale="log", yscale="log")
        readable_log(axes.xaxis)
        readable_log(axes.yaxis)
        legend_under(axes)
    return figure
