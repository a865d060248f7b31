"""Arrays on a GPU: which calls go there, on which stream, what comes back, and what is said where none can.

What they compute is in the tests marked `any_device`. Most of what is here needs no GPU: producers made by hand, and in
place of `normkit._cuda` one that notes what it is asked.
"""

import subprocess
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest

import gpu
import normkit as nk
from gpu import CPU, CUDA, MANAGED, Interface, Producer, Taken
from normkit import _core, _errors, _gpu

X = np.ones((4, 6), np.float32)

try:
    compiled = _gpu.core()
except RuntimeError:
    compiled = None
built = pytest.mark.skipif(compiled is None, reason="normkit is built without CUDA: there is no normkit._cuda")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


# --- what needs no GPU stays away from it -----------------------------------------------------------------------------


def test_the_compiled_half_is_imported_by_the_first_array_on_a_gpu():
    code = """
import sys
import numpy as np
import normkit as nk
x = np.ones((4, 6), np.float32)
nk.layer_norm(x, 6)
for bad in ({"x": [1.0]}, {"x": x, "stream": 1}, {"x": x, "weight": x}):
    try:
        nk.layer_norm(normalized_shape=6, **bad)
    except (TypeError, ValueError):
        pass
    else:
        raise AssertionError(bad)
assert "normkit._cuda" not in sys.modules
assert not {"torch", "cupy", "jax"} & set(sys.modules)
"""
    python(code)


def message_of(call, error):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "normkit._cuda", None)


def test_built_without_cuda(without_cuda):
    expected = (
        "arrays on a GPU need normkit built with CUDA, and this one is built without; build it with: "
        "pip install . -C cmake.define.NORMKIT_CUDA=ON"
    )
    assert message_of(lambda: nk.layer_norm(Producer((4, 6)), 6), RuntimeError) == expected
    assert message_of(lambda: nk.layer_norm(Interface(), 6), RuntimeError) == expected
    assert message_of(lambda: nk.cuda.DeviceArray, RuntimeError) == expected
    assert not nk.cuda.is_available() and nk.cuda.device_count() == 0


def test_built_and_broken(monkeypatch):
    """What the loader says is passed on: it names the library that is missing."""

    def fail(name):
        raise ImportError("libsomething.so.1: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "normkit._cuda", raising=False)
    monkeypatch.setattr(_gpu.importlib, "import_module", fail)
    assert "libsomething" in message_of(lambda: nk.layer_norm(Producer((4, 6)), 6), ImportError)


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (Producer((4, 6), device=(CPU, 0)), "Producer on the CPU"),
        (Producer((4, 6), device=(10, 1)), "Producer on DLPack device 10:1"),
    ],
)
def test_arrays_of_the_cpu_are_of_numpy(x, came):
    """Nothing is converted silently, nor read by DLPack where NumPy's own arrays do."""
    expected = f"x must be a numpy.ndarray, got {came}; convert it with np.asarray(x, dtype=np.float32)"
    assert message_of(lambda: nk.layer_norm(x, 6), TypeError) == expected


@pytest.mark.parametrize("name", ["weight", "bias", "out"])
def test_a_gpu_beside_numpy(name):
    expected = f"{name} must be a numpy.ndarray, got Producer on cuda:1; copy it to the CPU, as a numpy.ndarray"
    arguments = {name: Producer((6,), device=(CUDA, 1))}
    assert message_of(lambda: nk.layer_norm(X, 6, **arguments), TypeError) == expected


def test_moments_are_of_numpy():
    expected = "x must be a numpy.ndarray, got Producer on cuda:0; copy it to the CPU, as a numpy.ndarray"
    assert message_of(lambda: nk.moments(Producer((4, 6)), 0), TypeError) == expected


