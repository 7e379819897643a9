"""What a call of torch's batch norm modules means beside the arithmetic: for fastcnn.nn and the fused chain alike."""

import torch.distributed as dist
from torch import nn


def uses_batch(bn):
    """Whether this call normalises with the statistics of the batch."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def arguments(bn):
    """(running_mean, running_var, uses_batch, momentum) of this call, which counts the batch."""
    *result, batches = arguments_and_counter(bn)
    if batches is not None:
        batches.add_(1)
    return result


def arguments_and_counter(bn):
    """The same and the count of batches: whoever moves the running statistics adds one to it, unless it is None."""
    batches = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.momentum is None and batches is not None:  # cumulative average: the number itself is wanted
        momentum, batches = 1.0 / float(batches.add_(1)), None
    update = not bn.training or bn.track_running_stats
    running = (bn.running_mean, bn.running_var) if update else (None, None)
    return *running, uses_batch(bn), momentum, batches


def group_of(bn):
    """The process group whose batches a SyncBatchNorm takes together in this call, or None."""
    if not (bn.training and isinstance(bn, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
