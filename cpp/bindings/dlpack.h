// The memory layout of DLPack's structures, https://dmlc.github.io/dlpack/latest/c_api.html: how libraries of arrays
// hand an array to each other. Written from the specification; only what the binding needs has a name.
#pragma once

#include <cstdint>

namespace normkit::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaManaged = 13 };

struct Device {
    std::int32_t type, id;
};

enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Type {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    Type dtype;
    std::int64_t* shape;
    std::int64_t* strides;      // in elements; null: C order
    std::uint64_t byte_offset;  // from data to the first element
};

// What a capsule named "dltensor" points to.
struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};

// What a capsule named "dltensor_versioned" points to: from version 1.0 on.
struct ManagedVersioned {
    struct {
        std::uint32_t major, minor;
    } version;
    void* context;
    void (*deleter)(ManagedVersioned*);
    std::uint64_t flags;
    Tensor tensor;
};

constexpr std::uint64_t kReadOnly = 1;  // of flags

// The functions of a library that a capsule named "dlpack_exchange_api" points to, an attribute of its type of arrays:
// what __dlpack__ does and more, without a call of Python, and without synchronization. From version 1.3 on. Those that
// return an int return 0 when done, else they have raised an error of Python.
struct Exchange {
    struct {
        std::uint32_t major, minor;
    } version;
    const void* previous;  // the functions of an older major version
    // A new array like the prototype, in C order; 0, or set_error has been called.
    int (*allocate)(Tensor* prototype, ManagedVersioned** made, void* context,
                    void (*set_error)(void* context, const char* kind, const char* message));
    int (*managed_of)(void* array, ManagedVersioned** made);
    int (*array_of)(ManagedVersioned* given, void** made);  // takes what it is given
    int (*tensor_of)(void* array, Tensor* made);            // may be null
    int (*current_stream)(DeviceType type, std::int32_t id, void** stream);
};

// Capsules are renamed once somebody has taken what they hold.
constexpr const char* kName = "dltensor";
constexpr const char* kNameVersioned = "dltensor_versioned";
constexpr const char* kNameExchange = "dlpack_exchange_api";

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && sizeof(Managed) == 64 && sizeof(ManagedVersioned) == 80));

}  // namespace normkit::dlpack