@pytest.mark.parametrize("stream", [0, 1, 7, "1", object()])
def test_a_stream_is_for_a_gpu(stream):
    came = f"got {type(stream).__name__}; leave it out"
    calls = [
        lambda: nk.layer_norm(X, 6, stream=stream),
        lambda: nk.batch_norm(X, X[0], X[0], stream=stream),
        lambda: nk.rms_norm_backward(X, X, np.ones(4), 6, stream=stream),
    ]
    for call in calls:
        assert message_of(call, ValueError) == f"stream must be None, as x is not on a GPU but ndarray, {came}"


def test_the_core_takes_no_stream():
    arguments = (_core.LAYER, X, 6, None, None, 1e-5, None, False, None, None, 0.0, 1)
    assert _core.forward(*arguments, None) is not None
    assert _core.forward(*arguments, 1) is None


# --- where a call goes: with another in place of the compiled half ----------------------------------------------------


class DeviceArray:
    """What the operations return."""

    dtype = "float32"


class Notes:
    """In place of `normkit._cuda`: it notes what it is asked, and accepts everything."""

    DeviceArray = DeviceArray

    def __init__(self):
        self.calls, self.waits = [], []
        self.devices = []  # the current one of torch at each call
        self.accepts = True

    def _operation(self, name, arguments, out, count):
        self.calls.append((name, arguments))
        if not self.accepts:
            return None
        results = tuple(DeviceArray() if out is None else out for _ in range(count))
        return results if count > 1 else results[0]

    def forward(self, *arguments):
        return self._operation("forward", arguments, arguments[6], 3 if arguments[7] else 1)

    def evaluate(self, *arguments):
        return self._operation("evaluate", arguments, arguments[6], 3 if arguments[7] else 1)

    def backward(self, *arguments):
        return self._operation("backward", arguments, arguments[9], 3)

    def place_of(self, value):
        return None

    def wait(self, *arguments):
        self.waits.append(arguments)

    def describe(self, value):
        raise BufferError("it is a note")


@pytest.fixture
def notes(monkeypatch):
    made = Notes()
    monkeypatch.setitem(sys.modules, "normkit._cuda", made)
    return made


def test_operations_have_the_arguments_of_the_core(notes):
    """And after them the stream, as a pointer and the object that keeps it."""
    x, w, b, mean, var = (Producer(shape) for shape in ((4, 6), (6,), (6,), (6,), (6,)))
    y = nk.batch_norm(x, mean, var, w, b, True, 0.2, 0.5, channel_axis=-1, ddof=0, stream=8)
    expected = (_core.BATCH, x, -1, w, b, 0.5, None, False, mean, var, 0.2, 0)
    assert type(y) is DeviceArray and notes.calls.pop() == ("forward", (*expected, 8, 8))
    y, *_ = nk.batch_norm_forward(x, mean, var, w, b, out=x)
    expected = (_core.BATCH, x, 1, w, b, 1e-5, x, True, mean, var)
    assert y is x and notes.calls.pop() == ("evaluate", (*expected, 1, None))
    gradients = nk.group_norm_backward(x, x, mean, var, 2, w, needs=("x", "bias"), grad_dtype=np.float64)
    expected = (_core.GROUP, x, x, mean, var, (2, 1), w, True, 5, None, 2)
    assert [type(each) for each in gradients] == [DeviceArray] * 3
    assert notes.calls.pop() == ("backward", (*expected, 1, None))
    nk.rms_norm_backward(x, x, var, 6)
    assert notes.calls.pop() == ("backward", (_core.RMS, x, x, None, var, 6, None, True, 3, None, 0, 1, None))
    assert notes.waits == []


@pytest.mark.parametrize("device", [(CUDA, 0), (CUDA, 3), (MANAGED, 0)])
def test_x_alone_says_where_to_compute(notes, device):
    nk.layer_norm(Producer((4, 6), device=device), 6, X[0])
    assert len(notes.calls) == 1
    nk.layer_norm(Interface(), 6)
    assert len(notes.calls) == 2


