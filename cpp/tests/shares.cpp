// How pieces of work are shared out: each is done once, whatever the number of threads; one thread takes them in order;
// and several, each with a piece of its own, come to the same pieces in every loop, in either order. And loops too
// short to ask whether to give up ask together, where they are one call. Built with and without OpenMP.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "../src/cpu/parallel.h"

using normkit::index_t;
using normkit::cpu::Order;
using normkit::cpu::parallel_for;

namespace {

constexpr Order kOrders[] = {Order::forwards, Order::backwards};

bool once_each(index_t pieces, int threads, Order order) {
    std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[pieces + 1]());
    parallel_for(pieces, threads, order, [&](index_t i) { ++done[i]; });
    for (index_t i = 0; i < pieces; ++i) {
        if (done[i] != 1) return false;
    }
    return true;
}

bool in_order(Order order) {
    std::vector<index_t> seen;
    parallel_for(10, 1, order, [&](index_t i) { seen.push_back(i); });
    for (index_t i = 0; i < 10; ++i) {
        if (seen[i] != (order == Order::forwards ? i : 9 - i)) return false;
    }
    return seen.size() == 10;
}

// Who does each of as many pieces as there are threads, all at the same time; empty where they do not come together,
// for want of threads.
std::vector<std::thread::id> who(int threads, Order order) {
    std::vector<std::thread::id> ids(threads);
    std::atomic<int> here{0};
    parallel_for(threads, threads, order, [&](index_t i) {
        ids[i] = std::this_thread::get_id();
        ++here;
        const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
        while (here < threads && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    });
    for (int i = 0; i < threads; ++i) {
        for (int j = 0; j < i; ++j) {
            if (ids[i] == ids[j]) return {};
        }
    }
    return ids;
}

// Whether a call of many loops, each of 5 ms, is interrupted.
bool gives_up_between_loops(int threads) {
    normkit::this_thread_should_stop() = [] { return true; };
    bool interrupted = false;
    try {
        const normkit::cpu::OneCall all;
        for (int loop = 0; loop < 100; ++loop) {
            parallel_for(threads, threads, [](index_t) { std::this_thread::sleep_for(std::chrono::milliseconds(5)); });
        }
    } catch (const normkit::Interrupted&) {
        interrupted = true;
    }
    normkit::this_thread_should_stop() = nullptr;
    return interrupted;
}

}  // namespace

int main() {
    int failures = 0;
    const auto expect = [&](bool right, const char* what, index_t pieces, int threads) {
        if (right) return;
        std::printf("%s: %lld pieces, %d threads\n", what, static_cast<long long>(pieces), threads);
        ++failures;
    };
    for (const Order order : kOrders) {
        for (const int threads : {1, 2, 3, 8, 64, 65, 130}) {
            for (const index_t pieces : {0, 1, 2, 3, 7, 63, 64, 65, 131, 1000}) {
                expect(once_each(pieces, threads, order), "not each piece once", pieces, threads);
            }
        }
        expect(in_order(order), "one thread, out of order", 10, 1);
    }
    for (const int threads : {1, 2}) expect(gives_up_between_loops(threads), "not interrupted", threads, threads);
    for (const int threads : {2, 3, 4}) {
        const std::vector<std::thread::id> first = who(threads, Order::forwards);
        const std::vector<std::thread::id> second = first.empty() ? first : who(threads, Order::forwards);
        const std::vector<std::thread::id> third = second.empty() ? second : who(threads, Order::backwards);
        if (third.empty()) {
            std::printf("not checked: who does what on %d threads, which do not come together here\n", threads);
            break;
        }
        expect(second == first && third == first, "other threads", threads, threads);
    }
    if (failures == 0) std::printf("shares are as promised\n");
    return failures != 0;
}
