"""Who is compared: normkit and its peers, one class each, all with the interface of `Contender`.

A contender turns a problem (the arrays of a case) and a pass into a `Run`, or into None where it cannot do it. Everyone
works on the same memory: views of it, where a library has strides, and the shape in memory where it has not. Results
come back in the logical shape, so that they can be compared. On a GPU arrays are torch's, and stay there.
"""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

import normkit
from cases import NORMS, Case, Shape
from devices import Array, Call, Device, InProcess, Run
from normkit import bench as plain

EPS = plain.EPS
PIECE = 1 << 22  # elements that `exact` computes at a time


class Problem:
    """The arrays of a case: x, dy, weight, bias and running statistics, random; out, for the result.

    x, dy and out are C-contiguous in the order of memory; `logical` shows them as (N, C, ...). `others`: the same
    numbers in other memory, as many times as it takes on this device until a cache has forgotten them.
    """

    ARRAYS = ("x", "dy", "weight", "bias", "out", "running_mean", "running_var")

    def __init__(self, case: Case, dtype: str, device: Device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        xp, normal = device.xp, device.normal(dtype)
        # What all agree on, and what results are compared in.
        self.wide = xp.float64 if dtype == "float64" else xp.float32
        self.x, self.dy = normal(case.shape_in_memory), normal(case.shape_in_memory)
        self.weight, self.bias = normal(case.parameter_shape), normal(case.parameter_shape)
        self.out = xp.empty_like(self.x)
        # Numbers of the dtype, for libraries whose running statistics are of it; normkit wants them wider.
        self.running_mean = xp.asarray(normal(case.parameter_shape), dtype=self.wide)
        self.running_var = xp.asarray(xp.exp(normal(case.parameter_shape)), dtype=self.wide)
        self.others = [self.elsewhere() for _ in range(1, device.sets(2 * self.x.nbytes))]

    def elsewhere(self) -> Problem:
        other = copy.copy(self)
        for name in self.ARRAYS:
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        return other

    def logical(self, array: Any) -> Any:
        """An array or tensor that lies as x does, as (N, C, ...)."""
        if self.case.layout != "nhwc":
            return array
        return array.movedim(-1, 1) if hasattr(array, "movedim") else np.moveaxis(array, -1, 1)

    @property
    def extra(self) -> tuple[Any, ...]:
        """The argument of a norm that says what it normalizes over: num_groups, normalized_shape, or none."""
        row = self.case.shape[1:]
        return {"gn": (self.case.num_groups,), "ln": (row,), "rms": (row,)}.get(self.case.norm, ())

    @property
    def function(self) -> str:
        return f"{NORMS[self.case.norm]}_norm"

    def arguments(self, which: str, convert: Callable[[Array], Any]) -> list[Any]:
        """The positional arguments of `function`, which normkit and torch.nn.functional share."""
        x = self.logical(convert(self.x))
        weight, bias = convert(self.weight), convert(self.bias)
        if self.case.norm == "bn":
            evaluates = which == "evaluate"
            running = [convert(self.running_mean), convert(self.running_var)] if evaluates else [None, None]
            return [x, *running, weight, bias, not evaluates]
        if self.case.norm == "in":
            return [x, None, None, weight, bias]
        return [x, *self.extra, weight, EPS if self.case.norm == "rms" else bias]


class Contender(ABC):
    """Raises ImportError when made, where its library is not installed."""

    name: str
    version: str

    @abstractmethod
    def __init__(self, device: Device) -> None: ...

    @abstractmethod
    def prepare(self, problem: Problem, which: str, mode: str) -> Run | None:
        """`which`: "forward", "evaluate" or "backward". None: it cannot do this one."""


# ---- normkit ---------------------------------------------------------------------------------------------------------


class Normkit(Contender):
    """The public functions; backward is given the statistics, as a layer that trains does."""

    name = "normkit"

    def __init__(self, device: Device, module: ModuleType = normkit) -> None:
        self.module, self.version = module, module.__version__
        if device.threads:
            module.set_num_threads(device.threads)

    def prepare(self, problem: Problem, which: str, mode: str) -> InProcess:
        arguments = problem.arguments(which, lambda array: array)
        given = {"out": problem.logical(problem.out)} if mode == "out" else {}
        if which != "backward":
            call = partial(getattr(self.module, problem.function), *arguments, **given)
            return InProcess(call, lambda y: [y], mode)
        x, weight, dy = arguments[0], problem.weight, problem.logical(problem.dy)
        _, *statistics = getattr(self.module, f"{problem.function}_forward")(*arguments)
        backward = getattr(self.module, f"{problem.function}_backward")
        return InProcess(partial(backward, dy, x, *statistics, *problem.extra, weight, **given), list, mode)


class Loose(Normkit):
    """normkit on a core that was built with NORMKIT_LOOSE: what the contracts cost."""

    name = "loose"

    def __init__(self, device: Device, path: str) -> None:
        super().__init__(device, with_core(path))


def with_core(path: str) -> ModuleType:
    """normkit a second time, on the compiled core in the file `path`."""
    package = "normkit_loose"
    core_loader = importlib.machinery.ExtensionFileLoader(f"{package}._core", path)
    core_spec = importlib.util.spec_from_file_location(core_loader.name, path, loader=core_loader)
    spec = importlib.util.spec_from_file_location(
        package, normkit.__file__, submodule_search_locations=list(normkit.__path__)
    )
    assert core_spec and spec and spec.loader
    core = importlib.util.module_from_spec(core_spec)
    core_loader.exec_module(core)
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {package: module, core_loader.name: core}
    spec.loader.exec_module(module)
    return module


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


class Torch(Contender):
    """torch.nn.functional in eager mode. NHWC memory is a channels_last tensor; backward is the autograd engine's."""

    name = "torch"

    def __init__(self, device: Device) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.version = self.torch.__version__
        self.device = device
        if device.threads:
            self.torch.set_num_threads(device.threads)

    def prepare(self, problem: Problem, which: str, mode: str) -> Run | None:
        function = self.function(problem)
        if function is None:
            return None
        arguments = self.arguments(problem, which)
        if which == "backward":
            return self.backward(problem, function, arguments)
        # On a GPU batch_norm is cuDNN's as a rule, which has no out variant.
        if mode == "out" and problem.case.norm == "bn" and self.device.threads:
            return self.batch_norm_out(problem, arguments)
        return InProcess(partial(function, *arguments), lambda y: [self.array(y)], "call")

    def function(self, problem: Problem) -> Callable[..., Any] | None:
        """With the arguments of its like in torch.nn.functional; None: it cannot do this one."""
        function: Callable[..., Any] = getattr(self.torch.nn.functional, problem.function)
        return function

    def arguments(self, problem: Problem, which: str) -> list[Any]:
        arguments = problem.arguments(which, self.tensor)
        if which == "evaluate":  # running statistics of the dtype of the parameters, as module.to(dtype) leaves them
            x, mean, var, weight, *rest = arguments
            arguments = [x, mean.to(weight.dtype), var.to(weight.dtype), weight, *rest]
        return arguments

    def batch_norm_out(self, problem: Problem, arguments: list[Any]) -> Run:
        """The one norm with an out variant; those of layer and group norm copy a fresh result."""
        x, mean, var, weight, bias, training = arguments
        y, statistics = self.torch.empty_like(x), [self.torch.empty_like(weight) for _ in range(2)]
        function = self.torch.ops.aten.native_batch_norm.out
        given = dict(zip(("out", "save_mean", "save_invstd"), (y, *statistics)))
        call = partial(function, x, weight, bias, mean, var, training, 0.1, EPS, **given)
        return InProcess(call, lambda results: [self.array(results[0])], "out")

    def backward(self, problem: Problem, function: Callable[..., Any], arguments: list[Any]) -> Run:
        leaves = [argument for argument in arguments if isinstance(argument, self.torch.Tensor)]
        for leaf in leaves:
            leaf.requires_grad_()
        y = function(*arguments)
        call = partial(self.torch.autograd.grad, y, leaves, self.dy(problem), retain_graph=True)
        return InProcess(call, self.gradients, "call")

    def dy(self, problem: Problem) -> Any:
        return problem.logical(self.tensor(problem.dy))

    def gradients(self, gradients: Sequence[Any]) -> list[Array]:
        return [self.array(gradient) for gradient in gradients]

    def tensor(self, array: Any) -> Any:
        """A new tensor on the memory of an array or tensor, so that no one else sees what is set of it."""
        if not isinstance(array, np.ndarray):
            return array.detach()
        if array.dtype.name == "bfloat16":  # which torch does not know by NumPy's name
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def array(self, tensor: Any) -> Array:
        tensor = tensor.detach()
        if self.device.xp is self.torch:
            return tensor
        return np.asarray(tensor.float() if tensor.dtype == self.torch.bfloat16 else tensor)


class TorchCompile(Torch):
    """torch.compile of the same functions. It writes into memory of its own: one mode."""

    name = "torch.compile"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        for module in ("torch._dynamo", "torch._functorch.config"):
            importlib.import_module(module)
        # A graph that is kept for the next call must not have its buffers reused by this one.
        self.torch._functorch.config.donated_buffer = False
        self.compiled: tuple[object, Callable[..., Any]] | None = None

    def prepare(self, problem: Problem, which: str, mode: str) -> Run | None:
        what = (problem.case, problem.dtype, which)
        if self.compiled is None or self.compiled[0] != what:
            self.torch._dynamo.reset()  # else the second shape is compiled as a shape that varies
            eager: Any = super().function(problem)
            self.compiled = what, self.torch.compile(lambda *arguments: eager(*arguments), dynamic=False)
        return super().prepare(problem, which, "call")

    def function(self, problem: Problem) -> Callable[..., Any] | None:
        return self.compiled and self.compiled[1]


# ---- libraries of kernels for torch's tensors on a GPU ---------------------------------------------------------------


def version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # it can be imported from somewhere
        return "unknown"


class Apex(Torch):
    """NVIDIA Apex: fused layer and RMS norm; group norm in NHWC, for the numbers of channels that it is made for."""

    name = "apex"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        importlib.import_module("fused_layer_norm_cuda")  # the kernels, which not every installation has
        self.fused: Any = importlib.import_module("apex.normalization.fused_layer_norm")
        try:
            self.group_norm: Any = importlib.import_module("apex.contrib.group_norm").GroupNorm
        except ImportError:
            self.group_norm = None
        self.version = version_of("apex")

    def function(self, problem: Problem) -> Callable[..., Any] | None:
        fused = self.fused
        if problem.case.norm == "gn":
            return self.group_norm_of(problem)
        return {
            "ln": lambda x, shape, weight, bias: fused.fused_layer_norm_affine(x, weight, bias, shape, EPS),
            "rms": lambda x, shape, weight, eps: fused.fused_rms_norm_affine(x, weight, shape, eps),
        }.get(problem.case.norm)

    def group_norm_of(self, problem: Problem) -> Callable[..., Any] | None:
        """Its layer, which knows the best of its kernels, on parameters that are not the layer's own."""
        case = problem.case
        channels, groups = case.shape[1], case.num_groups
        if self.group_norm is None or case.layout != "nhwc":
            return None
        if channels not in self.group_norm.SUPPORTED_CHANNELS or groups not in self.group_norm.SUPPORTED_GROUPS:
            return None  # then it is torch's
        layer = self.group_norm(groups, channels, eps=EPS, device=problem.x.device, dtype=problem.weight.dtype)

        def group_norm(x: Any, num_groups: int, weight: Any, bias: Any) -> Any:
            return self.torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

        return group_norm


class Liger(Torch):
    """Liger-Kernel: layer, RMS and group norm in Triton, on memory in the order of the shape."""

    name = "Liger"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.liger: Any = importlib.import_module("liger_kernel.transformers.functional")
        self.version = version_of("liger-kernel")

    def function(self, problem: Problem) -> Callable[..., Any] | None:
        liger, channels = self.liger, problem.case.shape[1]
        if problem.case.layout == "nhwc":  # it would copy
            return None
        return {
            "ln": lambda x, shape, weight, bias: liger.liger_layer_norm(x, weight, bias, EPS),
            "rms": lambda x, shape, weight, eps: liger.liger_rms_norm(x, weight, eps),
            "gn": lambda x, groups, weight, bias: liger.liger_group_norm(x, weight, bias, channels, groups, EPS),
        }.get(problem.case.norm)

    def dy(self, problem: Problem) -> Any:
        """Its own: RMS norm writes dx over it, which saves it memory. So only the first result is right."""
        return super().dy(problem).clone()


class Quack(Torch):
    """QuACK: layer and RMS norm in the CuTe DSL; the parameters of layer norm are always float32."""

    name = "quack"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.quack: Any = importlib.import_module("quack.rmsnorm")
        self.version = version_of("quack-kernels")

    def function(self, problem: Problem) -> Callable[..., Any] | None:
        quack = self.quack
        return {
            "ln": lambda x, shape, weight, bias: quack.layernorm_fwd(x, weight, bias, EPS),
            "rms": lambda x, shape, weight, eps: quack.rmsnorm(x, weight, eps=eps),
        }.get(problem.case.norm)

    def arguments(self, problem: Problem, which: str) -> list[Any]:
        arguments = super().arguments(problem, which)
        if problem.case.norm == "ln":
            x, shape, weight, bias = arguments
            arguments = [x, shape, weight.float(), bias.float()]
        return arguments

    def backward(self, problem: Problem, function: Callable[..., Any], arguments: list[Any]) -> Run:
        """Of layer norm the autograd engine knows nothing."""
        if problem.case.norm != "ln":
            return super().backward(problem, function, arguments)
        x, _, weight, bias = arguments
        _, rstd, mean = self.quack.layernorm_fwd(x, weight, bias, EPS, return_rstd=True, return_mean=True)
        call = partial(self.quack.layernorm_bwd, x, weight, self.dy(problem), rstd, mean)
        return InProcess(call, self.gradients, "call")


# ---- the formula in NumPy and JAX ------------------------------------------------------------------------------------


class Formula:
    """A problem for libraries that have no norms, or no strides: shaped so that a set is whole axes."""

    def __init__(self, problem: Problem) -> None:
        case = problem.case
        shape = case.shape_in_memory
        channel = case.channel_axis_in_memory % len(shape)
        c, groups = shape[channel], case.num_groups
        channels: Shape = (groups, c // groups) if groups else (c,)
        after = shape[channel + 1 :]
        self.problem = problem
        self.shape = (*shape[:channel], *channels, *after)
        self.parameter_shape = (*channels, *(1 for _ in after))
        kept = {"bn": {channel}, "in": {0, channel}, "gn": {0, channel}, "ln": {0}, "rms": {0}}[case.norm]
        self.cut = max(kept)  # an axis that no set extends along: channels or groups, else rows
        axes = range(len(self.shape))
        self.sets = plain.Sets(
            axes=tuple(axis for axis in axes if axis not in kept),
            shared=tuple(axis for axis in axes if axis not in range(channel, channel + len(channels))),
            center=case.norm != "rms",
        )

    def data(self) -> tuple[Array, Array]:
        """x and dy."""
        return self.problem.x.reshape(self.shape), self.problem.dy.reshape(self.shape)

    def parameters(self) -> tuple[Array, Array, Array, Array]:
        """weight, bias and the running mean and variance."""
        problem = self.problem
        weight, bias, mean, var = (
            array.reshape(self.parameter_shape)
            for array in (problem.weight, problem.bias, problem.running_mean, problem.running_var)
        )
        return weight, bias, mean, var

    def read(self, results: Sequence[Any]) -> list[Array]:
        data, *gradients = map(self.problem.device.xp.asarray, results)
        parameter_shape = self.problem.case.parameter_shape
        return [
            self.problem.logical(data.reshape(self.problem.x.shape)),
            *(gradient.reshape(parameter_shape) for gradient in gradients),
        ]


class NumPy(Contender):
    """The formula as one writes it, on one thread; 16-bit data is computed in float32."""

    name = "NumPy"

    def __init__(self, device: Device) -> None:
        self.version = np.__version__

    def prepare(self, problem: Problem, which: str, mode: str) -> Run:
        formula = Formula(problem)
        call = self.call(which, formula.sets, *formula.data(), *formula.parameters())
        return InProcess(call, formula.read, "call")

    @classmethod
    def call(
        cls, which: str, sets: plain.Sets, x: Array, dy: Array, weight: Array, bias: Array, mean: Array, var: Array
    ) -> Call:
        if which == "backward":
            return partial(cls.backward, dy, x, *plain.moments(wide(x), sets), weight, sets)
        if which == "evaluate":
            return partial(cls.evaluate, x, mean, var, weight, bias, sets)
        return partial(cls.forward, x, weight, bias, sets)

    @staticmethod
    def forward(x: Array, weight: Array, bias: Array, sets: plain.Sets) -> list[Array]:
        data = wide(x)
        y = plain.apply(data, *plain.moments(data, sets), weight, bias, sets)
        return [y.astype(x.dtype, copy=False)]

    @staticmethod
    def evaluate(x: Array, mean: Array, var: Array, weight: Array, bias: Array, sets: plain.Sets) -> list[Array]:
        y = plain.apply(wide(x), mean, 1 / np.sqrt(var + EPS), weight, bias, sets)
        return [y.astype(x.dtype, copy=False)]

    @staticmethod
    def backward(dy: Array, x: Array, mean: Any, rstd: Array, weight: Array, sets: plain.Sets) -> list[Array]:
        gradients = plain.gradients(wide(dy), wide(x), mean, rstd, weight, sets)
        return [gradient.astype(x.dtype, copy=False) for gradient in gradients]


def wide(array: Array) -> Array:
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def exact(problem: Problem, which: str) -> list[Array]:
    """The results that everyone is judged by: the formula in float64, kept in float32 where the data is no wider.

    Every number of them: 15 to 50 ns of a CPU for an element of x. Whole sets at a time, so that temporaries are of 32
    MB each.
    """
    xp, formula = problem.device.xp, Formula(problem)
    arrays = [xp.broadcast_to(array, formula.shape) for array in (*formula.data(), *formula.parameters())]
    n = formula.shape[formula.cut]
    step = max(1, PIECE * n // problem.case.size)
    pieces = []
    for start in range(0, n, step):
        piece = (*[slice(None)] * formula.cut, slice(start, start + step))
        results = exact_piece(which, formula.sets, *(xp.asarray(array[piece], dtype=xp.float64) for array in arrays))
        pieces.append([xp.asarray(result, dtype=problem.wide) for result in results])
    data, *gradients = zip(*pieces)
    # A piece has some of the channels, or adds to all of them.
    whole: Callable[[Sequence[Any]], Any] = xp.concatenate if formula.cut else sum
    return formula.read([xp.concatenate(data, formula.cut), *map(whole, gradients)])


def exact_piece(
    which: str, sets: plain.Sets, x: Array, dy: Array, weight: Array, bias: Array, mean: Array, var: Array
) -> list[Array]:
    if which == "backward":
        return plain.gradients(dy, x, *plain.moments(x, sets), weight, sets)
    statistics = (mean, 1 / (var + EPS) ** 0.5) if which == "evaluate" else plain.moments(x, sets)
    return [plain.apply(x, *statistics, weight, bias, sets)]


class Jax(Contender):
    """jax.nn.standardize under jax.jit; backward is its vjp, jitted, given what forward left for it."""

    name = "jax.jit"

    def __init__(self, device: Device) -> None:
        # XLA sizes its pool by this variable, once; none of XLA_FLAGS limits it.
        os.environ["NPROC"] = str(device.threads)
        self.jax: Any = importlib.import_module("jax")
        self.version = self.jax.__version__
        self.jax.config.update("jax_platforms", "cpu")

    def prepare(self, problem: Problem, which: str, mode: str) -> Run:
        jax, jnp = self.jax, self.jax.numpy
        jax.config.update("jax_enable_x64", problem.dtype == "float64")  # of the whole process
        formula = Formula(problem)
        sets = formula.sets
        x, dy = map(jnp.asarray, formula.data())
        weight, bias, mean, var = map(jnp.asarray, formula.parameters())

        def forward(x: Any, weight: Any, *bias: Any) -> Any:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            if sets.center:
                xhat = jax.nn.standardize(wide, axis=sets.axes, epsilon=EPS)
            else:
                xhat = wide * jax.lax.rsqrt(jnp.square(wide).mean(sets.axes, keepdims=True) + EPS)
            return sum(bias, xhat * weight).astype(x.dtype)

        def evaluate(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
            return ((x - mean) * jax.lax.rsqrt(var + EPS) * weight + bias).astype(x.dtype)

        arguments = (x, weight, bias) if sets.center else (x, weight)
        if which == "backward":
            _, pullback = jax.vjp(jax.jit(forward), *arguments)
            call = partial(jax.jit(lambda pullback, dy: pullback(dy)), pullback, dy)
        elif which == "evaluate":
            call = partial(jax.jit(evaluate), x, weight, bias, mean, var)
        else:
            call = partial(jax.jit(forward), *arguments)

        def read(results: Any) -> list[Array]:
            return formula.read(results if which == "backward" else [results])

        return InProcess(lambda: jax.block_until_ready(call()), read, "call")


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


class OnnxRuntime(Contender):
    """One node of ONNX in a session, forward only; it knows NCHW memory only."""

    name = "ONNX Runtime"
    NODES: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {
        "bn": ("BatchNormalization", {}),
        "ln": ("LayerNormalization", {"axis": -1}),
        "rms": ("RMSNormalization", {"axis": -1}),
        "gn": ("GroupNormalization", {}),
        "in": ("InstanceNormalization", {}),
    }

    def __init__(self, device: Device) -> None:
        self.onnx: Any = importlib.import_module("onnx")
        self.ort: Any = importlib.import_module("onnxruntime")
        self.version = self.ort.__version__
        self.options = self.ort.SessionOptions()
        self.options.intra_op_num_threads = device.threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 4  # what a machine lacks (a GPU, a cpuinfo file) is no news here

    def prepare(self, problem: Problem, which: str, mode: str) -> Run | None:
        if which == "backward" or problem.case.layout == "nhwc" or problem.dtype == "bfloat16":
            return None
        inputs = self.inputs(problem)
        model = self.model(problem, which, inputs)
        try:
            session = self.ort.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])
        except self.ort.capi.onnxruntime_pybind11_state.NotImplemented:  # a dtype that this node has no kernel for
            return None
        if mode == "call":
            return InProcess(partial(session.run, ["y"], inputs), lambda results: [results[0]], "call")
        binding = session.io_binding()
        y = self.ort.OrtValue.ortvalue_from_numpy(problem.out)
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self.ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("y", y)
        return InProcess(partial(session.run_with_iobinding, binding), lambda _: [y.numpy()], "out")

    def inputs(self, problem: Problem) -> dict[str, Array]:
        inputs = {"x": problem.x, "weight": problem.weight}
        if problem.case.norm != "rms":
            inputs["bias"] = problem.bias
        if problem.case.norm == "bn":
            inputs |= {"mean": problem.running_mean, "var": problem.running_var}
        return inputs

    def model(self, problem: Problem, which: str, inputs: dict[str, Array]) -> bytes:
        helper = self.onnx.helper
        operator, attributes = self.NODES[problem.case.norm]
        trains = problem.case.norm == "bn" and which == "forward"
        outputs = ["y", "new_mean", "new_var"] if trains else ["y"]
        attributes = {**attributes, "epsilon": EPS}
        if trains:
            attributes["training_mode"] = 1
        if problem.case.num_groups:
            attributes["num_groups"] = problem.case.num_groups

        def info(name: str, array: Array) -> Any:
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

        graph = helper.make_graph(
            [helper.make_node(operator, list(inputs), outputs, **attributes)],
            operator,
            [info(name, array) for name, array in inputs.items()],
            [info("y", problem.x)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        serialized: bytes = model.SerializeToString()
        return serialized


# ---- oneDNN ----------------------------------------------------------------------------------------------------------


class OneDnn(Contender):
    """oneDNN's own benchmark, benchdnn: its values, its check, its clock, and always outputs that are given."""

    name = "oneDNN"
    DTYPES: ClassVar[dict[str, str]] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    DIRECTIONS: ClassVar[dict[str, str]] = {"forward": "FWD_D", "evaluate": "FWD_I", "backward": "BWD_DW"}

    def __init__(self, device: Device, path: str) -> None:
        self.path = path
        self.version = "benchdnn"
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(device.threads)}

    def prepare(self, problem: Problem, which: str, mode: str) -> Run | None:
        if problem.dtype not in self.DTYPES:
            return None
        run = BenchdnnRun(self.path, self.arguments(problem.case, which, problem.dtype), self.environment)
        return run if run.is_implemented() else None

    def arguments(self, case: Case, which: str, dtype: str) -> list[str]:
        """Instance norm is a group norm of C groups. C and H: weight and bias; G: given statistics; M: RMS."""
        flags = {"rms": "CM"}.get(case.norm, "GCH" if which == "evaluate" else "CH")
        common = [
            f"--dt={self.DTYPES[dtype]}",
            f"--dir={self.DIRECTIONS[which]}",
            f"--flags={flags}",
            "--inplace=false",
            "--skip-impl=ref",  # takes seconds a call
        ]
        if case.layout == "rows":
            return ["--lnorm", *common, "--tag=ab", "--stat_tag=a", "x".join(map(str, case.shape))]
        n, c, *spatial = case.shape
        names = {0: [], 2: ["ih", "iw"], 3: ["id", "ih", "iw"]}[len(spatial)]
        extents = "".join(f"{name}{extent}" for name, extent in zip(names or ["ih", "iw"], spatial or [1, 1]))
        tag = "--tag=axb" if case.layout == "nhwc" else "--tag=abx"
        if case.norm == "bn":
            return ["--bnorm", *common, tag, f"mb{n}ic{c}{extents}"]
        return ["--gnorm", *common, tag, f"g{case.num_groups or c}mb{n}ic{c}{extents}"]


class BenchdnnRun(Run):
    mode = "out"

    def __init__(self, path: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.path, self.arguments, self.environment = path, arguments, environment

    def output(self, *knobs: str) -> str:
        driver, *arguments = self.arguments
        command = [self.path, driver, *knobs, *arguments]  # knobs are the driver's
        process = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        return process.stdout

    def is_implemented(self) -> bool:
        """Run benchdnn's check. Raises RuntimeError where it finds a wrong result, or does not run."""
        output = self.output("--mode=C")
        counts = {word: int(count) for word, count in re.findall(r"(\w+):(\d+)", output.rpartition("tests:")[2])}
        if counts.get("skipped") or counts.get("unimplemented"):
            return False
        if not counts.get("passed") and not counts.get("mistrusted"):
            raise RuntimeError(f"{' '.join(self.arguments)} must pass benchdnn's check, got {output[-200:]!r}")
        return True

    def results(self) -> None:
        return None

    def seconds(self, at_least: float) -> float:
        report = "perf,%0time%"  # milliseconds: the mean of the second half of the calls, without the fastest
        output = self.output("--mode=P", f"--max-ms-per-prb={1e3 * at_least:g}", f"--perf-template={report}")
        milliseconds = re.search(r"^perf,([0-9.e+-]+)$", output, re.MULTILINE)
        if not milliseconds:
            raise RuntimeError(f"{' '.join(self.arguments)} must give a line 'perf,TIME', got {output[-200:]!r}")
        return float(milliseconds[1]) / 1e3
