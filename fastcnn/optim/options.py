"""What every optimizer takes besides torch's arguments, all in the same pass over memory:

* l1: the L1 penalty, l1 * sign(p) joins the gradient where L2 decay does; with weight_decay, the elastic net.
* max_grad_norm: all gradients of the optimizer are multiplied by min(1, max_grad_norm / (norm + 1e-6)), norm that of
  all of them together, as by torch.nn.utils.clip_grad_norm_ before the step (after a GradScaler's unscaling); .grad
  itself is not changed, and nothing waits for the GPU. `grad_norm` holds the norm.
* ema_decay: the Polyak average of each parameter, state "ema": average = ema_decay * average + (1 - ema_decay) * p,
  from the value before the first step on. `ema_weights` puts it into the model.
* bf16_copy: each parameter rounded to bf16 at the end of each step, state "bf16".

They stand in the param groups where they are asked for, and max_grad_norm in `defaults`: it belongs to no group.

Sources: Polyak and Juditsky 1992 (average); Pascanu et al. 2013 (clipping).
"""

import contextlib
import inspect

import torch

OPTIONS = {"l1": 0.0, "max_grad_norm": None, "ema_decay": None, "bf16_copy": False}
AVERAGE_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _check(options):
    """Raise unless these values of `OPTIONS` are right."""
    l1, decay = options.get("l1", 0.0), options.get("ema_decay")
    if not 0 <= l1:
        raise ValueError(f"l1 must not be negative, got {l1}")
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be None or in [0, 1), got {decay}")
    norm = options.get("max_grad_norm")
    if norm is not None and not 0 < norm:
        raise ValueError(f"max_grad_norm must be None or positive, got {norm}")
    if not isinstance(options.get("bf16_copy", False), bool):
        raise TypeError(f"bf16_copy must be a bool, got {options['bf16_copy']!r}")


class Options:
    """Mixin before an optimizer of torch's: these arguments, in its constructor, param groups and checkpoints.

    A subclass may have more of its own, `_more_options`, and has `_names(group)`, its state shaped as the parameters.
    """

    _more_options = {}
    grad_norm = None  # 0-d fp64 tensor: the norm of all gradients at the last step, with max_grad_norm

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.__signature__ = None
        if "__init__" not in cls.__dict__:
            # torch's arguments and ours, for help() and editors
            bases = [base for base in cls.__mro__[1:] if "__init__" in base.__dict__ and base is not Options]
            signature = inspect.signature(bases[0])
            more = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
                for name, value in {**cls._more_options, **OPTIONS}.items()
            ]
            cls.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])

    def __init__(self, params, *args, **kwargs):
        asked = {name: kwargs.pop(name) for name in (*self._more_options, *OPTIONS) if name in kwargs}
        _check(asked)
        super().__init__(params, *args, **kwargs)
        defaults = {**OPTIONS, **self._more_options}
        asked = {name: value for name, value in asked.items() if value != defaults[name]}
        self.defaults.update(asked)
        for group in self.param_groups:
            self._set_options(group)

    def _set_options(self, group):
        for name in (*self._more_options, *OPTIONS):
            if name in self.defaults and name != "max_grad_norm":
                group.setdefault(name, self.defaults[name])

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            self._set_options(group)  # a checkpoint of torch's has none

    def load_state_dict(self, state_dict):
        """As torch.optim; an average of 16-bit parameters keeps its precision."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"]), strict=True):
            average = state_dict["state"].get(i, {}).get("ema")
            if average is not None and p.dtype in AVERAGE_DTYPES:
                self.state[p]["ema"] = average.to(p.device, AVERAGE_DTYPES[p.dtype], copy=True)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            if "max_grad_norm" in group:
                raise ValueError("max_grad_norm is of all gradients together: give it to the optimizer, not a group")
            for i, p in enumerate(group["params"]):
                if p.is_complex() or p.layout != torch.strided:
                    kind = "complex" if p.is_complex() else "sparse"
                    raise ValueError(
                        f"{type(self).__name__} does not support {kind} parameters: params[{i}] is {p.dtype}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._set_options(group)

    @contextlib.contextmanager
    def ema_weights(self):
        """Context: inside it every parameter that has one holds its average, afterwards its own value again.

        Buffers, such as the running statistics of batch norm, are not averaged: re-estimate them inside the block if
        the network has any.

        Raises:
            RuntimeError: there are no averages: no ema_decay, or no step so far.
        """
        pairs = [(p, state["ema"]) for p, state in self.state.items() if "ema" in state]
        if not pairs:
            raise RuntimeError("no parameter has an average: give the optimizer ema_decay and take a step first")
        own = [p.detach().clone() for p, _ in pairs]
        with torch.no_grad():
            for p, average in pairs:
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(pairs, own, strict=True):
                    p.copy_(value)

    def _row_names(self, group):
        names = list(self._names(group))
        if group.get("ema_decay") is not None:
            names.append("ema")
        if group.get("bf16_copy"):
            names.append("bf16")
        return names