class HasStream:
    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("stream", "pointer"),
    [
        (7, 7),
        (0, 1),  # the legacy default stream, whatever 0 means where this is compiled
        (2, 2),
        (2**64 - 1, 2**64 - 1),
        (HasStream(cuda_stream=12), 12),
        (HasStream(ptr=13), 13),
        (HasStream(cuda_stream=0), 1),
        (HasStream(__cuda_stream__=lambda: (0, 14), ptr=15), 14),
        (HasStream(__cuda_stream__=(0, 16)), 16),
    ],
)
def test_streams(notes, stream, pointer):
    nk.layer_norm(Producer((4, 6)), 6, stream=stream)
    assert notes.calls[0][1][-2:] == (pointer, stream)


@pytest.mark.parametrize("stream", [True, 1.0, "7", object(), HasStream(ptr="7")])
def test_what_is_no_stream(notes, stream):
    expected = (
        f"stream must be a stream of torch or CuPy, an int, or None, got {type(stream).__name__}; "
        "pass the address of a cudaStream_t"
    )
    assert message_of(lambda: nk.layer_norm(Producer((4, 6)), 6, stream=stream), TypeError) == expected
    assert notes.calls == []


@pytest.mark.parametrize("stream", [-1, 2**64])
def test_what_is_no_address(notes, stream):
    expected = f"stream must be the address of a cudaStream_t, got {stream}"
    assert message_of(lambda: nk.layer_norm(Producer((4, 6)), 6, stream=stream), ValueError) == expected


def fake_torch(monkeypatch, notes, current=0x70):
    torch = types.ModuleType("torch")
    torch.entered = []

    class Tensor(Producer):
        device = None

        def __init__(self, shape, index=0):
            super().__init__(shape)
            self.device = types.SimpleNamespace(index=index)

        def __dlpack_device__(self):
            return CUDA, self.device.index

    @contextmanager
    def device(of):
        torch.entered.append(of.index)
        yield
        torch.entered.append(None)

    Tensor.__module__ = "torch"
    torch.Tensor = Tensor
    stream = types.SimpleNamespace(cuda_stream=current)
    torch.cuda = types.SimpleNamespace(current_stream=lambda device: stream, current_device=lambda: 0, device=device)
    torch.stream = stream
    torch.from_dlpack = lambda array: ("torch", array)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_torch(notes, monkeypatch):
    """Its current stream, unless another is given, which the current one then waits for; its tensors come back."""
    torch = fake_torch(monkeypatch, notes)
    x = torch.Tensor((4, 6))
    y, mean, rstd = nk.layer_norm_forward(x, 6)
    assert [each[0] for each in (y, mean, rstd)] == ["torch"] * 3
    assert notes.calls.pop()[1][-2:] == (0x70, torch.stream) and notes.waits == []
    assert nk.layer_norm(x, 6, out=x, stream=0x80) is x
    assert notes.calls.pop()[1][-2:] == (0x80, 0x80) and notes.waits.pop() == (0x70, 0x80, 0)
    nk.layer_norm(x, 6, stream=torch.stream)
    assert notes.waits == [] and torch.entered == []
    torch.stream.cuda_stream = 0
    nk.layer_norm(x, 6)
    assert notes.calls.pop()[1][-2:] == (1, torch.stream)


def test_torch_with_another_current_device(notes, monkeypatch):
    """It exports tensors of its current device alone."""
    torch = fake_torch(monkeypatch, notes)
    nk.layer_norm(torch.Tensor((4, 6), index=1), 6)
    assert torch.entered == [1, None]


def test_a_subclass_of_a_tensor(notes, monkeypatch):
    torch = fake_torch(monkeypatch, notes)
    own = type("Own", (torch.Tensor,), {"__module__": "elsewhere"})
    assert nk.layer_norm(own((4, 6)), 6)[0] == "torch"


