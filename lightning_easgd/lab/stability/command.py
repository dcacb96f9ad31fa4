"""`easgd-stability`: the figures of the stability analysis, and the verdict on one choice of hyper-parameters."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from lightning_easgd.stability.advice import Setting, moving_rates_by_rule, round_robin_is_stable

__all__ = ["main"]

_USAGE = """usage: easgd-stability draw [directory=outputs/stability] [points=120]
       easgd-stability check lr=0.1 curvature=10 workers=8 [tau=10] [alpha=...] [beta=...] [momentum=0]
                             [steps=1000] [noise=1]
draw:  figures of ADMM's instability, of the stable regions, and of the center's variance
check: whether the hyper-parameters are stable for every curvature up to the one given, by what margin, and which
       moving rate each rule would choose; exit status 1 if they are not stable"""
_WHOLE = ("workers", "tau", "steps", "points")


def main() -> None:
    """Runs the command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int | str:
    """Runs the command.

    Args:
        arguments: The words after the command's name.

    Returns:
        The exit status, or the sentence to end with.
    """
    if not arguments or arguments[0] not in ("draw", "check"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help", "help")
        if asked:
            print(_USAGE)
        return 0 if asked else _USAGE
    try:
        return _draw(arguments[1:]) if arguments[0] == "draw" else _check(arguments[1:])
    except (ValueError, ModuleNotFoundError) as error:
        return f"easgd-stability: {error}"


def _draw(words: Sequence[str]) -> int:
    # Matplotlib is an extra, which `check` does without.
    from lightning_easgd.lab.stability.figures import draw  # noqa: PLC0415

    given = _parse(words, ["directory", "points"])
    for path in draw(Path(given.get("directory", "outputs/stability")), given.get("points", 120)):
        print(path)
    return 0


def _check(words: Sequence[str]) -> int:
    given = _parse(words, [field.name for field in fields(Setting)])
    missing = [name for name in ("lr", "curvature", "workers") if name not in given]
    if missing:
        raise ValueError(f"check needs {', '.join(f'{name}=...' for name in missing)}")
    setting = Setting(**given)
    with np.errstate(over="ignore", invalid="ignore"):  # of an unstable setting
        lines = _report(setting)
    print("\n".join(lines))
    return 0 if setting.is_stable else 1


def _parse(words: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} cannot be read; write key=value")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(known)}"
            raise ValueError(f"there is no key {key!r}; {hint}")
        try:
            given[key] = value if key == "directory" else int(value) if key in _WHOLE else float(value)
        except ValueError as error:
            number = "whole number" if key in _WHOLE else "number"
            raise ValueError(f"{key}={value}: this is no {number}") from error
    return given


def _report(setting: Setting) -> list[str]:
    alpha, beta = setting.rates
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
    choices = [("this setting", setting)]
    choices += [
        (name, setting.with_alpha(rate)) for name, rate in moving_rates_by_rule(setting).items() if isfinite(rate)
    ]
    for name, choice in choices:
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


if __name__ == "__main__":
    main()
