// normkit._cuda: arrays on a GPU to views and back, by DLPack or __cuda_array_interface__. The operations have the
// arguments of those of normkit._core, and a stream. As there, an argument that does not fit makes a function return
// None, having changed nothing; normkit/_errors.py then finds the sentence to raise. Nothing here waits for the GPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "dlpack.h"
#include "normkit/cuda.h"

namespace py = pybind11;
using namespace normkit;
using namespace normkit::bindings;
using normkit::cuda::Stream;

namespace {

// The legacy default stream is 1, so that a stream has one number; 0 may be either default stream.
Stream to_stream(std::uintptr_t pointer) { return reinterpret_cast<Stream>(pointer == 0 ? 1 : pointer); }
std::uintptr_t to_number(Stream stream) { return reinterpret_cast<std::uintptr_t>(stream); }

// Names of methods and keywords, made once.
struct {
    PyObject *dlpack, *interface, *exchange, *requires_grad, *keywords, *old_keywords, *max_version;
} names;  // set on import

void make_names() {
    names.dlpack = PyUnicode_InternFromString("__dlpack__");
    names.interface = PyUnicode_InternFromString("__cuda_array_interface__");
    names.keywords = py::make_tuple("stream", "max_version").release().ptr();
    names.old_keywords = py::make_tuple("stream").release().ptr();
    names.max_version = py::make_tuple(1, 0).release().ptr();
    names.exchange = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    names.requires_grad = PyUnicode_InternFromString("requires_grad");
    if (!names.dlpack || !names.interface || !names.exchange || !names.requires_grad) throw py::error_already_set();
}

// ---------------------------------------------------------------------------------------------------- arrays of others

constexpr int kMostDims = 64;  // that an array can have and be told about

// An array as its library describes it.
struct Array {
    py::object keeper;  // the memory lives while this does
    char* data = nullptr;
    dlpack::Type dtype = {};
    dlpack::Device device = {};
    bool read_only = false;
    int ndim = 0;
    index_t shape[kMostDims], strides[kMostDims];  // strides in bytes

    index_t itemsize() const { return (index_t{dtype.bits} * dtype.lanes + 7) / 8; }
    bool on_gpu() const { return device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged; }
};

// Why an object can't be read: false, and for those who ask, what the object said or did.
bool refuse(std::string* why, const std::string& text) {
    if (why) *why = text;
    return false;
}

// The same of an error that Python has raised. What is not about the argument goes on (drop_error).
bool refuse_error(std::string* why, const char* who) {
    if (why && PyErr_ExceptionMatches(PyExc_Exception) && !PyErr_ExceptionMatches(PyExc_MemoryError)) {
        const py::error_already_set error;
        const auto type = py::str(error.type().attr("__name__")), text = py::str(error.value());
        return refuse(why, std::string("its ") + who + " raises " + std::string(type) + ": " + std::string(text));
    }
    drop_error();
    return false;
}

// The functions of the library of arrays of this very type, null where it has none. A subclass may be of arrays that
// are not what they seem, and is asked by __dlpack__.
const dlpack::Exchange* find_exchange(PyTypeObject* type) {
    const auto of_type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type)).attr("__dict__");
    const int has = PySequence_Contains(of_type.ptr(), names.exchange);
    if (has < 0) throw py::error_already_set();
    if (has == 0) return nullptr;
    const py::object capsule = of_type[py::handle(names.exchange)];
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kNameExchange)) return nullptr;
    auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kNameExchange));
    while (found && found->version.major != 1) found = static_cast<const dlpack::Exchange*>(found->previous);
    return found && found->tensor_of ? found : nullptr;
}

const dlpack::Exchange* exchange_of(py::handle o) {
    static struct {
        PyTypeObject* type;  // a reference: no other type gets its address
        const dlpack::Exchange* exchange;
    } last = {};  // under the GIL
    PyTypeObject* const type = Py_TYPE(o.ptr());
    if (type != last.type) {
        const dlpack::Exchange* const found = find_exchange(type);
        if (!found) return nullptr;  // such types are many, and none of them is worth the place
        Py_INCREF(type);
        Py_XDECREF(last.type);
        last = {type, found};
    }
    return last.exchange;
}

// The stream that the library works on.
Stream current_stream(const dlpack::Exchange& exchange, int device) {
    void* stream = nullptr;
    if (exchange.current_stream(dlpack::kCuda, device, &stream) != 0) throw py::error_already_set();
    return to_stream(to_number(stream));
}

