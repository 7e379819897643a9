"""Repairs of Triton's interpreter, so that what passes in it passes on a GPU. conftest imports this before any kernel.

As shipped (3.7.1) the interpreter truncates fp32 to bf16, computes with bf16 bit patterns as if they were integers,
keeps NaN where compiled code drops it, leaves tensors' bounds without a word, and has device asserts off. Here:

* bf16: casts round to nearest even, arithmetic and reductions and dots run on values widened to fp32;
* NaN: maximum, minimum, clamp and their reductions drop it unless propagate_nan=tl.PropagateNan.ALL;
* memory: every unmasked lane must lie in the storage of the tensor its pointer came from. A pointer made from an
  integer (a table of addresses) must lie in a tensor given to `allow`; where nothing was given, it is not checked;
* masked lanes of a load without `other` are undefined in compiled code: here they are NaN, or the largest integer;
* tl.device_assert is on, tl.dot refuses K < 16, `and`, `or`, `not` and `if` refuse blocks (they took them for true);
* faster: no int32 overflow asserts, the language is patched once instead of at every call, reductions with a combine
  function of their own work on whole blocks, dots go to BLAS.

What stays hidden: races, TF32 and approximate exp, division and sqrt. See tests/test_interpreter_repairs.py.
"""

import contextlib
import functools
import sys

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

assert triton.__version__ == "3.7.1", (
    f"tests/interpreter_repairs.py patches the interpreter of Triton 3.7.1 and found {triton.__version__}: "
    "compare triton/runtime/interpreter.py of both, then run tests/test_interpreter_repairs.py"
)


# bf16


def widen(bits):
    """bf16 bit patterns (uint16) as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values, truncate=False):
    """fp32 as bf16 bit patterns, rounded to nearest even, or toward zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits if truncate else bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def _is_bf16(x):
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _widened(x):
    return TensorHandle(widen(x.data), tl.float32) if _is_bf16(x) else x


def _in_fp32(method):
    # fp32 in and one rounding at the end: what the compiler does for bf16, too
    @functools.wraps(method)
    def repaired(self, *args):
        if not any(_is_bf16(x) for x in args):
            return method(self, *args)
        result = method(self, *(_widened(x) for x in args))
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(narrow(result.data), tl.bfloat16)

    return repaired


FLOAT_METHODS = [name for name in vars(InterpreterBuilder) if name.startswith("create_fcmp")] + [
    f"create_{name}"
    for name in (
        "fadd fsub fmul fdiv frem precise_divf fma minimumf minnumf maximumf maxnumf clampf cos sin exp exp2 log log2 "
        "floor ceil sqrt precise_sqrt rsqrt erf"
    ).split()
]


def _cast(original):
    @functools.wraps(original)
    def repaired(self, source, target, rounding=None):
        to, data = target.scalar, source.data
        if to == tl.bfloat16 and source.dtype.scalar.primitive_bitwidth > 8:
            values = widen(data) if _is_bf16(source) else data.astype(np.float32)
            return TensorHandle(narrow(values, truncate=rounding == ir.ROUNDING_MODE.RTZ), to)
        if _is_bf16(source) and to.primitive_bitwidth > 8:
            return TensorHandle(widen(data).astype(interpreter._get_np_dtype(target)), to)
        return original(self, source, target) if rounding is None else original(self, source, target, rounding)

    return repaired


def _apply_reduction(original):
    @functools.wraps(original)
    def repaired(self, inputs):
        if not isinstance(inputs, tuple) or not any(_is_bf16(x.handle) for x in inputs):
            return original(self, inputs)
        wide = tuple(self.to_tensor(widen(x.handle.data), tl.float32) if _is_bf16(x.handle) else x for x in inputs)
        cast = interpreter.interpreter_semantic.cast
        return tuple(cast(y, x.dtype) for y, x in zip(original(self, wide), inputs, strict=True))

    return repaired


def _dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    if a.dtype.scalar.primitive_bitwidth == 8:
        return _original_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc)
    dtype = np.float64 if accumulator.data.dtype == np.float64 else np.float32
    product = _widened(a).data.astype(dtype) @ _widened(b).data.astype(dtype)
    total = product + accumulator.data.astype(dtype)
    return TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)


# NaN


def _without_nan(x, worst):
    return np.where(np.isnan(x), worst, x) if np.issubdtype(x.dtype, np.floating) else x


def _clamp(self, x, low, high, propagate_nan):
    if propagate_nan == ir.PROPAGATE_NAN.ALL:
        return self.ternary_op(x, low, high, np.clip)
    return self.ternary_op(x, low, high, lambda x, low, high: np.fmin(np.fmax(x, low), high))


