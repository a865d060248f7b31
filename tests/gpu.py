"""Arrays on a GPU for the tests: made by hand, where only their description matters, and of the libraries installed.

A test that is marked `any_device` runs on NumPy's arrays, and once more for each library whose arrays can be on a GPU
here: its calls of normkit go by way of `through`, which copies the arrays there, and the results back.
"""

import ctypes
import functools
import importlib
import inspect
import re

import ml_dtypes
import numpy as np
import pytest

import normkit as nk
from normkit import _gpu

# --- DLPack, as its specification lays it out in memory ---------------------------------------------------------------

CPU, CUDA, MANAGED = 1, 2, 13
INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6
READ_ONLY = 1
TYPES = {"float64": (FLOAT, 64), "float32": (FLOAT, 32), "float16": (FLOAT, 16), "bfloat16": (BFLOAT, 16)}
TYPES |= {"int32": (INT, 32), "int64": (INT, 64), "uint8": (UINT, 8), "bool": (BOOL, 8), "complex64": (COMPLEX, 64)}
NAMES = {code_and_bits: name for name, code_and_bits in TYPES.items()}


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]
    name = b"dltensor"


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]
    name = b"dltensor_versioned"


DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
api = ctypes.pythonapi
api.PyCapsule_New.restype = ctypes.py_object
api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Producer:
    """An array that is nowhere: what it says of itself is all there is to it, unless `owner` holds its memory."""

    def __init__(self, shape, dtype="float32", address=4096, **more):
        self.shape, self.dtype, self.address = tuple(shape), dtype, address
        self.type = (*TYPES.get(dtype, dtype), 1)[:3]
        self.device = more.pop("device", (CUDA, 0))
        self.strides = more.pop("strides", None)  # in elements
        self.byte_offset = more.pop("byte_offset", 0)
        self.version = more.pop("version", (1, 0))  # None: from before versions
        self.flags = more.pop("flags", 0)
        self.owner = more.pop("owner", None)
        self.streams = []  # that consumers have named
        self.exports = []
        assert not more, more

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, **more):
        self.streams.append(stream)
        if self.version is None:
            if more:
                raise TypeError(f"unexpected keywords {more}")
            return self._capsule(Managed())
        assert more == {"max_version": (1, 0)}
        made = ManagedVersioned()
        made.major, made.minor = self.version
        made.flags = self.flags
        return self._capsule(made)

    def _capsule(self, made):
        ints = ctypes.c_int64 * max(len(self.shape), 1)
        arrays = [ints(*self.shape), None if self.strides is None else ints(*self.strides)]
        made.deleter = DELETER(lambda pointer: None)
        tensor = made.tensor
        tensor.data, tensor.byte_offset = self.address or None, self.byte_offset
        tensor.device_type, tensor.device_id = self.device
        tensor.code, tensor.bits, tensor.lanes = self.type
        tensor.ndim = len(self.shape)
        tensor.shape = ctypes.cast(arrays[0], ctypes.POINTER(ctypes.c_int64))
        if arrays[1] is not None:
            tensor.strides = ctypes.cast(arrays[1], ctypes.POINTER(ctypes.c_int64))
        self.exports.append((made, arrays))
        return api.PyCapsule_New(ctypes.addressof(made), made.name, None)


class Taken:
    """What a capsule holds, taken over as a consumer does: the deleter is called when this is closed."""

    def __init__(self, capsule):
        kind = next(kind for kind in (ManagedVersioned, Managed) if api.PyCapsule_IsValid(capsule, kind.name))
        self.versioned = kind is ManagedVersioned
        self._pointer = api.PyCapsule_GetPointer(capsule, kind.name)
        self._managed = kind.from_address(self._pointer)
        api.PyCapsule_SetName(capsule, USED[kind.name])
        tensor = self._managed.tensor
        self.address, self.byte_offset = tensor.data or 0, tensor.byte_offset
        self.device, self.dtype = (tensor.device_type, tensor.device_id), NAMES[tensor.code, tensor.bits]
        self.shape = tuple(tensor.shape[: tensor.ndim])
        self.strides = tuple(tensor.strides[: tensor.ndim])
        if self.versioned:
            self.version, self.flags = (self._managed.major, self._managed.minor), self._managed.flags

    def close(self):
        self._managed.deleter(self._pointer)


USED = {kind.name: b"used_" + kind.name for kind in (Managed, ManagedVersioned)}  # capsules keep the pointer to it


