"""Two processes over gloo on this machine, for tests of what runs distributed."""

import faulthandler
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
LIMIT = 300  # seconds, after which a process says where it hangs and ends


def run(worker, folder, *arguments):
    """worker(rank, folder, *arguments) in each of WORLD processes with a process group; raises what one of them raises.

    Args:
        worker: a function of a test's module.
        folder: where the processes find each other and leave their results.
    """
    mp.spawn(_process, (worker, folder, *arguments), nprocs=WORLD)


def _process(rank, worker, folder, *arguments):
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    worker(rank, folder, *arguments)
    dist.barrier()
    # without PyTorch's teardown: DistributedDataParallel takes the group down while it holds Python's lock, for which
    # one of gloo's threads may wait, holding the group's (pytorch/pytorch#56297). One process in 130 never ended
    os._exit(0)