def _min_max(original):
    @functools.wraps(original)
    def repaired(self, inputs, val_reduce_op, idx_reduce_op=None):
        if idx_reduce_op is None:
            return original(self, inputs, np.fmax.reduce if val_reduce_op is np.nanmax else np.fmin.reduce)
        # compiled, NaN loses most comparisons and which ones depends on the layout: here it loses all
        worst = -np.inf if idx_reduce_op is np.argmax else np.inf
        value = self.to_tensor(_without_nan(inputs.handle.data, worst), inputs.dtype)
        return original(self, value, val_reduce_op, idx_reduce_op)

    return repaired


# memory

_allowed = []


@contextlib.contextmanager
def allow(*tensors):
    """Inside the block, pointers made from integers must lie in one of these tensors' storages."""
    _allowed.append([_extent(t) for t in tensors])
    try:
        yield
    finally:
        _allowed.pop()


def _extent(tensor):
    storage = getattr(tensor, "base", tensor).untyped_storage()  # .base: triton.reinterpret's wrapper
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _with_extent(original):
    # a kernel's tensor argument becomes a pointer that knows its storage
    @functools.wraps(original)
    def repaired(arg):
        result = original(arg)
        if hasattr(arg, "data_ptr"):
            result.handle.set_attr("extents", [_extent(arg)])
        return result

    return repaired