class Interface:
    """An array known by its __cuda_array_interface__ alone."""

    def __init__(self, **fields):
        self.__cuda_array_interface__ = {
            "shape": (4, 6),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
        } | fields


# The protocol is looked up on the type.
Interface.__cuda_array_interface__ = None


# --- libraries --------------------------------------------------------------------------------------------------------


class Library:
    """What tests need of a library of arrays."""

    name = ""
    place = "cuda:0"
    words = _gpu._ANY

    @property
    def absent(self):
        """Why no array of this library can be on a GPU here; empty where one can."""
        try:
            _gpu.core()
            if not nk.cuda.is_available():
                return "no CUDA driver, or no GPU"
            self.module = importlib.import_module(self.name)
        except (ImportError, RuntimeError) as error:
            return str(error)
        return "" if self.sees_gpu() else f"{self.name} sees no GPU"

    def sees_gpu(self):
        raise NotImplementedError

    def block(self, data):
        """The bytes on the GPU."""
        raise NotImplementedError

    def view(self, block, offset, dtype, shape, strides):
        """A view on that memory, strides in bytes; None where there is no such array."""
        raise NotImplementedError

    def to_numpy(self, array):
        raise NotImplementedError


def fits_elements(dtype, offset, strides):
    size = np.dtype(dtype).itemsize
    return offset % size == 0 and all(stride >= 0 and stride % size == 0 for stride in strides)


