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
    yield "sgd lr tensor", case(lambda params: optim.SGD(params, lr=torch.tensor(0.1), momentum=0.9))
    yield "adam", case(adam())
    yield "adam l2", case(adam(weight_decay=1e-4))
    yield "adam amsgrad amp", case(adam(amsgrad=True), amp=True)
    yield "adam lr tensor", case(adam(lr=torch.tensor(1e-3), capturable=True))
    yield "adamw", case(lambda params: optim.AdamW(params))
    yield "adamw unaligned", case(lambda params: optim.AdamW(params), aligned=False)
    for dtype in (bf16, fp16, fp64):
        yield f"sgd momentum {dtype}", case(sgd(momentum=0.9), dtype)
        yield f"adamw {dtype}", case(lambda params: optim.AdamW(params), dtype)
