"""``python -m lightning_easgd.plots``: see :mod:`lightning_easgd.lab.plots`."""

from lightning_easgd.lab.plots import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