def _keeps_extent(original):
    @functools.wraps(original)
    def repaired(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        for source in args:
            # a cast from an integer has nothing to keep
            if isinstance(source, TensorHandle) and "extents" in source.attr:
                result.set_attr("extents", source.attr["extents"])
        return result

    return repaired


def _select(original):
    @functools.wraps(original)
    def repaired(self, condition, a, b):
        result = original(self, condition, a, b)
        if "extents" in a.attr and "extents" in b.attr:
            result.set_attr("extents", a.attr["extents"] + b.attr["extents"])
        return result

    return repaired


def _block_pointers(original):
    @functools.wraps(original)
    def repaired(self, *args):
        pointers, mask = original(self, *args)
        if "extents" in self.base.attr:
            pointers.set_attr("extents", self.base.attr["extents"])
        return pointers, mask

    return repaired


def _check(self, verb, pointers, mask):
    extents = pointers.attr.get("extents") or [extent for extents in _allowed for extent in extents]
    if not extents:
        return
    itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    # a mask that was once a scalar holds integers, which would be indices
    active = np.asarray(mask.data if isinstance(mask, TensorHandle) else mask, bool)
    addresses = pointers.data[np.broadcast_to(active, pointers.data.shape)]
    if addresses.size == 0:
        return
    first, last = int(addresses.min()), int(addresses.max()) + itemsize
    if any(start <= first and last <= end for start, end in extents):
        return
    inside = np.zeros(addresses.shape, bool)
    for start, end in extents:
        inside |= (addresses >= np.uint64(start)) & (addresses + np.uint64(itemsize) <= np.uint64(end))
    if not inside.all():
        start, end = extents[0]
        raise IndexError(
            f"program {self.grid_idx} {verb} outside its tensor: {int((~inside).sum())} of {inside.size} lanes, the "
            f"first at byte {int(addresses[~inside][0]) - start} of a storage of {end - start} bytes"
        )


def _load(self, pointers, mask, other, cache_modifier, eviction_policy, is_volatile):
    _check(self, "reads", pointers, mask)
    if other is None:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        undefined = 0x7FC0 if kind == tl.bfloat16 else np.nan if dtype.kind == "f" else True
        if dtype.kind in "iu" and kind != tl.bfloat16:
            undefined = np.iinfo(dtype).max
        other = TensorHandle(np.full(pointers.data.shape, undefined, dtype), kind)
    return _original_load(self, pointers, mask, other, cache_modifier, eviction_policy, is_volatile)


def _store(self, pointers, value, mask, cache_modifier, eviction_policy):
    _check(self, "writes", pointers, mask)
    return _original_store(self, pointers, value, mask, cache_modifier, eviction_policy)


def _atomic_rmw(self, operation, pointers, value, mask, semantic, scope):
    _check(self, "updates", pointers, mask)
    return _original_rmw(self, operation, pointers, value, mask, semantic, scope)


def _atomic_cas(self, pointers, compare, value, semantic, scope):
    _check(self, "updates", pointers, np.ones(pointers.data.shape, bool))
    return _original_cas(self, pointers, compare, value, semantic, scope)


# speed and strictness

_languages = []


def _patch_language_once(fn):
    found = [v for v in fn.__globals__.values() if v is tl or v is tl.core]
    if not all(any(lang is known for known in _languages) for lang in found):
        _original_patch(fn)
        _languages.extend(found)
        tl.tensor.__bool__ = _truth
    return interpreter._LangPatchScope()


def _truth(self):
    if self.handle.data.size != 1:
        # Triton's own `if other` asks whether there is a tensor
        if sys._getframe(1).f_globals["__name__"].startswith("triton.language.semantic"):
            return True
        raise TypeError("a block has no single truth value: use &, | and ~ instead of and, or, not and if")
    return bool(self.handle.data)


def _generic_reduce(self, inputs):
    # neighbours pairwise, whole blocks at a time; extents in Triton are powers of two
    axis = 0 if self.axis is None else self.axis
    parts = [np.moveaxis(x.handle.data.reshape(-1) if self.axis is None else x.handle.data, axis, 0) for x in inputs]
    try:
        while len(parts[0]) > 1:
            pairs = [self.to_tensor(p[i::2], x.dtype) for i in (0, 1) for p, x in zip(parts, inputs, strict=True)]
            combined = self.combine_fn.fn(*pairs)
            combined = combined if isinstance(combined, tuple) else (combined,)
            parts = [np.broadcast_to(c.handle.data, p[::2].shape) for c, p in zip(combined, parts, strict=True)]
    except TypeError:
        # the combine function asks a block for its truth: one element at a time
        return _original_reduce(self, inputs)
    results = []
    for x, part in zip(inputs, parts, strict=True):
        result = part[0]
        if self.keep_dims:
            result = result.reshape((1,) * x.handle.data.ndim) if self.axis is None else np.expand_dims(result, axis)
        results.append(self.to_tensor(result if result.ndim else result.item(), x.dtype))
    return results


def _restore_arguments(original):
    @functools.wraps(original)
    def repaired(self, args_dev, args_hst, kwargs, kwargs_hst):
        # CPU tensors were never copied; copying them onto themselves costs time, and memory for huge virtual tensors
        if any(getattr(a, "is_cuda", False) for a in (*args_dev, *kwargs.values())):
            original(self, args_dev, args_hst, kwargs, kwargs_hst)

    return repaired


def _quietly(original):
    @functools.wraps(original)
    def repaired(self, *args, **kwargs):
        # a GPU computes with NaN, Inf and wrapping integers without comment
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    return repaired


builder, B = interpreter.interpreter_builder, InterpreterBuilder
_original_dot, _original_load, _original_store = B.create_dot, B.create_masked_load, B.create_masked_store
_original_rmw, _original_cas = B.create_atomic_rmw, B.create_atomic_cas
_original_patch, _original_reduce = interpreter._patch_lang, ReduceOps.generic_reduce

B.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
B.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
B.create_clampf = _clamp
for name in FLOAT_METHODS:
    setattr(B, name, _in_fp32(getattr(B, name)))
B.cast_impl, B.create_fp_to_fp = _cast(B.cast_impl), _cast(B.create_fp_to_fp)
B.get_bf16 = lambda self, value: TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)
B.create_dot = _dot
ReduceOps.apply, ScanOps.apply = _apply_reduction(ReduceOps.apply), _apply_reduction(ScanOps.apply)
ReduceOps.min_max, ReduceOps.generic_reduce = _min_max(ReduceOps.min_max), _generic_reduce

B.create_masked_load, B.create_masked_store = _load, _store
B.create_atomic_rmw, B.create_atomic_cas = _atomic_rmw, _atomic_cas
for name in "addptr splat unsplat broadcast expand_dims reshape trans bitcast".split():
    setattr(B, f"create_{name}", _keeps_extent(getattr(B, f"create_{name}")))
B.create_select = _select(B.create_select)
B.create_int_to_ptr = B.create_ptr_to_int = B.create_bitcast
for handle in (interpreter.BlockPointerHandle, interpreter.TensorDescHandle):
    handle.materialize_pointers = _block_pointers(handle.materialize_pointers)
interpreter._implicit_cvt = _with_extent(interpreter._implicit_cvt)

builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
builder.codegen_fns["min_dot_size"] = lambda a, b: (1, 1, 32 if a.scalar.primitive_bitwidth == 8 else 16)
interpreter._patch_lang = _patch_language_once
GridExecutor._restore_args_dev = _restore_arguments(GridExecutor._restore_args_dev)
GridExecutor.__call__ = _quietly(GridExecutor.__call__)
