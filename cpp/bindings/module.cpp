// normkit._core: NumPy arrays to views and back, nothing else. An argument that does not fit makes a function return
// None, having changed nothing; normkit/_errors.py then finds the sentence to raise.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "normkit/normkit.h"
#include "output_memory.h"

namespace py = pybind11;
using namespace normkit;

namespace {

// Elements from which on the GIL is released: below, giving it up and taking it back costs more than others gain.
constexpr index_t kReleaseGil = 64 * 1024;

constexpr int kFloat16Number = 23;  // NPY_HALF, which pybind11 does not list

// ------------------------------------------------------------------------------------------------ arguments

// Converting a number may run Python, which may give the memory of an array back or change its shape. So numbers come
// first in every function below, and from the first to_view on nothing runs Python until the work is done.

struct {
    PyTypeObject *matrix, *masked, *boolean, *complex;
} numpy_types;  // set on import

void find_numpy_types() {
    const auto find = [](const char* module, const char* name) {
        return reinterpret_cast<PyTypeObject*>(py::object(py::module_::import(module).attr(name)).release().ptr());
    };
    numpy_types = {find("numpy", "matrix"), find("numpy.ma", "MaskedArray"), find("numpy", "bool_"),
                   find("numpy", "complexfloating")};
}

// Masked arrays and matrices are arrays that mean something else; other subclasses (memmap) are just arrays.
bool plain_array(py::handle o) {
    auto& api = py::detail::npy_api::get();
    PyTypeObject* const type = Py_TYPE(o.ptr());
    if (type == api.PyArray_Type_) return true;
    if (!api.PyArray_Check_(o.ptr())) return false;
    // By the type alone: isinstance would ask the object, too.
    return !PyType_IsSubtype(type, numpy_types.matrix) && !PyType_IsSubtype(type, numpy_types.masked);
}

// A dtype may also name this machine's byte order outright.
constexpr char kNativeOrder = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? '<' : '>';

// bfloat16 is not NumPy's own: ml_dtypes registers it, under a number that is known once somebody has imported it.
int bfloat16_number = -1;

bool is_bfloat16(const py::dtype& d) {
    if (bfloat16_number >= 0) return d.num() == bfloat16_number;
    if (d.itemsize() != 2 || d.num() < py::detail::npy_api::NPY_VOID_) return false;
    const py::dict modules = py::module_::import("sys").attr("modules");
    if (!modules.contains("ml_dtypes")) return false;
    const auto known = py::dtype::from_args(py::object(modules["ml_dtypes"]).attr("bfloat16"));
    bfloat16_number = known.num();
    return d.num() == bfloat16_number;
}

Dtype dtype_of(const py::array& a) {
    const py::dtype d = a.dtype();
    if (d.byteorder() != '=' && d.byteorder() != kNativeOrder) return Dtype::none;
    switch (d.num()) {
        case py::detail::npy_api::NPY_FLOAT_: return Dtype::float32;
        case py::detail::npy_api::NPY_DOUBLE_: return Dtype::float64;
        case kFloat16Number: return Dtype::float16;
        default: return is_bfloat16(d) ? Dtype::bfloat16 : Dtype::none;
    }
}

// False for what is no usable array. None gives a view that is not given.
bool to_view(py::handle o, View* view, bool written = false) {
    if (o.is_none()) return true;
    if (!plain_array(o)) return false;
    const auto a = py::reinterpret_borrow<py::array>(o);
    if (a.ndim() > kMaxDims || (written && !a.writeable())) return false;
    view->dtype = dtype_of(a);
    view->data = const_cast<void*>(a.data());
    view->ndim = static_cast<int>(a.ndim());
    for (int d = 0; d < view->ndim; ++d) {
        view->shape[d] = a.shape(d);
        view->strides[d] = a.strides(d);
    }
    return view->dtype != Dtype::none;
}

// Drops the error of an argument that can't be converted. What is not about the argument, no memory or Ctrl-C, goes on.
void drop_error() {
    if (!PyErr_Occurred()) return;
    if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception)) {
        throw py::error_already_set();
    }
    PyErr_Clear();
}