class Torch(Library):
    name = "torch"
    words = _gpu._LIBRARIES["torch"].words

    def sees_gpu(self):
        return self.module.cuda.is_available()

    def block(self, data):
        return self.module.from_numpy(data).cuda()

    def view(self, block, offset, dtype, shape, strides):
        kind = getattr(self.module, np.dtype(dtype).name, None)
        if kind is None or not fits_elements(dtype, offset, strides):
            return None
        size = np.dtype(dtype).itemsize
        elements = block[: block.numel() // size * size].view(kind)
        return elements.as_strided(shape, [stride // size for stride in strides], offset // size)

    def to_numpy(self, array):
        array = array.cpu()
        if array.dtype == self.module.bfloat16:
            return array.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()


class CuPy(Library):
    name = "cupy"
    words = _gpu._LIBRARIES["cupy"].words

    def sees_gpu(self):
        return self.module.cuda.is_available()

    def block(self, data):
        return self.module.asarray(data)

    def view(self, block, offset, dtype, shape, strides):
        if not fits_elements(dtype, offset, map(abs, strides)):
            return None
        try:
            return self.module.ndarray(shape, dtype, block.data + offset, strides)
        except (TypeError, ValueError):
            return None

    def to_numpy(self, array):
        order = np.argsort([-stride for stride in array.strides], kind="stable")  # as it lies in memory
        return self.module.asnumpy(array.transpose(order.tolist())).transpose(np.argsort(order))


class Jax(Library):
    name = "jax"
    words = _gpu._LIBRARIES["jax"].words

    def sees_gpu(self):
        self.module.config.update("jax_enable_x64", True)
        return any(device.platform == "gpu" for device in self.module.devices())

    def block(self, data):
        return data

    def view(self, block, offset, dtype, shape, strides):
        """A copy: an array of JAX is nobody's view."""
        array = np.ndarray(shape, dtype, block.tobytes(), offset, strides)
        try:
            return self.module.numpy.asarray(np.ascontiguousarray(array))
        except TypeError:
            return None

    def to_numpy(self, array):
        return np.asarray(array)


LIBRARIES = {library.name: library for library in (Torch(), CuPy(), Jax())}


def present():
    return [name for name, library in LIBRARIES.items() if not library.absent]


FUNCTIONS = [
    name
    for name in nk.__all__
    if inspect.isfunction(getattr(nk, name)) and "stream" in inspect.signature(getattr(nk, name)).parameters
]

# --- there and back ---------------------------------------------------------------------------------------------------

WRITTEN = ("out", "running_mean", "running_var")
ARRAYS = (*WRITTEN, "x", "dy", "weight", "bias", "mean", "rstd")


def root_of(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def bounds_of(array):
    reaches = [stride * (n - 1) for stride, n in zip(array.strides, array.shape)]
    low = array.ctypes.data + sum(min(reach, 0) for reach in reaches)
    return low, low + sum(map(abs, reaches)) + array.itemsize


class Trip:
    """The arrays of one call on the GPU. Views on one memory are views on one memory there."""

    def __init__(self, library):
        self.library = library
        self.blocks, self.arrays = {}, {}
        self.shared = {}  # the first array in each memory
        self.copies = []  # ids are of what lives

    def there(self, name, array):
        # Masked arrays and matrices stay what they are: another thing than was asked for.
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray | np.matrix):
            return array
        key = (array.ctypes.data, array.shape, array.strides, array.dtype)
        if key not in self.arrays:
            self.arrays[key] = self._copy(array)
        made = self.arrays[key]
        if made is None or (name in WRITTEN and not array.flags.writeable):
            pytest.skip(f"{self.library.name} has no such array on a GPU: {array.dtype} {array.shape} {array.strides}")
        if name in WRITTEN and _gpu.library_of(made).immutable:
            pytest.skip(f"{self.library.name} has no arrays to write to")
        return made

    def _copy(self, array):
        if not array.dtype.isnative or array.dtype.hasobject:
            return None
        if array.size == 0:
            block = self.library.block(np.zeros(16, np.uint8))
            return self.library.view(block, 0, array.dtype, array.shape, np.empty_like(array).strides)
        root = root_of(array)
        if id(root) not in self.blocks:
            low, high = bounds_of(root)
            memory = np.frombuffer(ctypes.string_at(low, high - low), np.uint8)
            self.blocks[id(root)] = low, self.library.block(memory.copy())
        low, block = self.blocks[id(root)]
        self.shared.setdefault(id(root), array)
        found = self.library.view(block, array.ctypes.data - low, array.dtype, array.shape, array.strides)
        if found is None and root is not array:  # not as it lies, which is fine where nothing else lies there
            if self.shared.setdefault(id(root), array) is not array:
                return None
            self.copies.append(array.copy("K"))
            return self._copy(self.copies[-1])
        return found

    def back(self, given, result):
        for array in given:
            if isinstance(array, np.ndarray) and self.there("", array) is result:
                return array
        return None if result is None else self.library.to_numpy(result)


def through(library, function):
    """`function` of normkit with NumPy arrays in and out, computed on arrays of `library` on the GPU."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        given, trip = dict(bound.arguments), Trip(library)
        for name in ARRAYS:
            if name in given:
                bound.arguments[name] = trip.there(name, given[name])
        result = function(*bound.args, **bound.kwargs)
        for name in WRITTEN:
            if isinstance(given.get(name), np.ndarray):
                given[name][...] = library.to_numpy(bound.arguments[name])
        if isinstance(result, tuple):
            return tuple(trip.back((given.get("out"),), each) for each in result)
        return trip.back((given.get("out"),), result)

    return call


def in_words_of(library, message):
    """A message about NumPy arrays, as it is about those of a library on the GPU."""
    words = library.words
    if re.match(r"x must be (a|a plain) numpy\.ndarray", message):
        return message  # then x is not there, and all is as ever
    to_x = words.convert.format(name=r"\1", dtype="x.dtype")
    message = re.sub(
        r"^(\w+) must be a(?: plain)? numpy\.ndarray, got (\w+); (?:fill|view) it with .*",
        lambda found: f"{found[1]} must be an array on {library.place}, as x is, got {found[2]}; {{way of {found[1]}}}",
        message,
    )
    message = message.replace("a numpy.ndarray, got", f"an array on {library.place}, as x is, got")
    for name in ("dy", "weight", "bias"):
        message = message.replace(f"{{way of {name}}}", f"convert it with np.asarray({name}, dtype=x.dtype)")
    message = message.replace("{way of out}", _gpu.NUMPY.like)
    message = re.sub(r"{way of running_\w+}", _gpu.NUMPY.fresh, message)
    message = re.sub(r"{way of \w+}", "pass it as the forward function returned it", message)
    message = re.sub(r"convert it with np\.asarray\((\w+), dtype=x\.dtype\)", to_x, message)

    def cast(found):
        dtype = found[2] if found[2] == "x.dtype" else words.dtype.format(found[2].removeprefix("np."))
        return words.cast.format(name=found[1], dtype=dtype)

    message = re.sub(r"convert it with (\w+)\.astype\(([\w.]+)\)", cast, message)
    message = re.sub(
        r"repeat it with np\.full\((\(.*?\)), (\w+)\)", lambda f: words.full.format(shape=f[1], name=f[2]), message
    )
    return message.replace(_gpu.NUMPY.like, words.like).replace(_gpu.NUMPY.fresh, words.fresh)
