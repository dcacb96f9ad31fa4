"""Tables of turns: each turn as it was, and for each method its ratios to a reference of the same round."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.methods import LOCAL
from harness.turns import Turn

__all__ = ["Row", "every_turn", "median_and_range", "ratios"]

Row = dict[str, Any]


def every_turn(setting: Mapping[str, Any], turns: Iterable[Turn]) -> list[Row]:
    """One row for each turn; values are means of the ranks, bytes and memory those of the rank that has most."""
    return [
        {
            **setting,
            "round": turn.round,
            "method": turn.method,
            "seconds": statistics.fmean(turn.seconds),
            "cpu_seconds": statistics.fmean(turn.cpu_seconds),
            "bytes_per_step": max(turn.bytes_per_step),
            "peak_bytes": max(turn.peak_bytes),
        }
        for turn in turns
    ]


def ratios(setting: Mapping[str, Any], turns: Sequence[Turn], *, reference: str = LOCAL) -> list[Row]:
    """One row for each method: medians over the rounds, with the smallest and the largest ratio.

    Args:
        setting: The first columns.
        turns: Of all methods.
        reference: Label of the method that the ratios are to.
    """
    base = {turn.round: turn for turn in turns if turn.method == reference}
    lines = []
    for name in dict.fromkeys(turn.method for turn in turns):
        own = [turn for turn in turns if turn.method == name and turn.round in base]
        if not own:  # cut off in the first round
            continue
        middle, low, high = median_and_range(
            statistics.fmean(turn.seconds) / statistics.fmean(base[turn.round].seconds) for turn in own
        )
        cpu = statistics.median(
            statistics.fmean(turn.cpu_seconds) / statistics.fmean(base[turn.round].cpu_seconds) for turn in own
        )
        lines.append(
            {
                **setting,
                "method": name,
                "ms_per_step": round(1e3 * statistics.median(statistics.fmean(turn.seconds) for turn in own), 3),
                "ratio": round(middle, 3),
                "ratio_min": round(low, 3),
                "ratio_max": round(high, 3),
                "cpu_ms_per_step": round(
                    1e3 * statistics.median(statistics.fmean(turn.cpu_seconds) for turn in own), 3
                ),
                "cpu_ratio": round(cpu, 3),
                "bytes_per_step": _whole(max(own[0].bytes_per_step)),
                "peak_MB": _whole(statistics.median(max(turn.peak_bytes) for turn in own) / 1e6),
            }
        )
    return lines


def median_and_range(values: Iterable[float]) -> tuple[float, float, float]:
    """The median, the smallest and the largest."""
    values = list(values)
    return statistics.median(values), min(values), max(values)


def _whole(value: float) -> float:
    return value if math.isnan(value) else round(value)