std::optional<index_t> to_index(py::handle o) {
    if (!PyIndex_Check(o.ptr()) || PyBool_Check(o.ptr())) return std::nullopt;
    const Py_ssize_t i = PyNumber_AsSsize_t(o.ptr(), PyExc_OverflowError);
    if (i == -1 && PyErr_Occurred()) {
        drop_error();
        return std::nullopt;
    }
    return i;
}

std::optional<double> to_double(py::handle o) {
    if (!PyFloat_Check(o.ptr()) && !PyLong_CheckExact(o.ptr())) {
        PyTypeObject* const type = Py_TYPE(o.ptr());
        if (PyBool_Check(o.ptr()) || PyType_IsSubtype(type, numpy_types.boolean)) return std::nullopt;
        if (PyType_IsSubtype(type, numpy_types.complex) || !PyNumber_Check(o.ptr())) return std::nullopt;
        if (py::detail::npy_api::get().PyArray_Check_(o.ptr())) return std::nullopt;
    }
    const double v = PyFloat_AsDouble(o.ptr());
    if (v == -1 && PyErr_Occurred()) {
        drop_error();
        return std::nullopt;
    }
    return v;
}

// What `spec` holds: an int, or a sequence of at most kMaxDims ints; none for anything else.
struct Ints {
    index_t values[kMaxDims];
    int count = 0;
    bool sequence = false;
};

Ints to_ints(py::handle o) {
    Ints ints;
    if (const auto one = to_index(o)) {
        ints.values[0] = *one;
        ints.count = 1;
        return ints;
    }
    if (!PySequence_Check(o.ptr()) || PyUnicode_Check(o.ptr()) || PyBytes_Check(o.ptr()) ||
        PyByteArray_Check(o.ptr()) || PyMemoryView_Check(o.ptr())) {
        return ints;
    }
    ints.sequence = true;
    const Py_ssize_t n = PySequence_Size(o.ptr());
    if (n < 0 || n > kMaxDims) {
        drop_error();
        return ints;
    }
    for (Py_ssize_t i = 0; i < n; ++i) {
        const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(o.ptr(), i));
        const auto index = item ? to_index(item) : std::nullopt;
        if (!index) {
            drop_error();
            return ints;
        }
        ints.values[i] = *index;
    }
    ints.count = static_cast<int>(n);
    return ints;
}

bool to_axis(index_t axis, int ndim, int* out) {
    if (axis < -ndim || axis >= ndim) return false;
    *out = static_cast<int>(axis < 0 ? axis + ndim : axis);
    return true;
}

bool to_spec(int norm, const Ints& ints, const View& x, Spec* spec) {
    const int n = ints.count;
    const index_t* const values = ints.values;
    if (norm < 0 || norm >= kNormCount || !x.given() || n < 1) return false;
    spec->norm = static_cast<Norm>(norm);
    switch (spec->norm) {
        case Norm::batch:
        case Norm::instance: return !ints.sequence && to_axis(values[0], x.ndim, &spec->channel_axis);
        case Norm::group:
            spec->num_groups = values[0];
            return n == 2 && to_axis(values[1], x.ndim, &spec->channel_axis);
        case Norm::layer:
        case Norm::rms:
            spec->normalized_dims = n;
            if (n > x.ndim) return false;
            for (int i = 0; i < n; ++i) {
                if (values[i] != x.shape[x.ndim - n + i]) return false;
            }
            return true;
        default:
            for (int i = 0; i < n; ++i) {
                int axis;
                if (!to_axis(values[i], x.ndim, &axis) || (spec->axes >> axis & 1)) return false;
                spec->axes |= 1u << axis;
            }
            return true;
    }
}

// ------------------------------------------------------------------------------------------------------------ results