bool read_tensor(const dlpack::Tensor& t, Array* array, std::string* why) {
    if (t.ndim < 0 || t.ndim > kMostDims) return refuse(why, "it has " + std::to_string(t.ndim) + " dimensions");
    array->dtype = t.dtype;
    array->device = t.device;
    array->ndim = t.ndim;
    array->data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
    const index_t itemsize = array->itemsize();
    if (t.strides) {
        for (int d = 0; d < t.ndim; ++d) array->strides[d] = t.strides[d] * itemsize;
    } else {
        strides_in_order(t.shape, t.ndim, itemsize, array->strides);
    }
    std::copy(t.shape, t.shape + t.ndim, array->shape);
    return true;
}

// Makes the stream of the consumer, an int of Python, wait for what is under way on the producer's.
void await(Stream producer, py::handle stream, const Array& array) {
    if (stream.is_none() || !array.data) return;
    const Stream consumer = to_stream(py::cast<std::uintptr_t>(stream));
    if (producer != consumer) cuda::wait(consumer, producer, array.device.id);
}

// The producer makes `stream`, an int of Python, wait for what it has under way. The capsule stays what it is: it is
// only looked into, and whoever made it takes the array back when it dies.
bool read_dlpack(py::handle o, py::handle stream, Array* array, std::string* why) {
    PyObject* const given[] = {o.ptr(), stream.ptr(), names.max_version};
    PyObject* capsule = PyObject_VectorcallMethod(names.dlpack, given, 1, names.keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {  // of a time before versions
        PyErr_Clear();
        capsule = PyObject_VectorcallMethod(names.dlpack, given, 1, names.old_keywords);
    }
    if (!capsule) return refuse_error(why, "__dlpack__");
    array->keeper = py::reinterpret_steal<py::object>(capsule);
    if (PyCapsule_IsValid(capsule, dlpack::kNameVersioned)) {
        const auto& managed =
            *static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule, dlpack::kNameVersioned));
        if (managed.version.major != 1) {
            return refuse(why, "it speaks version " + std::to_string(managed.version.major) + " of DLPack, not 1");
        }
        array->read_only = managed.flags & dlpack::kReadOnly;
        return read_tensor(managed.tensor, array, why);
    }
    if (PyCapsule_IsValid(capsule, dlpack::kName)) {
        array->read_only = false;  // there was no way to say so
        return read_tensor(static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, dlpack::kName))->tensor, array,
                           why);
    }
    return refuse(why, "its __dlpack__ returns no capsule of DLPack");
}

// A typestr of NumPy's: byte order, kind, bytes.
bool read_typestr(const std::string& text, dlpack::Type* dtype) {
    if (text.size() < 3 || text[0] == '>' || text.find_first_not_of("0123456789", 2) != std::string::npos) return false;
    const std::size_t kind = std::string("iufcb").find(text[1]);
    if (kind == std::string::npos || text.size() > 4) return false;
    constexpr dlpack::TypeCode codes[] = {dlpack::kInt, dlpack::kUInt, dlpack::kFloat, dlpack::kComplex, dlpack::kBool};
    const int bytes = std::stoi(text.substr(2));
    *dtype = {codes[kind], static_cast<std::uint8_t>(8 * bytes), 1};
    return bytes > 0 && bytes < 32;
}

// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3 and those before it. It does not
// name the device: the pointer does.
bool read_interface(py::handle o, py::handle stream, Array* array, std::string* why) try {
    auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(o.ptr(), names.interface));
    if (!found) return refuse_error(why, "__cuda_array_interface__");
    const auto interface = py::cast<py::dict>(found);
    const auto get = [&](const char* key) -> py::object {
        return interface.contains(key) ? py::object(interface[key]) : py::none();
    };
    if (!get("mask").is_none()) return refuse(why, "it has a mask");
    const auto shape = py::cast<std::vector<index_t>>(get("shape"));
    const auto data = py::cast<std::pair<std::uintptr_t, bool>>(get("data"));
    const auto typestr = py::cast<std::string>(get("typestr"));
    if (shape.size() > kMostDims) return refuse(why, "it has " + std::to_string(shape.size()) + " dimensions");
    if (!read_typestr(typestr, &array->dtype)) return refuse(why, "its typestr is '" + typestr + "'");
    array->keeper = py::reinterpret_borrow<py::object>(o);
    array->data = reinterpret_cast<char*>(data.first);
    array->read_only = data.second;
    array->ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), array->shape);
    strides_in_order(array->shape, array->ndim, array->itemsize(), array->strides);
    if (const py::object strides = get("strides"); !strides.is_none()) {
        const auto values = py::cast<std::vector<index_t>>(strides);
        if (values.size() != shape.size()) return refuse(why, "its strides are not as many as its dimensions");
        std::copy(values.begin(), values.end(), array->strides);
    }
    const py::object producer = get("stream");
    if (!producer.is_none() && py::cast<std::uintptr_t>(producer) == 0) {
        return refuse(why, "its stream is 0, which may be either default stream");
    }
    array->device = {dlpack::kCuda, array->data ? cuda::device_of(array->data) : -1};
    if (array->data && array->device.id < 0 && cuda::device_count() > 0) {  // else the operation says what is missing
        return refuse(why, "its memory is not a GPU's");
    }
    if (!producer.is_none()) await(to_stream(py::cast<std::uintptr_t>(producer)), stream, *array);
    return true;
} catch (const py::cast_error&) {
    return refuse(why, "its __cuda_array_interface__ is not as version 3 describes it");
}