def test_cupy(notes, monkeypatch):
    cupy = types.ModuleType("cupy")
    ndarray = type("ndarray", (Producer,), {"__module__": "cupy._core.core"})
    stream = types.SimpleNamespace(ptr=0x90)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda device: stream)
    cupy.from_dlpack = lambda array: ("cupy", array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = ndarray((4, 6))
    x.device = types.SimpleNamespace(id=0)
    x.__class__.__dlpack_device__ = lambda self: (CUDA, 0)
    assert nk.layer_norm(x, 6)[0] == "cupy"
    assert notes.calls.pop()[1][-2:] == (0x90, stream)


def fake_jax(monkeypatch, x64):
    jax = types.ModuleType("jax")
    jax.config = types.SimpleNamespace(jax_enable_x64=x64)
    jax.dlpack = types.SimpleNamespace(from_dlpack=lambda array: ("jax", array))
    monkeypatch.setitem(sys.modules, "jax", jax)
    return type("ArrayImpl", (Producer,), {"__module__": "jaxlib._jax"})


@pytest.mark.parametrize("x64", [False, True])
def test_jax(notes, monkeypatch, x64):
    """It has no current stream; and float64 it would round, unless it is told not to."""
    x = fake_jax(monkeypatch, x64)((4, 6))
    assert nk.layer_norm(x, 6)[0] == "jax"
    assert notes.calls.pop()[1][-2:] == (1, None) and notes.waits == []
    monkeypatch.setattr(DeviceArray, "dtype", "float64")
    assert (type(nk.layer_norm(x, 6)) is DeviceArray) == (not x64)


@pytest.mark.parametrize("written", ["out", "running_mean", "running_var"])
def test_arrays_of_jax_are_not_written_to(notes, monkeypatch, written):
    x = fake_jax(monkeypatch, True)((4, 6))
    running = {"running_mean": Producer((6,)), "running_var": Producer((6,))}
    with pytest.raises(TypeError, match="it is a note"):
        nk.batch_norm(x, training=True, **running | {written: x})
    assert notes.calls == []
    nk.batch_norm(x, running_mean=x, running_var=x)  # evaluation only reads them
    assert len(notes.calls) == 1


def test_a_library_with_the_array_api(notes):
    x = Producer((4, 6))
    x.__array_namespace__ = lambda: types.SimpleNamespace(from_dlpack=lambda array: ("its own", array))
    y, mean, rstd = nk.layer_norm_forward(x, 6)
    assert [each[0] for each in (y, mean, rstd)] == ["its own"] * 3
    assert type(nk.layer_norm(Interface(), 6)) is DeviceArray


def test_out_is_handed_back_as_it_is(notes):
    """Also where it is what the operations return."""
    x, out = Producer((4, 6)), DeviceArray()
    x.__array_namespace__ = lambda: types.SimpleNamespace(from_dlpack=lambda array: ("its own", array))
    assert nk.layer_norm(x, 6, out=out) is out


def test_what_does_not_fit_is_explained(notes):
    notes.accepts = False
    expected = "x must be an array that DLPack can pass on, got Producer on cuda:0: it is a note"
    assert message_of(lambda: nk.layer_norm(Producer((4, 6)), 6), TypeError) == expected
    assert len(notes.calls) == 1 and notes.waits == []


def test_dtypes_of_torch_for_gradients(notes):
    dtype = type("dtype", (), {"__module__": "torch", "__str__": lambda self: "torch.float64"})()
    nk.rms_norm_backward(Producer((4, 6)), Producer((4, 6)), Producer((4,)), 6, grad_dtype=dtype)
    assert notes.calls.pop()[1][10] == 2


# --- what the compiled half makes of an array: no GPU is asked --------------------------------------------------------

AS_FLOAT32 = (4096, "float32", 4, (4, 6), (24, 4), False)


@built
@pytest.mark.parametrize("version", [None, (1, 0), (1, 3)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int32", "uint8", "bool", "complex64"])
def test_describe(version, dtype):
    bytes_of = gpu.TYPES[dtype][1] // 8
    for strides, in_bytes in ((None, (6, 1)), ((1, 4), (1, 4)), ((-12, 2), (-12, 2)), ((0, 0), (0, 0))):
        x = Producer((4, 6), dtype, 0x1000, strides=strides, byte_offset=24, version=version, device=(CUDA, 5))
        expected = (CUDA, 5, 0x1018, dtype, bytes_of, (4, 6), tuple(bytes_of * s for s in in_bytes), False)
        assert compiled.describe(x) == expected
        assert set(x.streams) == {None}  # nobody waits for what is only described


@built
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,) * 17])
def test_describe_shapes(shape):
    described = compiled.describe(Producer(shape, address=0))
    assert described[2] == 0 and described[5] == shape


