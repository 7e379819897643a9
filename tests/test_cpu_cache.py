"""The process that compiles a numba kernel and those that load the compiled code compute the same bits.

Else a run resumed in a new process would not continue to the same numbers. With fastmath they did not.
"""

import os
import subprocess
import sys

SCRIPT = """
import hashlib
import torch
import fastcnn
from fastcnn import functional as F, optim

torch.set_num_threads(1)
torch.manual_seed(0)


def keep(name, *tensors):
    part = hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors))
    print(name, part.hexdigest()[:16])


with fastcnn.backend("cpu"), fastcnn.strict():
    for channels_last in (False, True):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(4, 6, 29, 31).to(memory_format=layout).requires_grad_()
        weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
        mean, var = torch.zeros(6), torch.ones(6)
        y = F.batch_norm(x, mean, var, weight, bias, True)
        grads = torch.autograd.grad(y, (x, weight, bias), torch.randn(y.shape))
        keep(f"batch_norm {channels_last}", y, mean, var, *grads)
        for name in ("max_pool2d", "avg_pool2d"):
            y = getattr(F, name)(x, 3, 2, 1)
            keep(f"{name} {channels_last}", y, *torch.autograd.grad(y, x, torch.randn(y.shape)))
        z = torch.randn(x.shape).to(memory_format=layout).requires_grad_()
        y = F.batch_norm(x, mean, var, weight, bias, True, activation="relu", residual=z)
        keep(f"batch_norm, add, relu {channels_last}", y, *torch.autograd.grad(y, (x, z, weight), torch.randn(y.shape)))
        y = F.local_response_norm(x, 5)
        keep(f"local_response_norm {channels_last}", y, *torch.autograd.grad(y, x, torch.randn(y.shape)))
        y = F.dropout(x, 0.3)
        keep(f"dropout {channels_last}", y, *torch.autograd.grad(y, x, torch.randn(y.shape)))
    x = torch.randn(64, 50).requires_grad_()
    y = F.cross_entropy(x, torch.arange(64) % 50, label_smoothing=0.1)
    keep("cross_entropy", y, *torch.autograd.grad(y, x))
    y = F.smooth_l1_loss(x, torch.zeros(64, 50))
    keep("smooth_l1_loss", y, *torch.autograd.grad(y, x))
    kinds = (
        lambda p: optim.Adam(p, l1=1e-3, max_grad_norm=1.0, ema_decay=0.9),
        optim.AdamW,
        optim.NAdam,
        lambda p: optim.SGD(p, momentum=0.9, weight_decay=0.1),
        lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
        optim.Adagrad,
        optim.Lion,
    )
    for kind in kinds:
        params = [torch.randn(n, requires_grad=True) for n in (3, 150, 48001)]
        optimizer = kind(params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        keep(type(optimizer).__name__, *params)
"""


def test_compiled_and_loaded_kernels_agree_in_every_bit(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    compiled, loaded = (
        subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert any(tmp_path.rglob("*.nbi"))
    assert len(compiled.stdout.splitlines()) == 21
    assert compiled.stdout.splitlines() == loaded.stdout.splitlines()