// An array whose gradient is recorded says so when asked by __dlpack__.
bool read_exchange(const dlpack::Exchange& exchange, py::handle o, Array* array) {
    const auto recorded = py::reinterpret_steal<py::object>(PyObject_GetAttr(o.ptr(), names.requires_grad));
    if (!recorded) drop_error();  // it has no such attribute
    dlpack::Tensor tensor;
    if ((recorded && recorded.ptr() != Py_False) || exchange.tensor_of(o.ptr(), &tensor) != 0) {
        drop_error();
        return false;
    }
    array->keeper = py::reinterpret_borrow<py::object>(o);
    array->read_only = false;
    return read_tensor(tensor, array, nullptr);
}

// stream: an int of Python, or None for one who will not look at the data. (Not -1, which DLPack has for that: JAX
// takes it for a stream, and the CPU's producers take None alone.)
bool read(py::handle o, py::handle stream, Array* array, std::string* why = nullptr) {
    if (const dlpack::Exchange* const exchange = exchange_of(o); exchange && read_exchange(*exchange, o, array)) {
        if (array->on_gpu()) await(current_stream(*exchange, array->device.id), stream, *array);
        return true;
    }
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(o.ptr()));
    if (PyObject_HasAttr(type, names.dlpack)) return read_dlpack(o, stream, array, why);
    if (PyObject_HasAttr(type, names.interface)) return read_interface(o, stream, array, why);
    return refuse(why, "it has neither __dlpack__ nor __cuda_array_interface__");
}

Dtype dtype_of(const dlpack::Type& t) {
    if (t.lanes != 1) return Dtype::none;
    if (t.code == dlpack::kBfloat) return t.bits == 16 ? Dtype::bfloat16 : Dtype::none;
    if (t.code != dlpack::kFloat) return Dtype::none;
    return t.bits == 64 ? Dtype::float64 : t.bits == 32 ? Dtype::float32 : t.bits == 16 ? Dtype::float16 : Dtype::none;
}

dlpack::Type type_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::float64: return {dlpack::kFloat, 64, 1};
        case Dtype::float32: return {dlpack::kFloat, 32, 1};
        case Dtype::float16: return {dlpack::kFloat, 16, 1};
        case Dtype::bfloat16: return {dlpack::kBfloat, 16, 1};
        case Dtype::none: break;
    }
    return {};
}

// As NumPy would call it.
std::string name_of(const dlpack::Type& t) {
    const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};  // and the number of bits
    const char* others[] = {"bool",           "float8_e3m4",     "float8_e4m3",   "float8_e4m3b11fnuz",
                            "float8_e4m3fn",  "float8_e4m3fnuz", "float8_e5m2",   "float8_e5m2fnuz",
                            "float8_e8m0fnu", "float6_e2m3fn",   "float6_e3m2fn", "float4_e2m1fn"};
    const std::size_t beyond = t.code - std::size(kinds);
    std::string name = t.code < std::size(kinds)    ? kinds[t.code] + std::to_string(t.bits)
                       : beyond < std::size(others) ? others[beyond]
                                                    : "DLPack type " + std::to_string(t.code);
    return t.lanes == 1 ? name : name + "x" + std::to_string(t.lanes);
}

// The arguments of one call that are arrays. The first that is read, x, tells the device.
class Arguments {
  public:
    explicit Arguments(py::handle stream) : stream_(stream) {}

    // False for what is no usable array on the device. None gives a view that is not given.
    bool to_view(py::handle o, View* view, bool written = false) {
        if (o.is_none()) return true;
        Array array;
        if (!read(o, stream_, &array)) return false;
        if (!array.on_gpu() || array.ndim > kMaxDims || (written && array.read_only)) return false;
        if (device_ < 0) device_ = array.device.id;  // of an empty one by __cuda_array_interface__ it stays so
        if (array.device.id != device_ && array.data) return false;
        const Dtype dtype = dtype_of(array.dtype);
        if (dtype == Dtype::none) return false;
        const index_t itemsize = array.itemsize();
        bool aligned = reinterpret_cast<std::uintptr_t>(array.data) % itemsize == 0;
        view->data = array.data;
        view->ndim = array.ndim;
        for (int d = 0; d < array.ndim; ++d) {
            view->shape[d] = array.shape[d];
            view->strides[d] = array.strides[d];
            aligned = aligned && array.strides[d] % itemsize == 0;
        }
        if (!aligned) return false;  // a GPU reads whole elements
        view->dtype = dtype;
        keepers_[count_++] = std::move(array.keeper);
        return true;
    }

