// normkit._core: NumPy arrays to views and back, nothing else. An argument that does not fit makes a function return
// None, having changed nothing; normkit/_errors.py then finds the sentence to raise.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdlib>
#include <optional>

#include "normkit/normkit.h"

namespace py = pybind11;
using namespace normkit;

namespace {

// Elements from which on the GIL is released: below, giving it up and taking it back costs more than others gain.
constexpr index_t kReleaseGil = 64 * 1024;

// ------------------------------------------------------------------------------------------------ arguments

// Masked arrays and matrices are arrays that mean something else; other subclasses (memmap) are just arrays.
bool plain_array(py::handle o) {
    auto& api = py::detail::npy_api::get();
    if (Py_TYPE(o.ptr()) == api.PyArray_Type_) return true;
    if (!api.PyArray_Check_(o.ptr())) return false;
    const py::module_ numpy = py::module_::import("numpy");
    return !py::isinstance(o, numpy.attr("matrix")) && !py::isinstance(o, numpy.attr("ma").attr("MaskedArray"));
}

Dtype dtype_of(const py::array& a) {
    const py::dtype d = a.dtype();
    if (d.byteorder() != '=' && d.byteorder() != '|') return Dtype::none;
    switch (d.num()) {
        case py::detail::npy_api::NPY_FLOAT_: return Dtype::float32;
        case py::detail::npy_api::NPY_DOUBLE_: return Dtype::float64;
        default: return Dtype::none;
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

std::optional<index_t> to_index(py::handle o) {
    if (!PyIndex_Check(o.ptr())) return std::nullopt;
    const Py_ssize_t i = PyNumber_AsSsize_t(o.ptr(), PyExc_OverflowError);
    if (i == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return std::nullopt;
    }
    return i;
}

std::optional<double> to_double(py::handle o) {
    if (!PyFloat_Check(o.ptr()) && !PyNumber_Check(o.ptr())) return std::nullopt;
    const double v = PyFloat_AsDouble(o.ptr());
    if (v == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return std::nullopt;
    }
    return v;
}

// An int or a sequence of at most kMaxDims ints; -1 for anything else.
int to_indices(py::handle o, index_t* out) {
    if (const auto one = to_index(o)) {
        out[0] = *one;
        return 1;
    }
    if (!PySequence_Check(o.ptr()) || py::isinstance<py::str>(o)) {
        PyErr_Clear();
        return -1;
    }
    const Py_ssize_t n = PySequence_Size(o.ptr());
    if (n < 0 || n > kMaxDims) {
        PyErr_Clear();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; ++i) {
        const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(o.ptr(), i));
        const auto index = item ? to_index(item) : std::nullopt;
        if (!index) {
            PyErr_Clear();
            return -1;
        }
        out[i] = *index;
    }
    return static_cast<int>(n);
}

bool to_axis(index_t axis, int ndim, int* out) {
    if (axis < -ndim || axis >= ndim) return false;
    *out = static_cast<int>(axis < 0 ? axis + ndim : axis);
    return true;
}

bool to_spec(int norm, py::handle o, const View& x, Spec* spec) {
    if (norm < 0 || norm >= kNormCount || !x.given()) return false;
    spec->norm = static_cast<Norm>(norm);
    if (spec->norm == Norm::batch || spec->norm == Norm::instance) {
        const auto axis = to_index(o);
        return axis && to_axis(*axis, x.ndim, &spec->channel_axis);
    }
    index_t values[kMaxDims];
    const int n = to_indices(o, values);
    if (n < 1) return false;
    switch (spec->norm) {
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

// torch's rule: None stands for the machine epsilon of float32.
std::optional<double> to_eps(const Spec& spec, py::handle o) {
    if (o.is_none() && spec.norm == Norm::rms) return 0x1p-23;
    return to_double(o);
}

// ------------------------------------------------------------------------------------------------------------ results

// A new float32 array like x, its axes in the order of x's memory.
py::array empty_like(const View& x) {
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
    Py_ssize_t stride = sizeof(float);
    for (int j = x.ndim - 1; j >= 0; --j) {
        strides[order[j]] = stride;
        stride *= shape[order[j]] > 0 ? shape[order[j]] : 1;
    }
    return py::array(py::dtype::of<float>(), std::vector<Py_ssize_t>(shape, shape + x.ndim),
                     std::vector<Py_ssize_t>(strides, strides + x.ndim));
}

template <class T>
py::array_t<T> empty(const index_t* shape, int ndim) {
    return py::array_t<T>(std::vector<Py_ssize_t>(shape, shape + ndim));
}

// The array to write to: `out` where it is given and fits, else a new one. No value where out does not fit.
std::optional<py::array> result_array(py::handle out, const View& x, View* view) {
    if (out.is_none()) {
        py::array made = empty_like(x);
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
    return py::array_t<double, py::array::c_style>::ensure(py::reinterpret_borrow<py::array>(o));
}

template <class F>
bool call(const View& x, F f) {
    if (x.size() < kReleaseGil) return f();
    py::gil_scoped_release released;
    return f();
}

// --------------------------------------------------------------------------------------------------------- operations

// forward (given = false) and evaluate share their arguments but for momentum.
template <class Args, class Operation>
py::object run_forward(int norm, py::handle x, py::handle spec_object, py::handle weight, py::handle bias,
                       py::handle eps, py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                       bool updates, Args args, Operation operation) {
    Spec spec;
    if (!to_view(x, &args.x) || args.x.dtype != Dtype::float32 || !to_spec(norm, spec_object, args.x, &spec) ||
        !to_view(weight, &args.weight) || !to_view(bias, &args.bias) ||
        !to_view(running_mean, &args.running_mean, updates) || !to_view(running_var, &args.running_var, updates)) {
        return py::none();
    }
    const auto eps_value = to_eps(spec, eps);
    index_t shape[kMaxDims];
    const int ndim = statistics_shape(spec, args.x, shape);
    if (!eps_value || ndim < 0) return py::none();
    args.eps = *eps_value;
    const auto y = result_array(out, args.x, &args.y);
    if (!y) return py::none();
    if (!statistics) {
        if (!call(args.x, [&] { return operation(spec, args); })) return py::none();
        return *y;
    }
    auto mean = empty<double>(shape, ndim), rstd = empty<double>(shape, ndim);
    args.mean = mean.mutable_data();
    args.rstd = rstd.mutable_data();
    if (!call(args.x, [&] { return operation(spec, args); })) return py::none();
    return py::make_tuple(*y, mean, rstd);
}

py::object py_forward(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                      py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                      py::handle momentum) {
    const auto momentum_value = to_double(momentum);
    if (!momentum_value) return py::none();
    Forward args;
    args.momentum = *momentum_value;
    return run_forward(norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, true, args,
                       [](const Spec& s, const Forward& a) { return forward(s, a); });
}

py::object py_evaluate(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                       py::handle out, bool statistics, py::handle running_mean, py::handle running_var) {
    return run_forward(norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, false, Evaluate{},
                       [](const Spec& s, const Evaluate& a) { return evaluate(s, a); });
}

// needs: 1 for dx, 2 for dweight, 4 for dbias.
py::object py_backward(int norm, py::handle dy, py::handle x, py::handle mean, py::handle rstd, py::handle spec_object,
                       py::handle weight, bool training, int needs, py::handle out) {
    Backward args;
    Spec spec;
    if (!to_view(dy, &args.dy) || !to_view(x, &args.x) || args.x.dtype != Dtype::float32 ||
        args.dy.dtype != Dtype::float32 || !to_spec(norm, spec_object, args.x, &spec) ||
        !to_view(weight, &args.weight)) {
        return py::none();
    }
    const bool center = spec.norm != Norm::rms && spec.norm != Norm::axes_rms;
    const auto rstd_array = statistics_array(spec, args.x, rstd);
    const auto mean_array = center ? statistics_array(spec, args.x, mean) : py::array();
    if (!rstd_array || !mean_array) return py::none();
    args.rstd = static_cast<const double*>(rstd_array->data());
    if (center) args.mean = static_cast<const double*>(mean_array->data());
    args.constant_statistics = !training;

    py::object dx = py::none(), dweight = py::none(), dbias = py::none();
    if (needs & 1) {
        const auto result = result_array(out, args.x, &args.dx);
        if (!result) return py::none();
        dx = *result;
    } else if (!out.is_none()) {
        return py::none();
    }
    // The parameters' shape: the weight's own where there is one, else the norm's.
    index_t shape[kMaxDims];
    int ndim = args.weight.ndim;
    for (int d = 0; d < ndim; ++d) shape[d] = args.weight.shape[d];
    bool known = args.weight.given();
    if (!known && spec.norm != Norm::axes && spec.norm != Norm::axes_rms) {
        known = true;
        const bool trailing = spec.norm == Norm::layer || spec.norm == Norm::rms;
        ndim = trailing ? spec.normalized_dims : 1;
        for (int d = 0; d < ndim; ++d) {
            shape[d] = trailing ? args.x.shape[args.x.ndim - ndim + d] : args.x.shape[spec.channel_axis];
        }
    }
    if (known && (needs & 2)) {
        auto array = empty<float>(shape, ndim);
        args.dweight = array.mutable_data();
        dweight = array;
    }
    if (known && (needs & 4) && spec.norm != Norm::rms) {
        auto array = empty<float>(shape, ndim);
        args.dbias = array.mutable_data();
        dbias = array;
    }
    if (!call(args.x, [&] { return backward(spec, args); })) return py::none();
    return py::make_tuple(dx, dweight, dbias);
}

py::object py_moments(int norm, py::handle x, py::handle spec_object) {
    Forward args;
    Spec spec;
    if (!to_view(x, &args.x) || !to_spec(norm, spec_object, args.x, &spec)) return py::none();
    index_t shape[kMaxDims];
    const int ndim = statistics_shape(spec, args.x, shape);
    if (ndim < 0) return py::none();
    auto mean = empty<double>(shape, ndim), m2 = empty<double>(shape, ndim);
    args.mean = mean.mutable_data();
    args.m2 = m2.mutable_data();
    args.eps = 0;
    if (!call(args.x, [&] { return forward(spec, args); })) return py::none();
    return py::make_tuple(mean, m2);
}

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
    }
    py::gil_scoped_release released;
    copy(static_cast<const float*>(source.data), static_cast<float*>(target.data), source.size(), stream);
    return true;
}

void py_force(py::handle isa_object, int split, int resident, int stream) {
    const char* name = nullptr;
    if (!isa_object.is_none()) {
        const auto isa = py::cast<std::string>(isa_object);
        name = find_isa(isa);
        if (!name) throw py::value_error("isa must be one of normkit._core.isas(), got '" + isa + "'");
    }
    this_thread_choices() = {split, resident, stream, name};
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
    m.doc() = "The compiled core of normkit. Private: use the functions of normkit itself.";
    m.attr("__version__") = NORMKIT_VERSION;
    const char* names[kNormCount] = {"BATCH", "INSTANCE", "GROUP", "LAYER", "RMS", "AXES", "AXES_RMS"};
    for (int i = 0; i < kNormCount; ++i) m.attr(names[i]) = i;

    m.def("forward", py_forward);
    m.def("evaluate", py_evaluate);
    m.def("backward", py_backward);
    m.def("moments", py_moments);

    m.def("copy", py_copy);

    m.def("set_num_threads", set_num_threads);
    m.def("get_num_threads", get_num_threads);
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