// Arrays get their memory from the handler of data memory (NEP 49) in force, and remember it: they own what they get
// from output_memory as they own any other. In force it is a context variable, so ours is set in a context of its own,
// which is entered while a large array is made. Entering allocates nothing, and leaving can't fail.
struct MemoryHandler {
    char name[127];
    std::uint8_t version;
    struct {
        void* of_all;
        void* (*malloc)(void*, std::size_t);
        void* (*calloc)(void*, std::size_t, std::size_t);
        void* (*realloc)(void*, void*, std::size_t);
        void (*free)(void*, void*, std::size_t);
    } functions;
};

void* large_malloc(void*, std::size_t bytes) { return output_memory::allocate(bytes); }
void* large_calloc(void*, std::size_t n, std::size_t element) {
    void* const data = output_memory::allocate(n * element);  // NumPy has looked at the product
    return data ? std::memset(data, 0, n * element) : nullptr;
}
void* large_realloc(void*, void* data, std::size_t bytes) { return output_memory::resize(data, bytes); }
void large_free(void*, void* data, std::size_t) { output_memory::release(data); }

MemoryHandler large_results = {"normkit", 1, {nullptr, large_malloc, large_calloc, large_realloc, large_free}};

struct {
    PyObject* context;  // where the handler is large_results
    PyObject* (*get_handler)();
    PyObject* default_handler;
} numpy_memory;  // set on import

void find_numpy_memory() {
    const auto api_object = py::object(py::detail::import_numpy_core_submodule("multiarray").attr("_ARRAY_API"));
    void** const api = static_cast<void**>(PyCapsule_GetPointer(api_object.ptr(), nullptr));
    if (!api) throw py::error_already_set();
    const auto set_handler = reinterpret_cast<PyObject* (*)(PyObject*)>(api[304]);
    numpy_memory.get_handler = reinterpret_cast<PyObject* (*)()>(api[305]);
    numpy_memory.default_handler = *static_cast<PyObject**>(api[306]);

    const py::capsule handler(&large_results, "mem_handler");
    auto context = py::reinterpret_steal<py::object>(PyContext_New());
    if (!context || PyContext_Enter(context.ptr()) != 0) throw py::error_already_set();
    const auto before = py::reinterpret_steal<py::object>(set_handler(handler.ptr()));
    PyContext_Exit(context.ptr());
    if (!before) throw py::error_already_set();
    numpy_memory.context = context.release().ptr();
}

// Enters that context for a large result, unless somebody has set a handler of their own.
class EnterOutputMemory {
  public:
    explicit EnterOutputMemory(std::size_t bytes) {
        if (bytes < output_memory::kLeast) return;
        const auto handler = py::reinterpret_steal<py::object>(numpy_memory.get_handler());
        entered_ = handler.ptr() == numpy_memory.default_handler && PyContext_Enter(numpy_memory.context) == 0;
        if (!entered_) PyErr_Clear();
    }
    ~EnterOutputMemory() {
        if (entered_) PyContext_Exit(numpy_memory.context);
    }

  private:
    bool entered_ = false;
};

py::array new_array(py::dtype dtype, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides) {
    std::size_t bytes = dtype.itemsize();
    for (int d = 0; d < ndim; ++d) bytes *= shape[d];
    const EnterOutputMemory in(bytes);
    auto& api = py::detail::npy_api::get();
    auto made = py::reinterpret_steal<py::array>(
        api.PyArray_NewFromDescr_(api.PyArray_Type_, dtype.release().ptr(), ndim, shape, strides, nullptr, 0, nullptr));
    if (!made) throw py::error_already_set();
    return made;
}

// A new array like x, its axes in the order of x's memory.
py::array empty_like(const View& x, const py::dtype& dtype) {
    Py_ssize_t shape[kMaxDims], strides[kMaxDims];
    int order[kMaxDims];
    for (int d = 0; d < x.ndim; ++d) {
        shape[d] = x.shape[d];
        int place = d;
        const index_t stride = std::abs(x.strides[d]);
        for (int j = d - 1; j >= 0 && stride != 0; --j) {
            const index_t other = std::abs(x.strides[order[j]]);
            if (other == 0) continue;
            if (other >= stride) break;
            place = j;
        }
        for (int j = d; j > place; --j) order[j] = order[j - 1];
        order[place] = d;
    }
    Py_ssize_t stride = dtype.itemsize();
    for (int j = x.ndim - 1; j >= 0; --j) {
        strides[order[j]] = stride;
        stride *= shape[order[j]] > 0 ? shape[order[j]] : 1;
    }
    return new_array(dtype, x.ndim, shape, strides);
}