@built
def test_describe_read_only():
    for flags, read_only in ((0, False), (1, True), (2, False), (3, True)):
        assert compiled.describe(Producer((4, 6), flags=flags))[-1] == read_only


@built
def test_describe_other_types():
    assert compiled.describe(Producer((4,), (gpu.FLOAT, 32, 4)))[3:5] == ("float32x4", 16)
    assert compiled.describe(Producer((4,), (10, 8)))[3:5] == ("float8_e4m3fn", 1)
    assert compiled.describe(Producer((4,), (17, 4)))[3:5] == ("float4_e2m1fn", 1)
    assert compiled.describe(Producer((4,), (99, 64)))[3:5] == ("DLPack type 99", 8)
    assert compiled.describe(Producer((4,), (gpu.FLOAT, 128)))[3] == "float128"


class Raises(Producer):
    def __dlpack__(self, **keywords):
        raise self.error


class Returns(Producer):
    def __dlpack__(self, **keywords):
        return self.value


def with_attribute(made, **attributes):
    vars(made).update(attributes)
    return made


@built
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (with_attribute(Raises(()), error=BufferError("no export")), "its __dlpack__ raises BufferError: no export"),
        (
            with_attribute(Raises(()), error=TypeError("no such thing")),
            "its __dlpack__ raises TypeError: no such thing",
        ),
        (with_attribute(Raises(()), error=KeyError(1)), "its __dlpack__ raises KeyError: 1"),
        (with_attribute(Returns(()), value=None), "its __dlpack__ returns no capsule of DLPack"),
        (Producer((4, 6), version=(2, 0)), "it speaks version 2 of DLPack, not 1"),
        (Producer((1,) * 65), "it has 65 dimensions"),
        (object(), "it has neither __dlpack__ nor __cuda_array_interface__"),
        (Interface(mask=object()), "it has a mask"),
        (Interface(typestr=">f4"), "its typestr is '>f4'"),
        (Interface(typestr="|V2"), "its typestr is '|V2'"),
        (Interface(typestr="<f"), "its typestr is '<f'"),
        (Interface(stream=0), "its stream is 0, which may be either default stream"),
        (Interface(shape=None), "its __cuda_array_interface__ is not as version 3 describes it"),
        (Interface(data=4096), "its __cuda_array_interface__ is not as version 3 describes it"),
        (Interface(strides=(4,)), "its strides are not as many as its dimensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read(value, message):
    assert message_of(lambda: compiled.describe(value), BufferError) == message


@built
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_not_about_the_array_goes_on(error):
    value = with_attribute(Raises((4, 6)), error=error())
    with pytest.raises(error):
        compiled.describe(value)
    with pytest.raises(error):
        nk.layer_norm(value, 6)


@built
@pytest.mark.skipif(nk.cuda.is_available(), reason="a GPU knows that this memory is not its own")
def test_describe_interface():
    expected = ("float64", 8, (3, 2), (32, 8), True)
    described = compiled.describe(
        Interface(shape=(3, 2), typestr="<f8", data=(0x2000, True), strides=(32, 8), stream=7, mask=None)
    )
    assert described[2:] == (0x2000, *expected)
    assert compiled.describe(Interface(strides=None, version=2))[2:] == AS_FLOAT32
    assert compiled.describe(Interface(shape=(0, 6), data=(0, False)))[1:3] == (-1, 0)


@built
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64"])
def test_describe_tensors_of_torch(dtype):
    """By the functions of C that it has, or by __dlpack__; of the CPU, where they are to be read, too."""
    torch = pytest.importorskip("torch")
    x = torch.zeros((4, 6, 5), dtype=getattr(torch, dtype))[1:, ::2].transpose(0, 2)
    size = x.element_size()
    expected = (CPU, 0, x.data_ptr(), dtype, size, (5, 3, 3), tuple(size * n for n in x.stride()), False)
    for tensor in (x, torch.nn.Parameter(x, requires_grad=False)):
        assert compiled.describe(tensor) == expected
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert compiled.place_of(x) == (CPU, 0)
        assert compiled.place_of(torch.nn.Parameter(x, requires_grad=False)) is None  # of a subclass
    if dtype != "int64":
        x.requires_grad_()
        with pytest.raises(BufferError, match=r"__dlpack__ raises BufferError: .*detach"):
            compiled.describe(x)


@built
def test_describe_arrays_of_jax():
    numpy = pytest.importorskip("jax.numpy")
    x = numpy.zeros((4, 6), numpy.bfloat16)
    if x.devices().pop().platform == "cpu":
        assert compiled.describe(x)[3:7] == ("bfloat16", 2, (4, 6), (12, 2))


@built
def test_capsules_are_given_back():
    """A capsule is only looked into: its maker finds it as it was."""
    x = Producer((4, 6))
    compiled.describe(x)
    (managed, _) = x.exports.pop()
    assert managed.deleter and x.streams == [None]


@built
@pytest.mark.parametrize(("stream", "told"), [(None, 1), (0, 1), (2, 2), (0x7000, 0x7000)])
def test_producers_are_told_the_stream(stream, told):
    """Whatever comes of the call."""
    if told > 2 and nk.cuda.is_available():
        pytest.skip("a GPU would be asked for memory on a stream that is none")
    arrays = {name: Producer(shape) for name, shape in (("x", (4, 6)), ("weight", (6,)), ("bias", (5,)))}
    with pytest.raises((ValueError, RuntimeError)):
        nk.layer_norm(normalized_shape=6, **arrays, stream=stream)
    for array in arrays.values():
        assert array.streams[0] == told and set(array.streams[1:]) <= {None}


def explained(**arguments):
    """What is said of a layer norm with these arguments; the operation itself would ask for a GPU first."""
    given = {"x": Producer((4, 6)), "spec": 6, "weight": None, "bias": None, "eps": 1e-5, "out": None} | arguments
    with pytest.raises((TypeError, ValueError)) as caught:
        _errors.explain_forward(_core.LAYER, *given.values())
    return str(caught.value)


@built
def test_sentences():
    other = Producer((6,), device=(CUDA, 1))
    beside = "must be an array on cuda:0, as x is, got"
    way = "copy it to the device of x"
    for weight, came in (
        (X[0], "ndarray on the CPU"),
        (other, "Producer on cuda:1"),
        (Producer((6,), device=(CPU, 0)), "Producer on the CPU"),
        ([1.0], "list"),
        (1.0, "float"),
    ):
        came = came.removesuffix(" on the CPU") if weight is X[0] or came == "ndarray on the CPU" else came
        assert explained(weight=weight) == f"weight {beside} {came}; {way}"
    assert explained(out=other) == f"out {beside} Producer on cuda:1; create it like x"
    floats = "float64, float32, float16 or bfloat16"
    assert explained(x=Producer((4, 6), "int32")) == f"x must be {floats}, got int32; convert it to float32"
    real = "pass an array of real numbers"
    assert explained(x=Producer((4, 6), "complex64")) == f"x must be {floats}, got complex64; {real}"
    assert explained(bias=Producer((5,))) == "bias must have shape (6,), got (5,)"
    assert explained(out=Producer((4, 6), flags=gpu.READ_ONLY)) == (
        "out must be writable, got a read-only array; create it like x"
    )
    assert explained(out=Producer((4, 6), address=4100)) == (
        "out must not overlap x, unless it is x itself, got arrays that share memory; give out memory of its own"
    )
    assert explained(x=Producer((4, 6), byte_offset=1)) == (
        "x must be aligned to its elements on a GPU, got address 0x1001; copy it"
    )
    assert explained(x=Producer((1,) * 17)) == f"x must have 1 to 16 dimensions, got shape {(1,) * 17}"


@built
def test_sentences_about_statistics():
    x = Producer((4, 6))

    def said(mean):
        with pytest.raises((TypeError, ValueError)) as caught:
            _errors.explain_backward(
                _core.LAYER, x, x, mean, Producer((4,), "float64"), 6, None, True, needs=7, out=None
            )
        return str(caught.value)

    way = "pass it as the forward function returned it"
    assert said(np.ones(4)) == f"mean must be an array on cuda:0, as x is, got ndarray; {way}"
    assert said(Producer((4,))) == f"mean must be float64, got float32; {way}"
    gaps = "mean must be in C order and without gaps on a GPU, got strides (16,) for shape (4,)"
    assert said(Producer((4,), "float64", strides=(2,))) == f"{gaps}; {way}"


# --- what it hands over -----------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 1), (2, 0)])
def test_export(dtype, max_version):
    made = compiled.borrow(0x3000, (2, 3), dtype, 0, 7)
    taken = Taken(made.__dlpack__(stream=7, max_version=max_version))
    assert taken.versioned == (max_version is not None and max_version[0] >= 1)
    assert (taken.address, taken.byte_offset, taken.device) == (0x3000, 0, (CUDA, 0))
    assert (taken.dtype, taken.shape, taken.strides) == (dtype, (2, 3), (3, 1))
    if taken.versioned:
        assert taken.version == (1, 0) and taken.flags == 0
    del made
    assert taken.shape == (2, 3)  # for as long as the consumer wants
    taken.close()


@built
def test_exports_that_nobody_takes():
    made = compiled.borrow(0x3000, (2, 3), "float32", 0, 7)
    for max_version in (None, (1, 0)):
        capsule = made.__dlpack__(stream=7, max_version=max_version)
        del capsule


@built
def test_what_is_handed_over_is_read_as_it_was():
    made = compiled.borrow(0x3000, (2, 0, 3), "float16", 2, 1)
    assert compiled.describe(made)[:6] == (CUDA, 2, 0x3000, "float16", 2, (2, 0, 3))
    assert made.__dlpack_device__() == (CUDA, 2)
    assert (made.shape, made.dtype, made.ndim, made.size, made.device, made.stream) == (
        (2, 0, 3), "float16", 3, 0, 2, 1,
    )  # fmt: skip
    assert repr(made) == "normkit.cuda.DeviceArray(shape=(2, 0, 3), dtype=float16, device=2)"
    assert nk.cuda.DeviceArray is type(made)


@built
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"stream": 0}, ValueError, "stream must not be 0"),
        ({"stream": -1, "dl_device": (CPU, 0)}, BufferError, "dl_device must be the array's own, (2, 0), got (1, 0)"),
        ({"stream": -1, "dl_device": (CUDA, 1)}, BufferError, "got (2, 1)"),
        ({"stream": -1, "copy": True}, BufferError, "copy must be None or False, got True"),
    ],
)
def test_what_is_not_exported(keywords, error, message):
    made = compiled.borrow(0x3000, (2, 3), "float32", 0, 7)
    assert message in message_of(lambda: made.__dlpack__(**keywords), error)
    for fine in ({"stream": -1}, {"stream": 7, "copy": False, "dl_device": (CUDA, 0)}):
        Taken(made.__dlpack__(**fine)).close()


