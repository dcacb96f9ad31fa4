"""The command easgd-stability and its figures."""