py::array empty(const py::dtype& dtype, const index_t* shape, int ndim) {
    Py_ssize_t strides[kMaxDims], stride = dtype.itemsize();
    for (int d = ndim - 1; d >= 0; --d) {
        strides[d] = stride;
        stride *= shape[d] > 0 ? shape[d] : 1;
    }
    return new_array(dtype, ndim, shape, strides);
}

py::array statistics_result(const index_t* shape, int ndim, double** data) {
    py::array made = empty(py::dtype::of<double>(), shape, ndim);
    *data = static_cast<double*>(made.mutable_data());
    return made;
}

py::dtype dtype_object(py::handle array) { return py::reinterpret_borrow<py::array>(array).dtype(); }

// The array to write to: `out` where it is given and fits, else a new one. No value where out does not fit.
std::optional<py::array> result_array(py::handle out, py::handle x, const View& view_of_x, View* view) {
    if (out.is_none()) {
        py::array made = empty_like(view_of_x, dtype_object(x));
        to_view(made, view);
        return made;
    }
    if (!to_view(out, view, true)) return std::nullopt;
    return py::reinterpret_borrow<py::array>(out);
}

// Statistics as the core wants them: float64, C-contiguous, of the norm's shape.
std::optional<py::array> statistics_array(const Spec& spec, const View& x, py::handle o) {
    View view;
    index_t shape[kMaxDims];
    const int ndim = statistics_shape(spec, x, shape);
    if (ndim < 0 || o.is_none() || !to_view(o, &view) || view.dtype != Dtype::float64 || view.ndim != ndim) {
        return std::nullopt;
    }
    for (int d = 0; d < ndim; ++d) {
        if (view.shape[d] != shape[d]) return std::nullopt;
    }
    constexpr int kAsTheCoreReads = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    return py::array_t<double, kAsTheCoreReads>(py::reinterpret_borrow<py::object>(o));
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}

// Takes the GIL again. A daemon thread may come here while the interpreter ends; Python then ends the thread by an
// exception that no frame of C++ can let pass (Python 3.14 lets it sleep). So does this: the process ends without it.
void take_gil(PyThreadState* state) {
    const auto sleep = [] {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    };
    if (is_finalizing()) sleep();
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        sleep();
    }
}

thread_local PyThreadState* waiting_state = nullptr;  // of the call in progress on this thread, without the GIL

// Whether a signal handler wants the call to end; its exception is then set. Called without the GIL.
bool is_signalled() {
    PyThreadState* const state = waiting_state;
    take_gil(state);
    const bool signalled = PyErr_CheckSignals() != 0;
    PyEval_SaveThread();
    waiting_state = state;  // the handler may have called normkit
    return signalled;
}

// While it exists, this thread's calls of the core ask f. They nest: a signal handler may call normkit.
class Asking {
  public:
    explicit Asking(ShouldStop f) : outer_(this_thread_should_stop()) { this_thread_should_stop() = f; }
    ~Asking() { this_thread_should_stop() = outer_; }

  private:
    const ShouldStop outer_;
};

// Long calls release the GIL, and answer Ctrl-C.
template <class F>
bool call(const View& x, F f) {
    if (x.size() < kReleaseGil) {
        const Asking nobody(nullptr);
        return f();
    }
    PyThreadState* const state = waiting_state = PyEval_SaveThread();
    bool done = false;
    std::exception_ptr error;
    try {
        const Asking python(is_signalled);
        done = f();
    } catch (...) {
        error = std::current_exception();
    }
    take_gil(state);
    if (!error) return done;
    try {
        std::rethrow_exception(error);
    } catch (const Interrupted&) {
        throw py::error_already_set();
    }
}

