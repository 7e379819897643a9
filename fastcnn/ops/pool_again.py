"""Pools of pending activations that backward makes again, so that the convolutions that read them need not keep them.

What they are made of is kept anyway. On CPU alone: a GPU is faster with what it kept. Between the pool and its readers
the recipe lies on the tensor itself, as long as nobody writes to that. Readers of one tensor follow one another in
backward: it is made once for all of them.
"""

import torch

from fastcnn.ops import max_pool2d as maximum
from fastcnn.ops import pending, pending_pool

ATTRIBUTE = "_fastcnn_pool_again"


class Recipe:
    """How to make pools of z = f(x * scale + shift) * gate, one after the other."""

    def __init__(self, activation, slope, pools, backend):
        self.activation, self.slope, self.pools, self.backend = activation, slope, pools, backend
        self.readers = self.served = 0
        self.made = None

    def make(self, tensors, wanted=True):
        """The tensor, of (x, scale, shift, gate); every reader calls it once per backward, wanted or not."""
        made = self.made
        if made is None and wanted:
            made = self._compute(*tensors)
        self.served = (self.served + 1) % self.readers
        self.made = None if self.served == 0 else made
        return made

    def _compute(self, x, scale, shift, gate):
        e = pending.Expression(x, scale, shift, self.activation, self.slope, gate)
        _, y, _ = pending_pool.pooled(e, self.pools[0], self.backend)
        for pool in self.pools[1:]:
            y, _ = pool.forward(y, self.backend)
        return y


def note(y, expression, pool, backend):
    """Remember that y is this pool of an expression without right side."""
    if y.requires_grad:
        e = expression
        tensors = tuple(None if t is None else t.detach() for t in (e.x, e.scale, e.shift, e.gate))
        setattr(y, ATTRIBUTE, (Recipe(e.activation, e.slope, (pool,), backend), tensors, y._version))


def max_pool2d(x, window, ceil_mode):
    """The maximum of every window of x, which has a recipe, and so has the result; keeps which taps they came from."""
    recipe, tensors = recipe_of(x)
    pool = pending_pool.MaxPool(window, ceil_mode)
    if recipe.backend == "cpu" and maximum.cpu_refusal(x, window) is None:
        y, _ = maximum.MaxPool2dFunction.apply(x, window, ceil_mode, recipe.backend)
    else:
        y = torch.max_pool2d(x, *(window[i : i + 2] for i in (0, 2, 4, 6)), ceil_mode)
    longer = Recipe(recipe.activation, recipe.slope, (*recipe.pools, pool), recipe.backend)
    setattr(y, ATTRIBUTE, (longer, tensors, y._version))
    return y


def recipe_of(y):
    """(Recipe, its tensors), or (None, ()) of what must be kept."""
    recipe, tensors, version = getattr(y, ATTRIBUTE, (None, (), None))
    # tensors of inference mode have no version, nor a recipe
    return (recipe, tensors) if recipe is not None and version == y._version else (None, ())
