// normkit._core: NumPy arrays to views and back, nothing else. An argument that does not fit makes a function return
// None, having changed nothing; normkit/_errors.py then finds the sentence to raise.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "output_memory.h"

namespace py = pybind11;
using namespace normkit;
using namespace normkit::bindings;

namespace {

// Elements from which on the GIL is released: below, giving it up and taking it back costs more than others gain.
constexpr index_t kReleaseGil = 64 * 1024;

constexpr int kFloat16Number = 23;  // NPY_HALF, which pybind11 does not list

// ------------------------------------------------------------------------------------------------ arguments

// Converting a number may run Python, which may give the memory of an array back or change its shape. So numbers come
// first in every function below, and from the first to_view on nothing runs Python until the work is done.
//
// `stream` is for arrays on a GPU (_cuda has operations of the same arguments): any but None does not fit here.

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

// ------------------------------------------------------------------------------------------------------------ results

// Arrays get their memory from the handler of data memory (NEP 49) in force, and remember it: they own what they get
// from output_memory as they own any other. In force it is a context variable, so ours are set in contexts of their
// own, of which one is entered while an array is made. Entering allocates nothing, and leaving can't fail.
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

template <void* (*malloc)(void*, std::size_t)>
void* cleared(void* of_all, std::size_t n, std::size_t element) {
    void* const data = malloc(of_all, n * element);  // NumPy has looked at the product
    return data ? std::memset(data, 0, n * element) : nullptr;
}

void* large_malloc(void*, std::size_t bytes) { return output_memory::allocate(bytes); }
void* large_realloc(void*, void* data, std::size_t bytes) { return output_memory::resize(data, bytes); }
void large_free(void*, void* data, std::size_t) { output_memory::release(data); }

void* lined_up_malloc(void*, std::size_t bytes) { return output_memory::allocate_lined_up(bytes); }
void* lined_up_realloc(void*, void* data, std::size_t bytes) { return std::realloc(data, bytes); }
void lined_up_free(void*, void* data, std::size_t) { std::free(data); }

MemoryHandler large_results = {"normkit", 1, {nullptr, large_malloc, cleared<large_malloc>, large_realloc, large_free}};
MemoryHandler lined_up_results = {
    "normkit_lined_up", 1, {nullptr, lined_up_malloc, cleared<lined_up_malloc>, lined_up_realloc, lined_up_free}};

struct {
    PyObject *large, *lined_up;  // contexts, by the handler in force there
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

    const auto context_of = [&](MemoryHandler* handler) {
        const py::capsule capsule(handler, "mem_handler");
        auto context = py::reinterpret_steal<py::object>(PyContext_New());
        if (!context || PyContext_Enter(context.ptr()) != 0) throw py::error_already_set();
        const auto before = py::reinterpret_steal<py::object>(set_handler(capsule.ptr()));
        PyContext_Exit(context.ptr());
        if (!before) throw py::error_already_set();
        return context.release().ptr();
    };
    numpy_memory.large = context_of(&large_results);
    numpy_memory.lined_up = context_of(&lined_up_results);
}

// Enters the context for a result of so many bytes, unless somebody has set a handler of their own.
class EnterOutputMemory {
  public:
    explicit EnterOutputMemory(std::size_t bytes) {
        if (bytes < output_memory::kLeastLinedUp) return;
        PyObject* const context = bytes < output_memory::kLeast ? numpy_memory.lined_up : numpy_memory.large;
        const auto handler = py::reinterpret_steal<py::object>(numpy_memory.get_handler());
        if (handler.ptr() == numpy_memory.default_handler && PyContext_Enter(context) == 0) {
            entered_ = context;
        } else {
            PyErr_Clear();
        }
    }
    ~EnterOutputMemory() {
        if (entered_) PyContext_Exit(entered_);
    }

  private:
    PyObject* entered_ = nullptr;
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
    for (int d = 0; d < x.ndim; ++d) shape[d] = x.shape[d];
    strides_like(x, dtype.itemsize(), strides);
    return new_array(dtype, x.ndim, shape, strides);
}

py::array empty(const py::dtype& dtype, const index_t* shape, int ndim) {
    Py_ssize_t strides[kMaxDims];
    strides_in_order(shape, ndim, dtype.itemsize(), strides);
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
                      py::handle momentum, py::handle ddof, py::handle stream) {
    if (!stream.is_none()) return py::none();
    const auto momentum_value = to_double(momentum), ddof_value = to_double(ddof);
    if (!momentum_value || !ddof_value) return py::none();
    Forward args;
    args.momentum = *momentum_value;
    args.ddof = *ddof_value;
    return run_forward(norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, true, args,
                       [](const Spec& s, const Forward& a) { return forward(s, a); });
}

py::object py_evaluate(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                       py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                       py::handle stream) {
    if (!stream.is_none()) return py::none();
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
                       py::handle weight, bool training, int needs, py::handle out, int grad_dtype, py::handle stream) {
    const Ints ints = to_ints(spec_object);
    if (grad_dtype < 0 || grad_dtype > 2 || !stream.is_none()) return py::none();
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

void py_force(py::handle isa_object, int split, int resident, int stream, int by_row, int by_sample) {
    const char* name = nullptr;
    if (!isa_object.is_none()) {
        const auto isa = py::cast<std::string>(isa_object);
        name = find_isa(isa);
        if (!name) throw py::value_error("isa must be one of normkit._core.isas(), got '" + isa + "'");
    }
    this_thread_choices() = {split, resident, stream, by_row, name, by_sample};
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
    d["by_sample"] = path.by_sample;
    d["in_eights"] = path.in_eights;
    d["in_parts"] = path.in_parts;
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