// --------------------------------------------------------------------------------------------------------- operations

// forward (given = false) and evaluate share their arguments but for momentum.
template <class Args, class Operation>
py::object run_forward(int norm, py::handle x, py::handle spec_object, py::handle weight, py::handle bias,
                       py::handle eps, py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                       bool updates, Args& args, Operation operation) {
    const Ints ints = to_ints(spec_object);
    std::optional<double> eps_value;
    if (!eps.is_none()) {
        eps_value = to_double(eps);
        if (!eps_value) return py::none();
    }
    Spec spec;
    if (!to_view(x, &args.x) || !to_spec(norm, ints, args.x, &spec) || !to_view(weight, &args.weight) ||
        !to_view(bias, &args.bias) || !to_view(running_mean, &args.running_mean, updates) ||
        !to_view(running_var, &args.running_var, updates)) {
        return py::none();
    }
    // torch's rule: None stands for the machine epsilon of the type of arithmetic.
    if (!eps_value && spec.norm == Norm::rms) eps_value = args.x.dtype == Dtype::float64 ? 0x1p-52 : 0x1p-23;
    if (!eps_value) return py::none();
    args.eps = *eps_value;
    const auto y = result_array(out, x, args.x, &args.y);
    if (!y) return py::none();
    if (!statistics) {
        if (!call(args.x, [&] { return operation(spec, args); })) return py::none();
        return *y;
    }
    index_t shape[kMaxDims];
    const int ndim = statistics_shape(spec, args.x, shape);
    if (ndim < 0) return py::none();
    const py::array mean = statistics_result(shape, ndim, &args.mean),
                    rstd = statistics_result(shape, ndim, &args.rstd);
    if (!call(args.x, [&] { return operation(spec, args); })) return py::none();
    return py::make_tuple(*y, mean, rstd);
}

py::object py_forward(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                      py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                      py::handle momentum, py::handle ddof) {
    const auto momentum_value = to_double(momentum), ddof_value = to_double(ddof);
    if (!momentum_value || !ddof_value) return py::none();
    Forward args;
    args.momentum = *momentum_value;
    args.ddof = *ddof_value;
    return run_forward(norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, true, args,
                       [](const Spec& s, const Forward& a) { return forward(s, a); });
}

py::object py_evaluate(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                       py::handle out, bool statistics, py::handle running_mean, py::handle running_var) {
    Evaluate args;
    return run_forward(norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, false, args,
                       [](const Spec& s, const Evaluate& a) { return evaluate(s, a); });
}

// A new array for the gradient of the parameters, which has the weight's shape where there is one; none where nothing
// tells the shape. dtype: 0 the weight's (or x's), 1 float32, 2 float64.
std::optional<py::array> gradient_array(const Spec& spec, py::handle x, const View& view_of_x, py::handle weight,
                                        const View& view_of_weight, int dtype, View* view) {
    index_t shape[kMaxDims];
    int ndim = view_of_weight.ndim;
    for (int d = 0; d < ndim; ++d) shape[d] = view_of_weight.shape[d];
    if (!view_of_weight.given()) ndim = parameter_shape(spec, view_of_x, shape);
    if (ndim < 0) return std::nullopt;
    const py::array made = dtype == 1   ? empty(py::dtype::of<float>(), shape, ndim)
                           : dtype == 2 ? empty(py::dtype::of<double>(), shape, ndim)
                                        : empty(dtype_object(view_of_weight.given() ? weight : x), shape, ndim);
    to_view(made, view);
    return made;
}

