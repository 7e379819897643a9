"""Optimizers: they read addresses, so their tensors are real."""

from unittest import mock

import torch

from aot_cases.common import bf16, fp16, fp32, fp64
from fastcnn import optim


def optimizers():
    def case(make, dtype=fp32, amp=False, aligned=True):
        def call():
            # 17 elements: one after the other, and a view that starts off the 16-byte grid
            params = [torch.zeros(17 * 16, dtype=dtype)[0 if aligned else 1 :] for _ in range(2)]
            for p in params:
                p.grad = torch.zeros(17 * 16, dtype=dtype)[0 if aligned else 1 :]
            optimizer = make(params)
            if amp:
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
            with mock.patch.object(optimizer._op, "route", lambda *_: "triton"):
                optimizer.step()

        return call

    sgd = lambda **how: lambda params: optim.SGD(params, lr=0.1, **how)
    adam = lambda **how: lambda params: optim.Adam(params, **how)
    yield "sgd", case(sgd())
    yield "sgd momentum decay", case(sgd(momentum=0.9, weight_decay=1e-4))
    yield "sgd nesterov decay amp", case(sgd(momentum=0.9, weight_decay=1e-4, nesterov=True), amp=True)
    rate = torch.tensor(0.1, dtype=torch.float64)  # as in a CUDA graph
    yield "sgd lr tensor", case(lambda params: optim.SGD(params, lr=rate, momentum=0.9))
    yield "adam", case(adam())
    yield "adam l2", case(adam(weight_decay=1e-4))
    yield "adam amsgrad amp", case(adam(amsgrad=True), amp=True)
    yield "adam lr tensor", case(adam(lr=torch.tensor(1e-3), capturable=True))
    yield "adamw", case(lambda params: optim.AdamW(params))
    yield "adamw unaligned", case(lambda params: optim.AdamW(params), aligned=False)
    yield "adam without bias correction", case(adam(amsgrad=True, bias_correction=False))
    yield "adagrad", case(lambda params: optim.Adagrad(params, lr_decay=0.1, weight_decay=1e-4))
    yield "lion", case(lambda params: optim.Lion(params, weight_decay=0.1))
    yield "nadam", case(lambda params: optim.NAdam(params))
    yield "nadam amp", case(lambda params: optim.NAdam(params, decoupled_weight_decay=True, weight_decay=0.1), amp=True)
    yield "radam", case(lambda params: optim.RAdam(params))
    yield "rmsprop", case(lambda params: optim.RMSprop(params))
    yield "rmsprop centered momentum", case(lambda params: optim.RMSprop(params, centered=True, momentum=0.9))
    yield "lars", case(lambda params: optim.LARS(params, momentum=0.9, weight_decay=1e-4))
    # what every optimizer may be asked for, on the kernels with the fewest and the most registers
    everything = dict(l1=1e-5, max_grad_norm=1.0, ema_decay=0.999, bf16_copy=True)
    yield "sgd everything amp", case(sgd(momentum=0.9, weight_decay=1e-4, **everything), amp=True)
    yield "adam amsgrad everything amp", case(adam(amsgrad=True, weight_decay=1e-4, **everything), amp=True)
    yield "lars everything amp", case(lambda params: optim.LARS(params, momentum=0.9, **everything), amp=True)
    yield "rmsprop everything", case(lambda params: optim.RMSprop(params, centered=True, momentum=0.9, **everything))
    yield "adam ema", case(adam(ema_decay=0.999))
    yield "sgd clipped", case(sgd(max_grad_norm=1.0))
    yield "adam everything fp64", case(adam(l1=1e-5, max_grad_norm=1.0, ema_decay=0.999), fp64)
    yield "adam everything bf16", case(adam(l1=1e-5, max_grad_norm=1.0, ema_decay=0.999), bf16)
    for dtype in (bf16, fp16, fp64):
        yield f"sgd momentum {dtype}", case(sgd(momentum=0.9), dtype)
        yield f"adamw {dtype}", case(lambda params: optim.AdamW(params), dtype)
        yield f"rmsprop momentum {dtype}", case(lambda params: optim.RMSprop(params, 1e-2, momentum=0.9), dtype)
        yield f"nadam {dtype}", case(lambda params: optim.NAdam(params), dtype)
