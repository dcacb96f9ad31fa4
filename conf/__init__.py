"""Hydra configuration of the commands, shipped as the package `lightning_easgd.conf`."""