@built
def test_export_as_interface():
    made = compiled.borrow(0x3000, (2, 3), "float32", 0, 7)
    expected = {"shape": (2, 3), "typestr": "<f4", "data": (0x3000, False), "strides": None, "version": 3, "stream": 7}
    assert made.__cuda_array_interface__ == expected
    assert not hasattr(compiled.borrow(0x3000, (2, 3), "bfloat16", 0, 7), "__cuda_array_interface__")


@built
def test_without_a_gpu_the_first_use_says_so():
    if nk.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"CUDA|GPU|driver"):
        nk.layer_norm(Producer((4, 6)), 6)
    assert nk.cuda.device_count() == 0


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu.LIBRARIES)
def test_results_are_of_the_library_of_x(name):
    found = gpu.LIBRARIES[name]
    if found.absent:
        pytest.skip(found.absent)
    x = found.view(found.block(X.view(np.uint8).ravel()), 0, X.dtype, X.shape, X.strides)
    y, mean, rstd = nk.layer_norm_forward(x, 6)
    gradients = nk.layer_norm_backward(x, x, mean, rstd, 6)
    assert {type(each) for each in (y, mean, rstd, *gradients)} == {type(x)}
    assert {each.__dlpack_device__() for each in (y, mean, rstd, *gradients)} == {x.__dlpack_device__()}
    assert (found.to_numpy(y) == 0).all() and found.to_numpy(mean).dtype == np.float64


