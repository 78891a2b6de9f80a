"""Without a GPU the kernels run in Triton's interpreter, which it decides on when they are imported."""

import importlib.util
import inspect
import math
import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if INTERPRETED else 4e-3}
"""Relative errors. bfloat16's own rounding is 2e-3; Triton 3.6's interpreter cuts it off instead of rounding."""

torch.set_num_threads(1)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, NaN if found has any."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter takes int() of arrays of shape [1] for loop bounds, which numpy 2.4 refuses.

    And where it rounds a mantissa up to the next power of two on the way to fp8, it halves the number.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.tensor(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(values, source, target, rounding)

    interpreter._convert_float = converted


def _hasten_interpreter() -> None:
    """Most of the interpreter's time goes into what comes out the same every time.

    At every launch, and at every call of a function of a kernel, it looks through all that a module has for what it has
    to replace; whenever it asks for numpy's type, it makes a table of them all; it wraps each number of each tensor's
    shape, and checks each shape anew; and it compares shapes number by number, wrapped and unwrapped.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}  # of a module's builtins, by module
    types: dict[str, Any] = {}  # numpy's, by the name of Triton's
    shapes: dict[tuple[int, ...], tuple[Any, ...]] = {}  # as types and tensors have them, and the number of elements
    titles: dict[tuple[Any, str], str] = {}  # of types of blocks, by shape and type of the elements
    replaced: set[int] = set()  # globals of functions whose modules this launch has been through
    single = tl.tuple([]), tl.constexpr(1)
    find_type, replace_all = interpreter._get_np_dtype, interpreter._patch_lang
    make_type, unwrap_any = tl.block_type.__init__, tl.core._unwrap_if_constexpr
    broadcast_any, plain = TritonSemantic.broadcast_impl_value, {int, float, bool, str, type(None), tl.tensor}

    def patch(module: Any, builder: Any, scope: Any) -> None:
        if module not in names:  # which the first launch is the first to ask: nothing has been replaced yet
            names[module] = [name for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]
        if not tl.core.is_builtin(getattr(module, names[module][0])):
            return  # a launch is under way, which has replaced all of them
        for name in names[module]:
            if tl.core.is_builtin(member := getattr(module, name)):
                interpreter._patch_attr(module, name, member, builder, scope)

    def begin(function: Any) -> Any:
        replaced.clear()
        replaced.add(id(function.__globals__))
        return replace_all(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in replaced:
            replace_all(self.fn)
            replaced.add(id(self.fn.__globals__))
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def np_dtype(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in types:
            types[scalar.name] = find_type(scalar)
        return types[scalar.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if sizes not in shapes:
            make_type(self, element_ty, shape)  # which refuses what is no shape
            held = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
            shapes[sizes] = self.shape, self.numel, held
        self.element_ty = element_ty
        self.shape, self.numel, self.held = shapes[sizes]
        key = sizes, element_ty.name
        if key not in titles:
            titles[key] = f"<{self.shape}, {element_ty}>"
        self.name = titles[key]

    def make(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.held if type.is_block() else single

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        is_block = lhs.type.is_block()
        if is_block == rhs.type.is_block() and (not is_block or lhs.type.shape is rhs.type.shape):
            return lhs, rhs
        return broadcast_any(self, lhs, rhs)

    def unwrap(given: Any) -> Any:
        kind = type(given)
        if kind is tl.constexpr:
            return given.value
        return given if kind in plain else unwrap_any(given)

    interpreter._patch_builtin = patch
    interpreter._patch_lang = begin
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = np_dtype
    tl.block_type.__init__ = block
    tl.tensor.__init__ = make
    tl.core._unwrap_if_constexpr = unwrap
    TritonSemantic.broadcast_impl_value = broadcast


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()
    _hasten_interpreter()
