"""``easgd-stability``: the figures of the stability analysis, and the verdict on one choice of hyper-parameters."""

import sys
from functools import partial
from math import isfinite
from pathlib import Path

import numpy as np

from lightning_easgd.lab.key_values import Actions, Examples, Values, build, check_new, run_action
from lightning_easgd.stability.advice import Setting, moving_rates_by_rule, round_robin_is_stable

__all__ = ["main", "run"]

_FIGURES = ("admm.png", "regions.png", "center_variance.png")


def main() -> None:
    """Run the command."""
    sys.exit(run(sys.argv[1:]))


def _draw(directory: Path = Path("outputs/stability"), points: int = 120, overwrite: bool = False) -> int:
    """Figures of ADMM's instability, of the stable regions, and of the center's variance.

    Args:
        directory: Where the PNG files go.
        points: Points along each side of a map.
        overwrite: Whether figures that are there already are replaced.
    """
    if points < 2:
        raise ValueError(f"points={points}: a map has 2 or more along each side")
    check_new(*(directory / name for name in _FIGURES), overwrite=overwrite)
    # Matplotlib is an extra, which `check` does without.
    from lightning_easgd.lab.stability.stability_figures import draw  # noqa: PLC0415

    print(*draw(directory, points), sep="\n")
    return 0


def _check(values: Values) -> int:
    """Whether the hyper-parameters are stable for every curvature up to the one given, and by what margin.

    Then which moving rate each rule would choose; the exit status is 1 if they are not stable.
    """
    setting = build(Setting, values)
    with np.errstate(over="ignore", invalid="ignore"):  # of an unstable setting
        lines = _report(setting)
    print("\n".join(lines))
    return 0 if setting.is_stable else 1


def _report(setting: Setting) -> list[str]:
    verdict = "stable" if setting.is_stable else "UNSTABLE"
    in_turn = {True: "stable", False: "UNSTABLE", None: "not computed"}[round_robin_is_stable(setting)]
    lines = [
        f"synchronous           {verdict}, for every curvature up to {setting.curvature:g}"
        f" (lr * curvature = {setting.scaled_lr:g})",
        f"  spectral radius     {setting.radius_per_step:.6f} per step, at curvature {setting.curvature:g}",
        f"  margin in lr        stable below lr = {setting.largest_lr:.4g},"
        f" {setting.largest_lr / setting.lr:.3g} times this lr",
        f"  margin in alpha     stable below alpha = {setting.largest_alpha:.4g}, for beta = p * alpha",
        f"round-robin order     {in_turn}",
        "",
        f"  {'rule':<18}{'alpha':>9}{'beta':>9}  {'synchronous':<12}{'radius':>9}  error of the center",
    ]
    choices = {"this setting": setting} | {
        name: setting.with_alpha(rate) for name, rate in moving_rates_by_rule(setting).items() if isfinite(rate)
    }
    for name, choice in choices.items():
        alpha, beta = choice.rates
        lines.append(
            f"  {name:<18}{alpha:>9.4g}{beta:>9.4g}  {'stable' if choice.is_stable else 'UNSTABLE':<12}"
            f"{choice.radius_per_step:>9.6f}  {choice.center_error:.4g}"
        )
    return [
        *lines,
        "",
        f"Error: root mean square after {setting.steps} steps, in units of the first error; the gradients' noise is"
        f" {setting.noise:g} times the first gradient.",
        "A quadratic, one dimension at a time: the largest curvature decides on stability, not on speed.",
    ]


_PURPOSE = (
    "says where elastic averaging is stable: a verdict on one choice of hyper-parameters, and figures of regions."
)
_ACTIONS: Actions = {"draw": (_draw,), "check": (_check, Setting)}
_EXAMPLES: Examples = {
    "draw": ("", "directory=figures", "directory=figures points=40 overwrite=true"),
    "check": (
        "lr=0.1 curvature=10 workers=8 tau=10 alpha=0.1",
        "lr=0.1 curvature=10 workers=8 tau=10 alpha=0.1 momentum=0.9",
        "lr=0.05 curvature=30 workers=4 tau=1 alpha=0.2 noise=2",
    ),
}
run = partial(run_action, "easgd-stability", _PURPOSE, _ACTIONS, _EXAMPLES)

if __name__ == "__main__":
    main()