// needs: 1 for dx, 2 for dweight, 4 for dbias.
py::object py_backward(int norm, py::handle dy, py::handle x, py::handle mean, py::handle rstd, py::handle spec_object,
                       py::handle weight, bool training, int needs, py::handle out, int grad_dtype) {
    const Ints ints = to_ints(spec_object);
    if (grad_dtype < 0 || grad_dtype > 2) return py::none();
    Backward args;
    Spec spec;
    if (!to_view(dy, &args.dy) || !to_view(x, &args.x) || !to_spec(norm, ints, args.x, &spec) ||
        !to_view(weight, &args.weight)) {
        return py::none();
    }
    const bool center = has_mean(spec.norm);
    const auto rstd_array = statistics_array(spec, args.x, rstd);
    const auto mean_array = center ? statistics_array(spec, args.x, mean) : py::array();
    if (!rstd_array || !mean_array) return py::none();
    args.rstd = static_cast<const double*>(rstd_array->data());
    if (center) args.mean = static_cast<const double*>(mean_array->data());
    args.constant_statistics = !training;

    py::object dx = py::none(), dweight = py::none(), dbias = py::none();
    if (needs & 1) {
        const auto result = result_array(out, x, args.x, &args.dx);
        if (!result) return py::none();
        dx = *result;
    } else if (!out.is_none()) {
        return py::none();
    }
    if (needs & 2) {
        const auto made = gradient_array(spec, x, args.x, weight, args.weight, grad_dtype, &args.dweight);
        if (made) dweight = *made;
    }
    if ((needs & 4) && spec.norm != Norm::rms) {
        const auto made = gradient_array(spec, x, args.x, weight, args.weight, grad_dtype, &args.dbias);
        if (made) dbias = *made;
    }
    if (!call(args.x, [&] { return backward(spec, args); })) return py::none();
    return py::make_tuple(dx, dweight, dbias);
}

py::object py_moments(int norm, py::handle x, py::handle spec_object) {
    const Ints ints = to_ints(spec_object);
    Forward args;
    Spec spec;
    if (!to_view(x, &args.x) || !to_spec(norm, ints, args.x, &spec)) return py::none();
    index_t shape[kMaxDims];
    const int ndim = statistics_shape(spec, args.x, shape);
    if (ndim < 0) return py::none();
    const py::array mean = statistics_result(shape, ndim, &args.mean), M2 = statistics_result(shape, ndim, &args.M2);
    args.eps = 0;
    if (!call(args.x, [&] { return forward(spec, args); })) return py::none();
    index_t sets = 1;
    for (int d = 0; d < ndim; ++d) sets *= shape[d];
    return py::make_tuple(sets > 0 ? args.x.size() / sets : 0, mean, M2);
}

// The operations as Python calls them. pybind11's own dispatch, which finds the overload and converts each argument in
// lists on the heap, takes a fifth of a layer norm of one short row.

void to_argument(PyObject* o, py::handle* argument) { *argument = o; }

void to_argument(PyObject* o, int* argument) {
    int overflow;
    const long value = PyLong_AsLongAndOverflow(o, &overflow);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (overflow != 0 || value < INT_MIN || value > INT_MAX)
        throw py::type_error("normkit._core expects a C int, got more");
    *argument = static_cast<int>(value);
}

void to_argument(PyObject* o, bool* argument) {
    if (!PyBool_Check(o)) throw py::type_error(std::string("normkit._core expects a bool, got ") + Py_TYPE(o)->tp_name);
    *argument = o == Py_True;
}

template <class... Arguments, std::size_t... i>
PyObject* call_with(py::object (*f)(Arguments...), PyObject* const* given, std::index_sequence<i...>) {
    std::tuple<Arguments...> arguments;
    (to_argument(given[i], &std::get<i>(arguments)), ...);
    return f(std::get<i>(arguments)...).release().ptr();
}

template <class... Arguments>
PyObject* check_and_call(py::object (*f)(Arguments...), PyObject* const* given, Py_ssize_t count) try {
    constexpr Py_ssize_t kExpected = sizeof...(Arguments);
    if (count != kExpected) {
        throw py::type_error("this function of normkit._core takes " + std::to_string(kExpected) + " arguments, got " +
                             std::to_string(count) + "; use the public ones");
    }
    return call_with(f, given, std::index_sequence_for<Arguments...>());
} catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
} catch (const py::builtin_exception& error) {
    error.set_error();
    return nullptr;
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
} catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
}

