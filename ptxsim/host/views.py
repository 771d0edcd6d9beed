"""Tensors of host memory that pose as CUDA tensors towards the DSL.

The DSL gives a CPU tensor *generic* pointers, with which neither TMA nor cp.async compiles, and TVM-FFI checks the
device of its arguments. So a tensor is handed over through DLPack, with a capsule that says CUDA device 0: host memory
is the simulated device's memory. The tensor itself is not changed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CUDA = 2  # DLDeviceType

# DLDataTypeCode of the types that older releases of torch cannot export; the capsule is made of a uint8 view
FLOAT8_CODES = {
    "torch.float8_e4m3fn": 10,
    "torch.float8_e4m3fnuz": 11,
    "torch.float8_e5m2": 12,
    "torch.float8_e5m2fnuz": 13,
    "torch.float8_e8m0fnu": 14,
}

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class DeviceView:
    """A CPU tensor (torch or NumPy) that exports itself through DLPack as a tensor on CUDA device 0."""

    def __init__(self, tensor: Any):
        if not is_tensor(tensor):
            raise TypeError(f"expected a torch tensor or a NumPy array, not {type(tensor).__name__}")
        if not isinstance(tensor, np.ndarray) and tensor.device.type != "cpu":
            raise ValueError(f"a simulated kernel works on host memory, this tensor is on {tensor.device}")
        self.tensor = tensor.detach() if hasattr(tensor, "detach") else tensor

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """The protocol's capsule; ``stream`` and the other options of the protocol have no meaning here."""
        code = FLOAT8_CODES.get(str(self.tensor.dtype))
        tensor = self.tensor
        if code is not None:
            import torch

            tensor = tensor.view(torch.uint8)
        capsule = tensor.__dlpack__()
        name = _capsule_name(capsule)
        # DLManagedTensorVersioned begins with version, context, deleter and flags; DLManagedTensor with the DLTensor
        at = _capsule_pointer(capsule, name) + (32 if name == b"dltensor_versioned" else 0)
        # DLTensor: data pointer, int32 device type and id, int32 ndim, DLDataType {uint8 code, bits; uint16 lanes} …
        ctypes.c_int32.from_address(at + 8).value = CUDA
        ctypes.c_int32.from_address(at + 12).value = 0
        if code is not None:
            ctypes.c_uint8.from_address(at + 20).value = code
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0


def is_tensor(value: Any) -> bool:
    """Whether the value is a torch tensor or a NumPy array."""
    return isinstance(value, np.ndarray) or hasattr(value, "untyped_storage")


def storage(tensor: Any) -> tuple[int, int]:
    """(address, bytes) of the memory that the tensor lives in.

    For a torch tensor the whole storage: what an allocation on a GPU would be, and what an access may touch without a
    fault there.
    """
    if isinstance(tensor, np.ndarray):
        first, end = np.lib.array_utils.byte_bounds(tensor)
        return first, end - first
    whole = tensor.untyped_storage()
    return whole.data_ptr(), whole.nbytes()


def map_tensors(function, value: Any) -> Any:
    """The value with ``function`` applied to each tensor and DeviceView in nested tuples, NamedTuples and lists."""
    if isinstance(value, DeviceView) or is_tensor(value):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[map_tensors(function, item) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    return value
