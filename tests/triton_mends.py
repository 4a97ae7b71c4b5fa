"""What Triton's interpreter does wrong or twice, mended in the process that calls these."""

from __future__ import annotations

from typing import Any


def multiply_bfloat16() -> None:
    """Mends the interpreter, which multiplies the bits of bfloat16 as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_core_once() -> None:
    """Saves an eighth of the time: each call of a library function, such as `tl.max`, patches the
    module `triton.language.core` anew, which nobody restores."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, False

    def patch_lang(function: Any) -> Any:
        nonlocal done
        modules = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if modules == [tl.core] and done:
            return None
        done = done or modules == [tl.core]
        return patch(function)

    interpreter._patch_lang = patch_lang