    // Statistics as the operations want them: float64, C-contiguous, of the norm's shape. Null where they are not.
    const double* to_statistics(const Spec& spec, const View& x, py::handle o, bool* fits) {
        View view;
        index_t shape[kMaxDims], strides[kMaxDims];
        const int ndim = statistics_shape(spec, x, shape);
        *fits = ndim >= 0 && !o.is_none() && to_view(o, &view) && view.dtype == Dtype::float64 && view.ndim == ndim;
        if (!*fits) return nullptr;
        strides_in_order(shape, ndim, sizeof(double), strides);
        for (int d = 0; d < ndim; ++d) {
            *fits = *fits && view.shape[d] == shape[d];
            *fits = *fits && (view.strides[d] == strides[d] || shape[d] <= 1 || view.size() == 0);
        }
        return static_cast<const double*>(view.data);
    }

    int device() const { return std::max(device_, 0); }

  private:
    const py::handle stream_;
    int device_ = -1;
    int count_ = 0;
    py::object keepers_[8];
};

// ------------------------------------------------------------------------------------------------------------- results

// Memory of the device, given back in the order of the stream it was made on. Whoever has been given it for another
// stream has to be through with it, too.
class Memory {
  public:
    // keeper: what the stream lives in, where it lives in an object of Python.
    Memory(std::size_t bytes, int device, Stream stream, py::handle keeper)
        : device_(device), stream_(stream), owned_(true) {
        if (bytes > 0) data_ = cuda::allocate(bytes, device, stream);
        if (!keeper.is_none()) keeper_ = keeper.inc_ref().ptr();
    }
    // Somebody else's.
    Memory(void* data, int device, Stream stream) : data_(data), device_(device), stream_(stream), owned_(false) {}
    Memory(const Memory&) = delete;

    // On any thread, with the GIL or without.
    ~Memory() {
        if (owned_ && data_) {
            for (Stream consumer : consumers_) {
                try {
                    cuda::wait(stream_, consumer, device_);
                } catch (const std::exception&) {  // the driver is gone, and the memory with it
                }
            }
            cuda::deallocate(data_, device_, stream_);
        }
        if (keeper_ && !is_finalizing()) {
            const PyGILState_STATE state = PyGILState_Ensure();
            Py_DECREF(keeper_);
            PyGILState_Release(state);
        }
    }

    // Lets `consumer` use it from now on.
    void share(Stream consumer) {
        if (consumer == stream_) return;
        if (data_) cuda::wait(consumer, stream_, device_);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (std::find(consumers_.begin(), consumers_.end(), consumer) == consumers_.end()) {
            consumers_.push_back(consumer);
        }
    }

    void* data() const { return data_; }
    int device() const { return device_; }
    Stream stream() const { return stream_; }

  private:
    void* data_ = nullptr;
    const int device_;
    const Stream stream_;
    const bool owned_;
    PyObject* keeper_ = nullptr;
    std::mutex mutex_;
    std::vector<Stream> consumers_;
};

// What the operations return, for the library of x to take over.
struct DeviceArray {
    std::shared_ptr<Memory> memory;
    View view;
};

py::tuple to_tuple(const index_t* values, int count) {
    py::tuple t(count);
    for (int i = 0; i < count; ++i) t[i] = values[i];
    return t;
}

// An array handed over: it lives as long as its consumer wants.
template <class M>
struct Export {
    M managed = {};
    std::shared_ptr<Memory> memory;
    index_t shape[kMaxDims], strides[kMaxDims];  // strides in elements, as DLPack counts them
};

template <class M>
void delete_export(M* managed) {
    delete static_cast<Export<M>*>(managed->context);
}

// A capsule that nobody has taken anything out of gives it back.
template <class M>
void delete_capsule(PyObject* capsule, const char* name) {
    if (!PyCapsule_IsValid(capsule, name)) return;
    auto* const managed = static_cast<M*>(PyCapsule_GetPointer(capsule, name));
    managed->deleter(managed);
}

