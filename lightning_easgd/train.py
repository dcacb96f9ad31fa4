"""``python -m lightning_easgd.train``: see :mod:`lightning_easgd.lab.train`."""

from lightning_easgd.lab.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
