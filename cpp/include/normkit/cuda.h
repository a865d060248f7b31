// The operations of normkit.h on a GPU. Every pointer, those in the views included, is to memory of `device`. Work is
// enqueued on `stream` and nothing is waited for; calls can be captured in a CUDA graph, once the first of their kind
// has been made outside of it (it loads the kernels). Link normkit::cuda.
//
// They differ from normkit.h in this: elements must lie at multiples of their size; evaluate can't see a negative
// running variance, it gives NaN there; this_thread_should_stop and the number of threads mean nothing; the bits are
// not those of the CPU. They are the same from run to run, alone and in a batch, and for any number of multiprocessors.
#pragma once

#include <cstddef>
#include <exception>
#include <string>

#include "normkit/normkit.h"

namespace normkit::cuda {

using Stream = void*;  // a cudaStream_t; null: the default stream

// No driver, no such device, a failed launch: one sentence. Nothing is known of the results then. Where the memory of
// the device runs out, std::bad_alloc is thrown instead, and nothing has been enqueued that writes a result.
class Error : public std::exception {
  public:
    explicit Error(std::string text) : text_(std::move(text)) {}
    const char* what() const noexcept override { return text_.c_str(); }

  private:
    std::string text_;
};

// Each returns false, having enqueued nothing, when the arguments do not fit; true when enqueued.
bool forward(const Spec& spec, const Forward& args, int device, Stream stream);
bool evaluate(const Spec& spec, const Evaluate& args, int device, Stream stream);
bool backward(const Spec& spec, const Backward& args, int device, Stream stream);

// Memory in the order of a stream, from a pool of the library's own: what the operations take their workspace from.
void* allocate(std::size_t bytes, int device, Stream stream);
void deallocate(void* p, int device, Stream stream) noexcept;

int device_count();            // 0 without a driver
int device_of(const void* p);  // whose memory it is; -1 for memory of no device, and without a driver

// What is enqueued on `consumer` from now on waits for what has been enqueued on `producer`.
void wait(Stream consumer, Stream producer, int device);

struct Path {                 // what the last call of this thread enqueued
    const char* kernel = "";  // the first that read x
    const char* last = "";
    int launches = 0;
    bool vector = false;  // x and the results are accessed 128 bits at a time
};
const Path& this_thread_last_path();

}  // namespace normkit::cuda
