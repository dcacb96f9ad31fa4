r"""The paper's analysis of elastic averaging on quadratic and double-well losses: NumPy only, no torch.

One module per question: :mod:`.synchronous` and :mod:`.round_robin` (where EASGD and EAMSGD are stable), :mod:`.admm`
and :mod:`.downpour` (where ADMM and DOWNPOUR are not), :mod:`.center_error` (bias and variance of the center, double
averaging), :mod:`.multiplicative` (noise that grows with the gradient), :mod:`.double_well` (a center that is stuck
between two minima). :mod:`.advice` puts them together for one choice of hyper-parameters; the command
``easgd-stability`` is in the laboratory.

Notation of Zhang, Choromanska and LeCun, *Deep learning with Elastic Averaging SGD*, NeurIPS 2015 (arXiv:1412.6651),
"the paper", and of Zhang, *Distributed stochastic optimization for deep learning*, NYU 2016 (arXiv:1605.02216), "the
thesis": p workers, learning rate η, curvature h, moving rates α (worker) and β (center), β = pα unless stated
otherwise, communication period τ, momentum δ. On a quadratic only the product ηh matters: ``scaled_lr``.
"""
