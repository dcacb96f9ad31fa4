"""What users read of the averaging, under a Trainer and under Fabric."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_easgd.averagers import Averager, Averaging, Statistics

__all__ = ["CenterReadings", "named_center"]


class CenterReadings:
    """Reads the averaging under way, if there is one."""

    _averaging: Averaging | None
    _statistics: Statistics
    _launched: Statistics | None = None  # what rank 0 of the ranks that this process spawned or forked has said

    if TYPE_CHECKING:

        @property
        def only_launches(self) -> bool: ...  # noqa: D102

    @property
    def communication(self) -> Statistics:
        """What this rank has spent on communication in the latest fit.

        In the process that only spawned or forked the ranks it is what rank 0 has spent.

        Raises:
            RuntimeError: If this process only spawns or forks the ranks, and they have not ended a fit.
        """
        if not self.only_launches:
            return self._statistics
        if self._launched is None:
            raise RuntimeError(
                f"{type(self).__name__}.communication: the ranks spend it, and this process only spawns or forks them;"
                " after Trainer.fit it is there, with Fabric return it from the launched function."
            )
        return self._launched

    def elastic_distance(self) -> float | None:
        r"""The distance :math:`\|x^i - \tilde x\|_2` of this worker at its last exchange, None before the first.

        It makes no communication and waits for none.

        Raises:
            RuntimeError: If this process only spawns or forks the ranks.
        """
        if self.only_launches:
            raise RuntimeError(
                f"{type(self).__name__}.elastic_distance(): there is no worker in the process that only spawns or forks"
                " the ranks; read it in a callback."
            )
        distances = [averager.elastic_distance() for averager in self._averagers]
        known = [distance for distance in distances if distance is not None]
        return math.hypot(*known) if known else None

    def take_launched(self, statistics: Statistics | None) -> None:
        """Keep what rank 0 has spent, or forget it before ranks are launched for a fit."""
        self._launched = statistics

    @property
    def _averagers(self) -> list[Averager]:
        return [] if self._averaging is None else list(self._averaging.averagers.values())


def named_center(
    parameters: Iterable[tuple[str, nn.Parameter]],
    averagers: Iterable[Averager],
    replaced: Mapping[Tensor, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The center of each averaged parameter, by the parameter's name or else its place in the optimizers.

    Args:
        parameters: The module's, by name.
        averagers: What holds the center.
        replaced: What is to stand for the center of some parameters.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters}
    return {
        names.get(parameter, f"optimizers.{number}.{index}"): replaced.get(parameter, value).to(value.dtype)
        for number, averager in enumerate(averagers)
        for index, (parameter, value) in enumerate(zip(averager.parameters, averager.center_values(), strict=True))
    }
