"""Networks, and the module that trains them."""

from lightning_easgd.models.classifier import Classifier
from lightning_easgd.models.digits_net import DigitsNet

__all__ = ["Classifier", "DigitsNet"]
