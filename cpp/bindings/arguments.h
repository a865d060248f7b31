// What the bindings of both backends share: numbers of Python to numbers, the shapes of results, and the way from a
// call in Python to a function of C++.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <climits>
#include <cstdlib>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "normkit/normkit.h"

namespace normkit::bindings {
namespace {  // each module has its own: what has one caller becomes part of it, which a call of 2 us gains 50 ns by

namespace py = pybind11;

// ---------------------------------------------------------------------------------------------------------- arguments

struct NumpyTypes {
    PyTypeObject *matrix, *masked, *boolean, *complex;
};
NumpyTypes numpy_types;  // set on import

void find_numpy_types() {
    const auto find = [](const char* module, const char* name) {
        return reinterpret_cast<PyTypeObject*>(py::object(py::module_::import(module).attr(name)).release().ptr());
    };
    numpy_types = {find("numpy", "matrix"), find("numpy.ma", "MaskedArray"), find("numpy", "bool_"),
                   find("numpy", "complexfloating")};
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

// Strides in bytes of an array in C order.
template <class Stride>
void strides_in_order(const index_t* shape, int ndim, index_t itemsize, Stride* strides) {
    index_t stride = itemsize;
    for (int d = ndim - 1; d >= 0; --d) {
        strides[d] = stride;
        stride *= shape[d] > 0 ? shape[d] : 1;
    }
}

// Strides in bytes of a dense array of x's shape, its axes in the order of x's memory.
template <class Stride>
void strides_like(const View& x, index_t itemsize, Stride* strides) {
    int order[kMaxDims];
    for (int d = 0; d < x.ndim; ++d) {
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
    index_t stride = itemsize;
    for (int j = x.ndim - 1; j >= 0; --j) {
        strides[order[j]] = stride;
        stride *= x.shape[order[j]] > 0 ? x.shape[order[j]] : 1;
    }
}

// ------------------------------------------------------------------------------------------------------------- calls

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

// The operations as Python calls them. pybind11's own dispatch, which finds the overload and converts each argument in
// lists on the heap, takes a fifth of a layer norm of one short row.

void to_argument(PyObject* o, py::handle* argument) { *argument = o; }

void to_argument(PyObject* o, int* argument) {
    int overflow;
    const long value = PyLong_AsLongAndOverflow(o, &overflow);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (overflow != 0 || value < INT_MIN || value > INT_MAX)
        throw py::type_error("the core of normkit expects a C int, got more");
    *argument = static_cast<int>(value);
}

void to_argument(PyObject* o, bool* argument) {
    if (!PyBool_Check(o))
        throw py::type_error(std::string("the core of normkit expects a bool, got ") + Py_TYPE(o)->tp_name);
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
        throw py::type_error("this function of normkit's core takes " + std::to_string(kExpected) + " arguments, got " +
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

}  // namespace
}  // namespace normkit::bindings
