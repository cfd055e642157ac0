"""Triton's interpreter, faster, and for NumPy of today.

It prepares its language once a launch, not in every call of a device function.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Replaces the call of device functions, half of whose time goes into preparing what the launch has prepared.

    A launch prepares `triton.language` and undoes that at its end. Functions of Triton's own library need
    `triton.language.core`, which nothing undoes: once is enough.
    """
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter.InterpretedFunction, "rewrite"):
        interpreter.InterpretedFunction.__call__ = _call


def suit_numpy() -> None:
    """Lets the interpreter of Triton 3.6 (torch 2.11) run with NumPy 2.4, which makes no number of an array of one
    entry and no unsigned number of -1."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, *scope) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def all_ones(self: interpreter.InterpreterBuilder, kind: tl.dtype) -> interpreter.TensorHandle:
        return interpreter.TensorHandle(~np.zeros(1, interpreter._get_np_dtype(kind)), kind.scalar)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.get_all_ones_value = all_ones


def _call(self: interpreter.InterpretedFunction, *args, **kwargs):
    _prepare_core(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@functools.cache
def _prepare_core(function) -> None:
    if any(value is tl.core for value in function.__globals__.values()):
        interpreter._patch_lang(function)
