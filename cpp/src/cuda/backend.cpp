// The GPU behind the operations: device, stream, memory in the order of the stream, and errors in words. The first call
// of the driver is made by the first operation; loading the library makes none.

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "normkit/cuda.h"
#include "operations.h"
#include "start.h"

namespace normkit::cuda {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // what is not sticky is over with this exception
    std::string text =
        std::string(what) + " must succeed, got " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")";
    switch (error) {
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:
            text = "arrays on a GPU need a CUDA device and its driver, got " + std::string(cudaGetErrorName(error)) +
                   " (" + cudaGetErrorString(error) + "); install or update the driver, or use arrays in host memory";
            break;
        case cudaErrorInvalidDevice:
            text += "; normkit.cuda counts devices from 0, as CUDA_VISIBLE_DEVICES leaves them";
            break;
        case cudaErrorNoKernelImageForDevice:
            text += "; build normkit with this device's architecture in CMAKE_CUDA_ARCHITECTURES";
            break;
        default: break;
    }
    throw Error(text);
}

namespace {

// Makes a device the current one of this thread, and the former again.
class Guard {
  public:
    explicit Guard(int device) {
        check(cudaGetDevice(&former_), "asking for the current device");
        if (device == former_) return;
        check(cudaSetDevice(device), "choosing the device");
        changed_ = true;
    }
    ~Guard() {
        if (changed_) cudaSetDevice(former_);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

  private:
    int former_ = 0;
    bool changed_ = false;
};

// Memory that is freed stays with the library, for its next call: the default pool of a device gives it back at every
// synchronization, and getting it again costs more than most norms. More than this goes back to the device.
constexpr std::uint64_t kKeptBytes = std::uint64_t{256} << 20;

cudaMemPool_t pool_of(int device) {
    static std::mutex mutex;
    static std::map<int, cudaMemPool_t> pools;  // they live as long as the process
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = pools.find(device);
    if (found != pools.end()) return found->second;
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    cudaMemPool_t pool = nullptr;
    check(cudaMemPoolCreate(&pool, &properties), "making a pool of memory");
    std::uint64_t kept = kKeptBytes;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "making a pool of memory");
    pools[device] = pool;
    return pool;
}

class Gpu : public Machine {
  public:
    Gpu(int device, Stream stream) : guard_(device), device_(device), stream_(static_cast<cudaStream_t>(stream)) {}

    Device device() override {
        int multiprocessors = 0, shared = 0, l2 = 0;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_), "asking the device");
        check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), "asking the device");
        check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device_), "asking the device");
        return {multiprocessors, shared, l2};
    }
    void* allocate(index_t bytes) override {
        void* p = nullptr;
        const cudaError_t error =
            cudaMallocFromPoolAsync(&p, static_cast<std::size_t>(bytes), pool_of(device_), stream_);
        if (error == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            throw std::bad_alloc();
        }
        check(error, "allocating memory");
        return p;
    }
    void deallocate(void* p) noexcept override { cudaFreeAsync(p, stream_); }
    void zero(void* p, index_t bytes) override {
        check(cudaMemsetAsync(p, 0, static_cast<std::size_t>(bytes), stream_), "zeroing gradients");
    }
    void start(const Launch& launch, const Launches& all) override { cuda::start(launch, all, stream_); }

  private:
    Guard guard_;
    int device_;
    cudaStream_t stream_;
};

}  // namespace

bool forward(const Spec& spec, const Forward& args, int device, Stream stream) {
    Gpu gpu(device, stream);
    return forward(spec, args, gpu);
}
bool evaluate(const Spec& spec, const Evaluate& args, int device, Stream stream) {
    Gpu gpu(device, stream);
    return evaluate(spec, args, gpu);
}
bool backward(const Spec& spec, const Backward& args, int device, Stream stream) {
    Gpu gpu(device, stream);
    return backward(spec, args, gpu);
}

void* allocate(std::size_t bytes, int device, Stream stream) {
    if (bytes == 0) return nullptr;
    Gpu gpu(device, stream);
    return gpu.allocate(static_cast<index_t>(bytes));
}

void deallocate(void* p, int device, Stream stream) noexcept {
    if (!p) return;
    int former = 0;
    if (cudaGetDevice(&former) != cudaSuccess) return;  // the driver is shutting down
    if (former != device) cudaSetDevice(device);
    cudaFreeAsync(p, static_cast<cudaStream_t>(stream));
    if (former != device) cudaSetDevice(former);
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
}

int device_of(const void* p) {
    cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, p) == cudaSuccess) {
        const bool here = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
        return here ? attributes.device : -1;
    }
    cudaGetLastError();
    return -1;
}

void wait(Stream consumer, Stream producer, int device) {
    if (consumer == producer) return;
    const Guard guard(device);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    cudaError_t error = cudaEventRecord(event, static_cast<cudaStream_t>(producer));
    if (error == cudaSuccess) error = cudaStreamWaitEvent(static_cast<cudaStream_t>(consumer), event, 0);
    cudaEventDestroy(event);  // released once it is reached
    check(error, "waiting for a stream");
}

}  // namespace normkit::cuda