template <class M>
py::object export_as(const DeviceArray& array, const char* name, PyCapsule_Destructor destructor) {
    auto made = std::make_unique<Export<M>>();
    const dlpack::Type dtype = type_of(array.view.dtype);
    for (int d = 0; d < array.view.ndim; ++d) {
        made->shape[d] = array.view.shape[d];
        made->strides[d] = array.view.strides[d] / (dtype.bits / 8);
    }
    made->memory = array.memory;
    made->managed.context = made.get();
    made->managed.deleter = delete_export<M>;
    made->managed.tensor = {array.view.data,
                            {dlpack::kCuda, array.memory->device()},
                            array.view.ndim,
                            dtype,
                            made->shape,
                            made->strides,
                            0};
    if constexpr (std::is_same_v<M, dlpack::ManagedVersioned>) made->managed.version = {1, 0};
    PyObject* const capsule = PyCapsule_New(&made->managed, name, destructor);
    if (!capsule) throw py::error_already_set();
    made.release();
    return py::reinterpret_steal<py::object>(capsule);
}

// https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html
py::object to_dlpack(const DeviceArray& array, py::handle stream, py::handle max_version, py::handle dl_device,
                     py::handle copy) {
    if (!dl_device.is_none()) {
        const auto [type, id] = py::cast<std::pair<int, int>>(dl_device);
        if (type != dlpack::kCuda || id != array.memory->device()) {
            throw py::buffer_error("dl_device must be the array's own, (2, " + std::to_string(array.memory->device()) +
                                   "), got (" + std::to_string(type) + ", " + std::to_string(id) +
                                   "); copy the array where it has been handed over");
        }
    }
    if (copy.ptr() == Py_True) {
        throw py::buffer_error("copy must be None or False, got True; copy the array where it has been handed over");
    }
    const std::intptr_t consumer = stream.is_none() ? 1 : py::cast<std::intptr_t>(stream);
    if (consumer == 0) {
        throw py::value_error("stream must not be 0, got 0; 1 is the legacy default stream, 2 the one per thread");
    }
    if (consumer != -1) array.memory->share(to_stream(consumer));
    if (!max_version.is_none() && py::cast<std::pair<int, int>>(max_version).first >= 1) {
        return export_as<dlpack::ManagedVersioned>(array, dlpack::kNameVersioned, [](PyObject* capsule) {
            delete_capsule<dlpack::ManagedVersioned>(capsule, dlpack::kNameVersioned);
        });
    }
    return export_as<dlpack::Managed>(
        array, dlpack::kName, [](PyObject* capsule) { delete_capsule<dlpack::Managed>(capsule, dlpack::kName); });
}

bool in_order(const View& v) {
    index_t strides[kMaxDims];
    strides_in_order(v.shape, v.ndim, type_of(v.dtype).bits / 8, strides);
    return std::equal(strides, strides + v.ndim, v.strides);
}

