"""What the extra ``demo`` brings: matplotlib and pandas, imported only where figures and tables need them."""

import contextlib
from collections.abc import Iterator

__all__ = ["MissingExtraError", "demo_extra"]


class MissingExtraError(ModuleNotFoundError):
    """A package is missing that an extra brings; the message says what to install."""


@contextlib.contextmanager
def demo_extra() -> Iterator[None]:
    """Context in which a missing package is one sentence.

    Raises:
        MissingExtraError: Which says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingExtraError(f"{package} is not installed; run pip install 'lightning_easgd[demo]'") from error
