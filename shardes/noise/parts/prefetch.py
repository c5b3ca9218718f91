"""Prefetching of memory for kernels that skip through it, which numba has no function for."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# float32 elements of a cache line of 64 bytes.
LINE = 16
_READ, _KEEP, _DATA = 0, 3, 1


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of an array's element; any index is allowed, and no value changes.

    Args:
        typing_context: Numba's.
        array: Array of one dimension, contiguous.
        index: Index of the element.
    """
    signature = types.void(array, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), pointer)
        builder.call(function, [address, number(_READ), number(_KEEP), number(_DATA)])
        return context.get_dummy_value()

    return signature, generate