py::dict to_interface(const DeviceArray& array) {
    if (array.view.dtype == Dtype::bfloat16) {
        throw py::attribute_error("__cuda_array_interface__ has no bfloat16; use DLPack");
    }
    py::dict interface;
    interface["version"] = 3;
    interface["shape"] = to_tuple(array.view.shape, array.view.ndim);
    interface["typestr"] = "<f" + std::to_string(type_of(array.view.dtype).bits / 8);
    interface["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(array.view.data), false);
    interface["strides"] =
        in_order(array.view) ? py::object(py::none()) : py::object(to_tuple(array.view.strides, array.view.ndim));
    interface["stream"] = to_number(array.memory->stream());
    return interface;
}

std::string to_text(const DeviceArray& array) {
    return "normkit.cuda.DeviceArray(shape=" + std::string(py::repr(to_tuple(array.view.shape, array.view.ndim))) +
           ", dtype=" + name_of(type_of(array.view.dtype)) + ", device=" + std::to_string(array.memory->device()) + ")";
}

// ---------------------------------------------------------------------------------------------------------- operations

// A result on its way: in memory of ours, or in an array of x's library where that has the functions for it.
class Result {
  public:
    Result() = default;
    Result(const Result&) = delete;
    ~Result() {
        if (managed_) managed_->deleter(managed_);
    }

    const View& view() const { return view_; }

    void make(Dtype dtype, const index_t* shape, int ndim, const index_t* strides, int device, Stream stream,
              py::handle keeper) {
        describe(dtype, shape, ndim, strides);
        memory_ = std::make_shared<Memory>(view_.size() * type_of(dtype).bits / 8, device, stream, keeper);
        view_.data = memory_->data();
    }

    // The library gives memory as it gives its own, on the stream that it works on.
    void make(Dtype dtype, const index_t* shape, int ndim, const index_t* strides, int device,
              const dlpack::Exchange& exchange) {
        describe(dtype, shape, ndim, strides);
        dlpack::Tensor prototype = {nullptr, {dlpack::kCuda, device}, ndim, type_of(dtype), view_.shape, nullptr, 0};
        std::string error;
        const auto set_error = [](void* context, const char* kind, const char* message) {
            *static_cast<std::string*>(context) = std::string(kind) + ": " + message;
        };
        if (exchange.allocate(&prototype, &managed_, &error, set_error) != 0 || !managed_) {
            managed_ = nullptr;
            PyErr_SetString(PyExc_MemoryError, ("the library of x gave no memory for the result: " + error).c_str());
            throw py::error_already_set();
        }
        exchange_ = &exchange;
        view_.data = static_cast<char*>(managed_->tensor.data) + managed_->tensor.byte_offset;
    }

    py::object hand_over() {
        if (!managed_) return py::cast(DeviceArray{std::move(memory_), view_});
        index_t strides[kMaxDims];  // in elements; those in order are of the memory, these of the array
        for (int d = 0; d < view_.ndim; ++d) strides[d] = view_.strides[d] / (type_of(view_.dtype).bits / 8);
        managed_->tensor.strides = strides;
        void* made = nullptr;
        const int failed = exchange_->array_of(std::exchange(managed_, nullptr), &made);
        if (failed || !made) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
    }

  private:
    void describe(Dtype dtype, const index_t* shape, int ndim, const index_t* strides) {
        view_.dtype = dtype;
        view_.ndim = ndim;
        std::copy(shape, shape + ndim, view_.shape);
        std::copy(strides, strides + ndim, view_.strides);
    }

    View view_;
    std::shared_ptr<Memory> memory_;
    dlpack::ManagedVersioned* managed_ = nullptr;
    const dlpack::Exchange* exchange_ = nullptr;
};

// Where a call computes, and where its results come from.
class Place {
  public:
    // stream: an int of Python, or None for the stream that the library of x works on, where it has functions to say
    // so.
    Place(py::handle x, py::handle stream, py::handle keeper) : keeper_(keeper), exchange_(exchange_of(x)) {
        if (exchange_) {
            dlpack::Tensor tensor;
            if (exchange_->tensor_of(x.ptr(), &tensor) != 0) {
                PyErr_Clear();
            } else if (tensor.device.type != dlpack::kCpu) {
                own_ = current_stream(*exchange_, tensor.device.id);
            }
        }
        stream_ = stream.is_none() ? own_ : to_stream(py::cast<std::uintptr_t>(stream));
        number_ = py::int_(to_number(stream_));
    }

    void set_device(int device) { device_ = device; }
    const py::int_& number() const { return number_; }

    void make(Dtype dtype, const index_t* shape, int ndim, Result* result) const {
        index_t strides[kMaxDims];
        strides_in_order(shape, ndim, type_of(dtype).bits / 8, strides);
        make(dtype, shape, ndim, strides, result);
    }

    void make_like(const View& x, Result* result) const {
        index_t strides[kMaxDims];
        strides_like(x, type_of(x.dtype).bits / 8, strides);
        make(x.dtype, x.shape, x.ndim, strides, result);
    }

    // Launching may take long where the queue of the GPU is full.
    template <class F>
    bool call(F f) const {
        // Another stream than the library's must neither overtake it (its memory may just have been in use) nor be
        // overtaken (it may give memory away once more).
        const bool apart = exchange_ && stream_ != own_;
        PyThreadState* const state = PyEval_SaveThread();
        bool done = false;
        std::exception_ptr error;
        try {
            if (apart) cuda::wait(stream_, own_, device_);
            done = f(device_, stream_);
            if (apart && done) cuda::wait(own_, stream_, device_);
        } catch (...) {
            error = std::current_exception();
        }
        take_gil(state);
        if (error) std::rethrow_exception(error);
        return done;
    }

  private:
    void make(Dtype dtype, const index_t* shape, int ndim, const index_t* strides, Result* result) const {
        if (exchange_) {
            result->make(dtype, shape, ndim, strides, device_, *exchange_);
        } else {
            result->make(dtype, shape, ndim, strides, device_, stream_, keeper_);
        }
    }

    int device_ = 0;
    Stream stream_ = nullptr, own_ = to_stream(0);  // own_: the one that the library of x works on
    py::handle keeper_;
    py::int_ number_;
    const dlpack::Exchange* exchange_;
};

// The array to write to, `out` where it is given; false where that does not fit.
bool to_result(py::handle out, const View& x, Arguments* arguments, const Place& place, Result* made, View* view) {
    if (!out.is_none()) return arguments->to_view(out, view, true);
    place.make_like(x, made);
    *view = made->view();
    return true;
}

py::object hand_over(py::handle out, Result* made) {
    return out.is_none() ? made->hand_over() : py::reinterpret_borrow<py::object>(out);
}

template <class Args, class Operation>
py::object run_forward(int norm, py::handle x, py::handle spec_object, py::handle weight, py::handle bias,
                       py::handle eps, py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                       bool updates, py::handle stream, py::handle keeper, Args& args, Operation operation) {
    const Ints ints = to_ints(spec_object);
    std::optional<double> eps_value;
    if (!eps.is_none()) {
        eps_value = to_double(eps);
        if (!eps_value) return py::none();
    }
    Place place(x, stream, keeper);
    Arguments arguments(place.number());
    Spec spec;
    if (!arguments.to_view(x, &args.x) || !to_spec(norm, ints, args.x, &spec) ||
        !arguments.to_view(weight, &args.weight) || !arguments.to_view(bias, &args.bias) ||
        !arguments.to_view(running_mean, &args.running_mean, updates) ||
        !arguments.to_view(running_var, &args.running_var, updates)) {
        return py::none();
    }
    if (!eps_value && spec.norm == Norm::rms) eps_value = args.x.dtype == Dtype::float64 ? 0x1p-52 : 0x1p-23;
    if (!eps_value) return py::none();
    args.eps = *eps_value;
    place.set_device(arguments.device());
    Result y, mean, rstd;
    if (!to_result(out, args.x, &arguments, place, &y, &args.y)) return py::none();
    if (statistics) {
        index_t shape[kMaxDims];
        const int ndim = statistics_shape(spec, args.x, shape);
        if (ndim < 0) return py::none();
        for (Result* result : {&mean, &rstd}) place.make(Dtype::float64, shape, ndim, result);
        args.mean = static_cast<double*>(mean.view().data);
        args.rstd = static_cast<double*>(rstd.view().data);
    }
    if (!place.call([&](int device, Stream on) { return operation(spec, args, device, on); })) return py::none();
    if (!statistics) return hand_over(out, &y);
    return py::make_tuple(hand_over(out, &y), mean.hand_over(), rstd.hand_over());
}

py::object py_forward(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                      py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                      py::handle momentum, py::handle ddof, py::handle stream, py::handle keeper) {
    const auto momentum_value = to_double(momentum), ddof_value = to_double(ddof);
    if (!momentum_value || !ddof_value) return py::none();
    Forward args;
    args.momentum = *momentum_value;
    args.ddof = *ddof_value;
    return run_forward(
        norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, true, stream, keeper, args,
        [](const Spec& s, const Forward& a, int device, Stream on) { return cuda::forward(s, a, device, on); });
}

py::object py_evaluate(int norm, py::handle x, py::handle spec, py::handle weight, py::handle bias, py::handle eps,
                       py::handle out, bool statistics, py::handle running_mean, py::handle running_var,
                       py::handle stream, py::handle keeper) {
    Evaluate args;
    return run_forward(
        norm, x, spec, weight, bias, eps, out, statistics, running_mean, running_var, false, stream, keeper, args,
        [](const Spec& s, const Evaluate& a, int device, Stream on) { return cuda::evaluate(s, a, device, on); });
}

// The gradient of the parameters, which has the weight's shape where there is one; nothing where nothing tells the
// shape. dtype: 0 the weight's (or x's), 1 float32, 2 float64.
bool make_gradient(const Spec& spec, const View& x, const View& weight, int dtype, const Place& place, Result* made,
                   View* view) {
    index_t shape[kMaxDims];
    int ndim = weight.ndim;
    std::copy(weight.shape, weight.shape + ndim, shape);
    if (!weight.given()) ndim = parameter_shape(spec, x, shape);
    if (ndim < 0) return false;
    const Dtype own = weight.given() ? weight.dtype : x.dtype;
    const Dtype wanted[] = {own, Dtype::float32, Dtype::float64};
    place.make(wanted[dtype], shape, ndim, made);
    *view = made->view();
    return true;
}

// needs: 1 for dx, 2 for dweight, 4 for dbias.
py::object py_backward(int norm, py::handle dy, py::handle x, py::handle mean, py::handle rstd, py::handle spec_object,
                       py::handle weight, bool training, int needs, py::handle out, int grad_dtype, py::handle stream,
                       py::handle keeper) {
    const Ints ints = to_ints(spec_object);
    if (grad_dtype < 0 || grad_dtype > 2) return py::none();
    Place place(x, stream, keeper);
    Arguments arguments(place.number());
    Backward args;
    Spec spec;
    if (!arguments.to_view(x, &args.x) || !to_spec(norm, ints, args.x, &spec) || !arguments.to_view(dy, &args.dy) ||
        !arguments.to_view(weight, &args.weight)) {
        return py::none();
    }
    bool fits;
    args.rstd = arguments.to_statistics(spec, args.x, rstd, &fits);
    if (fits && has_mean(spec.norm)) args.mean = arguments.to_statistics(spec, args.x, mean, &fits);
    if (!fits) return py::none();
    args.constant_statistics = !training;

    place.set_device(arguments.device());
    Result dx, dweight, dbias;
    if ((needs & 1) == 0 && !out.is_none()) return py::none();
    if ((needs & 1) && !to_result(out, args.x, &arguments, place, &dx, &args.dx)) return py::none();
    const bool has_dweight =
        (needs & 2) && make_gradient(spec, args.x, args.weight, grad_dtype, place, &dweight, &args.dweight);
    const bool has_dbias = (needs & 4) && spec.norm != Norm::rms &&
                           make_gradient(spec, args.x, args.weight, grad_dtype, place, &dbias, &args.dbias);
    if (!place.call([&](int device, Stream on) { return cuda::backward(spec, args, device, on); })) return py::none();
    return py::make_tuple((needs & 1) ? hand_over(out, &dx) : py::none(),
                          has_dweight ? dweight.hand_over() : py::none(), has_dbias ? dbias.hand_over() : py::none());
}

PyMethodDef operations[] = {
    method<py_forward>("forward"),
    method<py_evaluate>("evaluate"),
    method<py_backward>("backward"),
    {},
};

// The device of an array whose library has functions to say so, as DLPack numbers it; else None.
py::object place_of(py::handle o) {
    const dlpack::Exchange* const exchange = exchange_of(o);
    dlpack::Tensor tensor;
    if (!exchange) return py::none();
    if (exchange->tensor_of(o.ptr(), &tensor) != 0) {
        drop_error();
        return py::none();
    }
    return py::make_tuple(tensor.device.type, tensor.device.id);
}

// What the errors have to know of an array: the device as DLPack numbers it, address, dtype, bytes of an element,
// shape, strides in bytes, whether it is read-only. BufferError says why nothing can be known.
py::tuple describe(py::handle o) {
    Array array;
    std::string why;
    if (!read(o, py::none(), &array, &why)) throw py::buffer_error(why);
    return py::make_tuple(array.device.type, array.device.id, reinterpret_cast<std::uintptr_t>(array.data),
                          name_of(array.dtype), array.itemsize(), to_tuple(array.shape, array.ndim),
                          to_tuple(array.strides, array.ndim), array.read_only);
}

// An array in memory that is somebody else's and stays so: for tests.
DeviceArray borrow(std::uintptr_t address, const std::vector<index_t>& shape, const std::string& dtype, int device,
                   std::uintptr_t stream) {
    DeviceArray made;
#define NORMKIT_ROW(name, element, arithmetic) \
    if (dtype == #name) made.view.dtype = Dtype::name;
    NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW
    if (!made.view.given() || shape.size() > kMaxDims) throw py::value_error("no such array");
    made.view.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), made.view.shape);
    strides_in_order(made.view.shape, made.view.ndim, type_of(made.view.dtype).bits / 8, made.view.strides);
    made.view.data = reinterpret_cast<void*>(address);
    made.memory = std::make_shared<Memory>(made.view.data, device, to_stream(stream));
    return made;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    find_numpy_types();
    make_names();
    m.doc() = "normkit on GPUs. Private: use the functions of normkit itself, and normkit.cuda.";
    m.attr("__version__") = NORMKIT_VERSION;
    if (PyModule_AddFunctions(m.ptr(), operations) != 0) throw py::error_already_set();

    py::class_<DeviceArray>(m, "DeviceArray")
        .def("__dlpack__", to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
             py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
        .def("__dlpack_device__",
             [](const DeviceArray& a) { return py::make_tuple(int{dlpack::kCuda}, a.memory->device()); })
        .def_property_readonly("__cuda_array_interface__", to_interface)
        .def("__repr__", to_text)
        .def_property_readonly("shape", [](const DeviceArray& a) { return to_tuple(a.view.shape, a.view.ndim); })
        .def_property_readonly("strides", [](const DeviceArray& a) { return to_tuple(a.view.strides, a.view.ndim); })
        .def_property_readonly("dtype", [](const DeviceArray& a) { return name_of(type_of(a.view.dtype)); })
        .def_property_readonly("ndim", [](const DeviceArray& a) { return a.view.ndim; })
        .def_property_readonly("size", [](const DeviceArray& a) { return a.view.size(); })
        .def_property_readonly("device", [](const DeviceArray& a) { return a.memory->device(); })
        .def_property_readonly("stream", [](const DeviceArray& a) { return to_number(a.memory->stream()); });

    m.def("describe", describe);
    m.def("place_of", place_of);
    m.def("borrow", borrow);
    m.def("device_count", cuda::device_count);
    m.def("wait", [](std::uintptr_t consumer, std::uintptr_t producer, int device) {
        cuda::wait(to_stream(consumer), to_stream(producer), device);
    });
    m.def("last_path", [] {
        const cuda::Path& path = cuda::this_thread_last_path();
        py::dict d;
        d["kernel"] = path.kernel;
        d["last"] = path.last;
        d["launches"] = path.launches;
        d["vector"] = path.vector;
        return d;
    });
}