template <auto f>
PyObject* operation(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return check_and_call(f, given, count);
}

template <auto f>
PyMethodDef method(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(operation<f>)), METH_FASTCALL, nullptr};
}

PyMethodDef operations[] = {
    method<py_forward>("forward"),
    method<py_evaluate>("evaluate"),
    method<py_backward>("backward"),
    method<py_moments>("moments"),
    {},
};

bool py_copy(py::handle from, py::handle to, bool stream) {
    View source, target;
    if (!to_view(from, &source) || !to_view(to, &target, true)) return false;
    for (const View* v : {&source, &target}) {
        index_t stride = sizeof(float);
        for (int d = v->ndim - 1; d >= 0; --d) {
            if (v->strides[d] != stride) return false;
            stride *= v->shape[d];
        }
        if (v->dtype != Dtype::float32 || v->size() != source.size()) return false;
        if (reinterpret_cast<std::uintptr_t>(v->data) % alignof(float) != 0) return false;
    }
    py::gil_scoped_release released;
    copy(static_cast<const float*>(source.data), static_cast<float*>(target.data), source.size(), stream);
    return true;
}

void py_force(py::handle isa_object, int split, int resident, int stream, int by_row) {
    const char* name = nullptr;
    if (!isa_object.is_none()) {
        const auto isa = py::cast<std::string>(isa_object);
        name = find_isa(isa);
        if (!name) throw py::value_error("isa must be one of normkit._core.isas(), got '" + isa + "'");
    }
    this_thread_choices() = {split, resident, stream, by_row, name};
}

py::dict py_last_path() {
    const Path& path = this_thread_last_path();
    py::dict d;
    d["walk"] = path.walk;
    d["isa"] = path.isa;
    d["threads"] = path.threads;
    d["split"] = path.split;
    d["resident"] = path.resident;
    d["stream"] = path.stream;
    d["by_row"] = path.by_row;
    return d;
}

// NORMKIT_ISA names an instruction set of this machine, or the import says which there are.
void check_environment() {
    const char* name = std::getenv("NORMKIT_ISA");
    if (!name || select_isa(name)) return;
    std::string here;
    for (const std::string& isa : available_isas()) here += (here.empty() ? "" : ", ") + isa;
    throw py::import_error("NORMKIT_ISA must be one of " + here + " on this machine, got '" + std::string(name) +
                           "'; unset it to use the best");
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    check_environment();
    find_numpy_types();
    find_numpy_memory();
    m.doc() = "The compiled core of normkit. Private: use the functions of normkit itself.";
    m.attr("__version__") = NORMKIT_VERSION;
    const char* names[kNormCount] = {"BATCH", "INSTANCE", "GROUP", "LAYER", "RMS", "AXES", "AXES_RMS"};
    for (int i = 0; i < kNormCount; ++i) m.attr(names[i]) = i;

    if (PyModule_AddFunctions(m.ptr(), operations) != 0) throw py::error_already_set();
    m.def("copy", py_copy);

    m.def("set_num_threads", set_num_threads);
    m.def("get_num_threads", get_num_threads);
    m.def("set_output_cache", output_memory::set_limit);
    m.def("output_cache_bytes", output_memory::kept);
    m.def("dtypes", [] {
#define NORMKIT_ROW(name, element, arithmetic) #name,
        const char* const names[] = {NORMKIT_FOR_DTYPES(NORMKIT_ROW)};
#undef NORMKIT_ROW
        py::tuple t(std::size(names));
        for (std::size_t i = 0; i < std::size(names); ++i) t[i] = names[i];
        return t;
    });
    m.def("isas", [] {
        const std::vector<std::string> names = available_isas();
        py::tuple t(names.size());
        for (std::size_t i = 0; i < names.size(); ++i) t[i] = names[i];
        return t;
    });
    m.def("isa", current_isa);
    m.def("force", py_force);
    m.def("last_path", py_last_path);
}
