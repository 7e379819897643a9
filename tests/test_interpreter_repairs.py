"""Each repair of Triton's interpreter: right with it, and wrong in a process that runs the same kernel without it."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.interpret


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if WHAT == "cast":
        out = x
    elif WHAT == "add":
        out = x + y
    elif WHAT == "fma":
        out = tl.fma(x, y, x)
    elif WHAT == "less":
        out = ((x < y) & (y < 2.0)).to(tl.float32)
    elif WHAT == "maximum":
        out = tl.maximum(x, y)
    elif WHAT == "maximum keeping NaN":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif WHAT == "minimum":
        out = tl.minimum(x, y)
    elif WHAT == "clamp":
        out = tl.clamp(x, 1.0, 2.0)
    elif WHAT == "and":
        out = tl.where((x < y) and (y < 2.0), 1.0, 0.0)
    elif WHAT == "assert":
        tl.device_assert(x < y)
        out = x
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty))


@triton.jit
def reduce_kernel(x_ptr, out_ptr, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if WHAT == "sum":
        tl.store(out_ptr, tl.sum(x, 0))
    elif WHAT == "max":
        tl.store(out_ptr, tl.max(x, 0))
    else:
        value, index = tl.max(x, 0, return_indices=True)
        tl.store(out_ptr, value)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    m, k = tl.arange(0, BLOCK), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * BLOCK + m[None, :])
    tl.store(out_ptr + m[:, None] * BLOCK + m[None, :], tl.dot(a, b))


@triton.jit
def copy_kernel(x_ptr, out_ptr, reads, writes, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if reads == writes:
        x = tl.load(x_ptr + i, mask=i < reads, other=0.0)
    else:
        x = tl.load(x_ptr + i, mask=i < reads)
    tl.store(out_ptr + i, x, mask=i < writes)


@triton.jit
def table_kernel(table_ptr, numel, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointer = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(pointer + i, 1.0, mask=i < numel)


@triton.jit
def combine_moments(n1, mean1, square1, n2, mean2, square2):
    n = n1 + n2
    delta = mean2 - mean1
    return n, mean1 + delta * n2 / n, square1 + square2 + delta * delta * n1 * n2 / n


@triton.jit
def largest_even(a, b):
    # a boolean operator on the elements: cannot run on whole blocks
    return b if b % 2 == 0 and b > a else a


@triton.jit
def own_combine_kernel(x_ptr, out_ptr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offsets)
    one = tl.full((M, N), 1.0, tl.float32)
    n, mean, square = tl.reduce((one, x, tl.zeros((M, N), tl.float32)), AXIS, combine_moments, keep_dims=True)
    tl.store(out_ptr + offsets, x - mean + square / n)


@triton.jit
def scalar_combine_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, BLOCK)), 0, largest_even))


NAN = float("nan")
# 1 + 2^-8 + 2^-9 lies above the middle of two bf16 neighbours; 3.4e38 rounds to inf; 1e-40 is a denormal
X, Y = [1.005859375, 3.4e38, 1e-40, NAN], [1.5, 1.0, 1.0, 0.5]


def binary(what, x, y, dtype=torch.float32, out_dtype=None):
    x, y = torch.tensor(x).to(dtype), torch.tensor(y).to(dtype)
    out = torch.zeros(len(x), dtype=out_dtype or dtype)
    binary_kernel[(1,)](x, y, out, WHAT=what, BLOCK=len(x))
    return out.tolist()


def reduction(what, x, dtype=torch.float32):
    out = torch.zeros(1, dtype=dtype)
    reduce_kernel[(1,)](torch.tensor(x).to(dtype), out, WHAT=what, BLOCK=len(x))
    return out.tolist()


def dot(k, dtype):
    a = (torch.arange(16 * k).reshape(16, k) % 7 - 3).to(dtype)
    b = (torch.arange(k * 16).reshape(k, 16) % 5 - 2).to(dtype)
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, out, K=k, BLOCK=16)
    return torch.equal(out, a.float() @ b.float())


def copy(reads, writes):
    # 1000 floats: the allocator rounds up, so one more hurts nobody
    out = torch.zeros(1000)
    copy_kernel[(1,)](torch.ones(1000), out, reads, writes, BLOCK=1024)
    return out.sum().item()


# name -> (run, what a GPU does: a value, or part of an error message)
CASES = {
    "bf16 cast": (lambda: binary("cast", X, Y, torch.float32, torch.bfloat16), [1.0078125, torch.inf, 9.1835e-41, NAN]),
    "bf16 add": (lambda: binary("add", [1.0, -2.5], [0.5, 1.0], torch.bfloat16), [1.5, -1.5]),
    "bf16 fma": (lambda: binary("fma", [1.5, -2.5], [0.5, 1.0], torch.bfloat16), [2.25, -5.0]),
    "bf16 comparison": (lambda: binary("less", [-1.0, 1.0], [1.0, 3.0], torch.bfloat16), [1.0, 0.0]),
    "bf16 sum": (lambda: reduction("sum", [1.5, -0.5, 2.0, 4.0], torch.bfloat16), [7.0]),
    "bf16 max": (lambda: reduction("max", [1.5, -0.5, -2.0, -4.0], torch.bfloat16), [1.5]),
    "bf16 dot": (lambda: dot(16, torch.bfloat16), True),
    "fp16 dot": (lambda: dot(16, torch.float16), True),
    "dot with K = 8": (lambda: dot(8, torch.float16), "K >= 16"),
    "maximum drops NaN": (lambda: binary("maximum", [NAN, 1.0], [0.0, NAN]), [0.0, 1.0]),
    "maximum keeps NaN": (lambda: binary("maximum keeping NaN", [NAN, 1.0], [0.0, NAN]), [NAN, NAN]),
    "minimum drops NaN": (lambda: binary("minimum", [NAN, 1.0], [0.0, NAN]), [0.0, 1.0]),
    "clamp drops NaN": (lambda: binary("clamp", [NAN, 3.0], [0.0, 0.0]), [1.0, 2.0]),
    "max drops NaN": (lambda: reduction("max", [NAN, -1.0, 1.0, NAN]), [1.0]),
    "max with index drops NaN": (lambda: reduction("max with index", [NAN, -1.0, 1.0, 0.0]), [1.0]),
    "read by one too far": (lambda: copy(1001, 1000), "reads outside its tensor: 1 of 1001 lanes"),
    "write by one too far": (lambda: copy(1000, 1001), "writes outside its tensor: 1 of 1001 lanes"),
    "read in bounds": (lambda: copy(1000, 1000), 1000.0),
    "masked lanes are undefined": (lambda: copy(999, 1000), NAN),
    "device_assert": (lambda: binary("assert", [1.0, 2.0], [2.0, 1.0]), "AssertionError"),
    "and on blocks": (lambda: binary("and", [3.0, 0.0], [1.0, 1.0]), "no single truth value"),
}
# what the interpreter gets right as shipped: the repairs must leave it right
RIGHT_AS_SHIPPED = ("fp16 dot", "maximum keeps NaN", "max drops NaN", "read in bounds", "bf16 max")


def outcome(name):
    try:
        return str(CASES[name][0]())
    except Exception as error:
        return str(error)


def agrees(outcome, expected):
    if isinstance(expected, str):
        return expected in outcome
    values = eval(outcome, {"nan": NAN, "inf": torch.inf}) if outcome[0] in "[0123456789nT" else outcome
    try:
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=0, equal_nan=True)
    except (AssertionError, TypeError):
        return False
    return True


@pytest.fixture(scope="module")
def as_shipped():
    """Outcomes of all cases in an interpreter without repairs."""
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return dict(line.split("\t", 1) for line in process.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_repair(name, as_shipped):
    expected = CASES[name][1]
    assert agrees(outcome(name), expected), outcome(name)
    assert agrees(as_shipped[name], expected) == (name in RIGHT_AS_SHIPPED), as_shipped[name]


def test_bf16_casts_are_those_of_torch():
    from interpreter_repairs import narrow, widen

    everything = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    ours = torch.from_numpy(widen(everything.view(torch.uint16).numpy()))
    assert torch.equal(ours.view(torch.int32), everything.float().view(torch.int32))
    values = torch.randint(-(2**31), 2**31, (2**18,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    expected = values.bfloat16()
    ours = torch.from_numpy(narrow(values.numpy())).view(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("axis", (0, 1, None), ids=str)
def test_own_combine_function_on_blocks(axis):
    x, out = torch.randn(8, 16), torch.zeros(8, 16)
    own_combine_kernel[(1,)](x, out, AXIS=axis, M=8, N=16)
    dims = (0, 1) if axis is None else axis
    expected = x - x.mean(dims, keepdim=True) + x.var(dims, unbiased=False, keepdim=True)
    torch.testing.assert_close(out, expected)


def test_own_combine_function_on_elements():
    out = torch.zeros(1, dtype=torch.int32)
    scalar_combine_kernel[(1,)](torch.tensor([3, 8, 5, 9], dtype=torch.int32), out, BLOCK=4)
    assert out.item() == 8


def test_pointers_from_integers_are_checked_against_what_is_allowed():
    from interpreter_repairs import allow

    x = torch.zeros(1000)
    table = torch.tensor([x.data_ptr()])
    with allow(x):
        table_kernel[(1,)](table, 1000, BLOCK=1024)
        with pytest.raises(Exception, match="writes outside its tensor: 1 of 1001 lanes"):
            table_kernel[(1,)](table, 1001, BLOCK=1024)
    assert x.sum() == 1000
    table_kernel[(1,)](table, 1000, BLOCK=1024)


def test_a_pointer_stays_with_its_own_tensor():
    # a read beyond x that lands in another argument of the same kernel is as wrong as any other
    x, y = torch.ones(1000), torch.zeros(2000)
    distance = (y.data_ptr() - x.data_ptr()) // 4
    with pytest.raises(Exception, match="reads outside its tensor"):
        shifted_kernel[(1,)](x, y, distance, BLOCK=512)


@triton.jit
def shifted_kernel(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + shift + i))


if __name__ == "__main__":
    for case in CASES:
        print(case, outcome(case).replace("\n", " "), sep="\t")
