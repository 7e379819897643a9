"""Population statistics of batch norm: Algorithm 2 of Ioffe and Szegedy 2015, to be run after training."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def population_statistics(model, batches, device=None):
    """Set the running statistics of every batch norm to means over batches: of mean and of m / (m - 1) * variance.

    Training leaves an exponential average, which weighs the last batches and their older parameters. Here the
    parameters stay as they are, and all batches count alike. Batch norms normalise with their batch meanwhile; the rest
    of the model is in evaluation mode, so that dropout does not change what is measured. (torch.optim.swa_utils'
    update_bn puts all of it into training mode.)

    Args:
        model: any module; changed in place. Batch norms without running statistics are left alone.
        batches: iterable of inputs, or of tuples whose first element is the input; of one size for exact means.
        device: where to move inputs to, or None.

    Raises:
        ValueError: there are no batches; nothing has changed. Modes and momenta are restored whatever is raised.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m, _ in modes if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None  # a mean over the batches since the reset
        count = 0
        for batch in batches:
            if count == 0:
                for norm in norms:
                    norm.reset_running_stats()
            count += 1
            input = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(input if device is None else input.to(device))
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if count == 0:
        raise ValueError("batches must have at least one batch, got none")
