"""The strategies for ``lightning.fabric.Fabric``, whose training loop is the user's own.

.. code-block:: python

    fabric = Fabric(strategy=EASGDStrategy(tau=10), devices=4)
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    for batch in batches:
        optimizer.zero_grad()
        fabric.backward(loss(model, batch))
        optimizer.step()  # every tau steps with an exchange around it
    with fabric.strategy.center_weights(model):
        evaluate(model)
    fabric.save("file.ckpt", {"model": model, "optimizer": optimizer})  # the center, and rank 0's optimizer
    fabric.strategy.finalize()

The module is left unwrapped. What all ranks do at the same point of their work (``center_weights``, ``fabric.save`` and
``fabric.load``, ``finalize``) they may come to after different numbers of steps. An error on one rank reaches the
others at their next exchange or at one of these points, so that a training should end with ``finalize()``.
"""

from lightning_easgd.strategies.trees.fabric_tree import (
    DownpourStrategy,
    EASGDModelParallelStrategy,
    EASGDStrategy,
    LocalStrategy,
)

__all__ = ["DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy"]
