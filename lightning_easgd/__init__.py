"""Elastic Averaging SGD as a PyTorch Lightning strategy."""
