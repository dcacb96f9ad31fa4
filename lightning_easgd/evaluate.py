"""``python -m lightning_easgd.evaluate``: see :mod:`lightning_easgd.lab.evaluate`."""

from lightning_easgd.lab.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