@pytest.fixture
def torch():
    found = gpu.LIBRARIES.get("torch")
    if found is None or found.absent:
        pytest.skip(found.absent if found else "torch is not among the libraries")
    return found.module


@pytest.mark.gpu
def test_on_the_callers_stream(torch):
    """Beside much other work on the current stream, and in the order of both."""
    side = torch.cuda.Stream()
    x = torch.randn(4096, 4096, device="cuda")
    expected = nk.layer_norm(x, 4096).clone()
    for _ in range(20):
        z = x.clone()
        y = nk.layer_norm(z, 4096, stream=side)
        z.zero_()  # waits for the norm
        assert torch.equal(y, expected)
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        y = nk.layer_norm(x, 4096)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_nothing_is_waited_for(torch):
    """torch tells when it synchronizes; that normkit does not, a long kernel before it shows."""
    x = torch.randn(1024, 1024, device="cuda")
    nk.layer_norm(x, 1024)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    before = torch.cuda.Event()
    before.record()
    _, mean, rstd = nk.layer_norm_forward(x, 1024)
    nk.layer_norm_backward(x, x, mean, rstd, 1024)
    assert not before.query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_cuda_graph(torch):
    """Captured once, launched many times, each on what is then in x."""
    x = torch.randn(64, 1000, device="cuda")
    weight, bias = torch.rand(1000, device="cuda"), torch.rand(1000, device="cuda")
    out = torch.empty_like(x)
    nk.layer_norm(x, 1000, weight, bias, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nk.layer_norm(x, 1000, weight, bias, out=out)
    for _ in range(3):
        x.copy_(torch.randn(64, 1000, device="cuda"))
        graph.replay()
        assert torch.equal(out, nk.layer_norm(x, 1000, weight, bias))


@pytest.mark.gpu
def test_memory_is_given_back(torch):
    """Also of calls that fail, and of results used on another stream."""
    x = torch.randn(1024, 1024, device="cuda")
    side = torch.cuda.Stream()
    nk.layer_norm(x, 1024, stream=side)
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(200):
        y = nk.layer_norm(x, 1024, stream=side)
        with pytest.raises(ValueError, match="weight must have shape"):
            nk.layer_norm(x, 1024, x[0, :5])
        del y
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] > free - 100 * x.numel() * 4


@pytest.mark.gpu
def test_tensors_that_need_gradients(torch):
    x = torch.randn(4, 6, device="cuda", requires_grad=True)
    with pytest.raises(TypeError, match=r"x must be an array that DLPack can pass on, got Tensor on cuda:0.*detach"):
        nk.layer_norm(x, 6)
