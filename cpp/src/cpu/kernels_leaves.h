// Leaves of sums down the rows: neighbouring lanes are different sets, and a chunk of a few vectors of lanes stays in
// registers while the rows of a leaf go by. Part of kernels.cpp.
#pragma once

#include "kernels_moments.h"

namespace {

// Vectors of lanes that one pass down the rows takes: a backward pass holds 8 values for each, and AVX2 has 16
// registers, AVX-512 32.
#if defined(__AVX512F__)
constexpr int kChunk = 4;
#else
constexpr int kChunk = 2;
#endif

// Calls f(first lane, vectors in the chunk as a constant, elements in its last vector). The first `head` lanes, fewer
// than a vector, go by themselves.
template <class X, class F>
NK_INLINE void for_chunks(index_t lanes, F f, index_t head = 0) {
    constexpr index_t width = kWidth<X>;
    index_t at = head < lanes ? head : lanes;
    if (at > 0) f(index_t{0}, std::integral_constant<int, 1>{}, static_cast<int>(at));
    for (; lanes - at >= kChunk * width; at += kChunk * width) {
        f(at, std::integral_constant<int, kChunk>{}, static_cast<int>(width));
    }
    for (; lanes - at >= width; at += width) f(at, std::integral_constant<int, 1>{}, static_cast<int>(width));
    if (at < lanes) f(at, std::integral_constant<int, 1>{}, static_cast<int>(lanes - at));
}

// Vector i of a chunk of V vectors; only the last may be part-filled.
template <class X, int V>
NK_INLINE Vec<X> load_chunk(const char* p, int i, int n) {
    p += i * kMemoryBytes<X>;
    return V > 1 ? load<X>(p) : load_rest<X>(p, n);
}

// What is one a lane.
template <class X>
NK_INLINE Vec<X> load_term(const Compute<X>* p, int n) {
    return load_rest<Compute<X>>(reinterpret_cast<const char*>(p), n);
}

template <class X, int V>
NK_INLINE void load_lanes(Vec<X> (&v)[V], const Compute<X>* p, int n) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) v[i] = load_chunk<Compute<X>, V>(reinterpret_cast<const char*>(p), i, n);
}

// The doubles that go with a chunk: for each of its vectors of n lanes a Widened.
template <class X, int V>
using Doubles = Widened<Compute<X>>[V];

template <class X, int V>
NK_INLINE void load_doubles(Doubles<X, V>& v, const double* p, int n) {
    constexpr int W = Widened<Compute<X>>::kVectors;
#pragma GCC unroll 8
    for (int i = 0; i < V * W; ++i, n -= kWidth<double>) {
        const char* at = reinterpret_cast<const char*>(p + i * kWidth<double>);
        if constexpr (V > 1) {
            v[i / W].v[i % W] = load<double>(at);
        } else {
            v[i / W].v[i % W] = n > 0 ? load_rest<double>(at, n) : Vec<double>{};
        }
    }
}

template <class X, int V>
NK_INLINE void store_doubles(double* p, const Doubles<X, V>& v, int n) {
    constexpr int W = Widened<Compute<X>>::kVectors;
#pragma GCC unroll 8
    for (int i = 0; i < V * W; ++i, n -= kWidth<double>) {
        char* at = reinterpret_cast<char*>(p + i * kWidth<double>);
        if (V > 1 || n >= kWidth<double>) {
            store<double>(at, v[i / W].v[i % W]);
        } else if (n > 0) {
            store_first<double>(at, v[i / W].v[i % W], n);
        }
    }
}

// ------------------------------------------------------------------------------ where the vectors of a chunk come from

// V neighbours of each row, of which the last may be part-filled. Far: what comes after a leaf of so many rows is asked
// for: it lies in other pages, where the hardware does not look ahead.
template <class X, int V, bool Far>
class Neighbours {
  public:
    static constexpr bool kInTurn = false;  // take_moments
    static constexpr int kVectors = V;
    NK_INLINE Neighbours(In x, int n) : x_(x), n_(n), short_(x.row <= kShort) {}
    NK_INLINE Vec<X> load(index_t r, int i) const { return load_chunk<X, V>(x_.at(r), i, n_); }
    NK_INLINE Widened<Compute<X>> widen(index_t r, int i, Vec<X> v) const {
        return V > 1 ? load_widened<X>(x_.at(r) + i * kMemoryBytes<X>) : widened<Compute<X>>(v);
    }
    NK_INLINE void ask(index_t r, int i) const {
        if constexpr (Far) {
            const char* const next = x_.at(r + kLeafRows) + i * kMemoryBytes<X>;
            if (short_) {
                prefetch_near(next);
            } else {
                prefetch_far(next);
            }
        }
    }

  private:
    static constexpr index_t kShort = 512;  // bytes of rows of which two leaves stay in L1
    In x_;
    int n_;
    bool short_;
};

// Few lanes of several leaves. Of one, vectors would be part-filled, or so few that each addition waits for the one
// before. `leaf`: bytes from one to the next; ahead: bytes from a lane to what is asked for; 0: nothing.
template <class X>
struct FewLanes {
    In x;
    index_t leaf = 0, leaves = 0;
    int n = 0;  // lanes of a vector
    index_t ahead = 0;
};

// Vector i is that of leaf i.
template <class X, int V, bool Whole>
class Apart {
  public:
    static constexpr bool kInTurn = false;
    static constexpr int kVectors = V;
    NK_INLINE explicit Apart(const FewLanes<X>& of) : of_(of) {}
    NK_INLINE Vec<X> load(index_t r, int i) const {
        return Whole ? ::load<X>(at(r, i)) : load_first<X>(at(r, i), of_.n);
    }
    NK_INLINE Widened<Compute<X>> widen(index_t r, int i, Vec<X> v) const {
        return Whole ? load_widened<X>(at(r, i)) : widened<Compute<X>>(v);
    }
    NK_INLINE void ask(index_t r, int i) const {
        if (of_.ahead != 0) prefetch_near(at(r, i) + of_.ahead);
    }
    // What all leaves have in common.
    NK_INLINE static Vec<X> spread(const Compute<X>* p, int n) { return load_term<X>(p, n); }

  private:
    NK_INLINE const char* at(index_t r, int i) const { return of_.x.at(r) + i * of_.leaf; }
    FewLanes<X> of_;
};

// P leaves are side by side in the slots of each vector; of a single vector, some may be missing.
template <class X, int V, int P>
class InSlots {
  public:
    // Masks of four slots and more leave no registers for two chunks: beside each other 3 lanes took 1.5 times as long,
    // 8 lanes (two slots) 0.8.
    static constexpr bool kInTurn = P > 2;
    static constexpr int kVectors = V;
    NK_INLINE explicit InSlots(const FewLanes<X>& of)
        : of_(of), slots_(of.n, V > 1 || of.leaves > P ? P : static_cast<int>(of.leaves)) {}
    NK_INLINE Vec<X> load(index_t r, int i) const { return slots_.load(at(r, i), of_.leaf); }
    NK_INLINE Widened<Compute<X>> widen(index_t, int, Vec<X> v) const { return widened<Compute<X>>(v); }
    // One line for P rows that take no more, else one for each. Rows with gaps may be asked for twice, or not at all.
    NK_INLINE void ask(index_t r, int i) const {
        if (of_.ahead == 0) return;
        const index_t some = P * of_.x.row;
        if (some <= kLine) return prefetch_near(of_.x.p + of_.ahead + (r * V + i) * some);
        for (int p = 0; p < P; ++p) prefetch_near(at(r, i) + p * of_.leaf + of_.ahead);
    }
    NK_INLINE static Vec<X> spread(const Compute<X>* p, int n) {
        return Slots<Compute<X>, P>(n, P).load(reinterpret_cast<const char*>(p), 0);
    }

  private:
    NK_INLINE const char* at(index_t r, int i) const { return of_.x.at(r) + i * P * of_.leaf; }
    FewLanes<X> of_;
    Slots<X, P> slots_;
};

template <int V_, int P_, bool Whole_>
struct Shape {
    static constexpr int V = V_, P = P_;
    static constexpr index_t kLeaves = V * P;  // of a chunk
    static constexpr bool Whole = Whole_;
    template <class X>
    using From = std::conditional_t<P == 1, Apart<X, V, Whole>, InSlots<X, V, P>>;
};

// f(slots of a vector that have room for n lanes each, as a constant): a power of two, 8 at most.
template <class X, class F>
NK_INLINE void with_slots(int n, F f) {
    constexpr int width = kWidth<X>;
    if constexpr (width >= 8) {
        if (n <= width / 8) return f(std::integral_constant<int, 8>{});
    }
    if constexpr (width >= 4) {
        if (n <= width / 4) return f(std::integral_constant<int, 4>{});
    }
    if (n <= width / 2) return f(std::integral_constant<int, 2>{});
    f(std::integral_constant<int, 1>{});
}
constexpr int kSlotVectors = 2;

// Leaves of few lanes that it pays to take together; less go one by one. Instance norm of 16 to 48 pixels and 12
// channels took 1.1 to 1.2 times as long together.
constexpr index_t kWorthTogether = 4;

// Leaves of few lanes that are taken before the next: whole chunks of them, and where they are all of a row, as many as
// stay in L1 until the last, part-filled vector of their rows has its turn.
template <class X>
NK_INLINE index_t leaves_at_once(index_t lanes, index_t leaf, bool whole_rows) {
    constexpr index_t kStays = 32 * 1024, kAll = 64;  // kAll: more than a call brings
    index_t least = kChunk;
    const int n = static_cast<int>(lanes % kWidth<X>);
    if (n > 0) with_slots<X>(n, [&](auto p) { least = p > 1 && kSlotVectors * p > least ? kSlotVectors * p : least; });
    if (!whole_rows) return least;
    if (n == 0) return kAll;
    const index_t stay = leaf > 0 ? kStays / leaf / least : 0;
    return stay > 1 ? stay * least : least;
}

// What is asked for: the same rows of a later chunk of so many leaves.
NK_INLINE index_t ahead_in_chunks(index_t leaves, index_t leaf) {
    const index_t chunk = leaves * leaf;
    return chunk > 0 ? (kAhead + chunk - 1) / chunk * chunk : 0;
}

// The chunks of one shape: `side` vectors side by side, of n lanes each, and `deep` chunks of leaves below each other.
// Number k takes lanes from lane(k) on of the leaves from leaf(k) on, S::kLeaves of them or as many as there are.
template <class X, class S>
struct Chunks {
    using Shape = S;
    index_t first_lane, side;
    int n;
    index_t first_leaf, deep;

    NK_INLINE index_t count() const { return side * deep; }
    NK_INLINE index_t leaf(index_t k) const { return first_leaf + k / side * S::kLeaves; }
    NK_INLINE index_t lane(index_t k) const { return first_lane + k % side * kWidth<X>; }
};

// f(chunks), shape by shape: all of some leaves.
template <class X, class F>
NK_INLINE void for_few_lanes(index_t leaves, index_t lanes, F f) {
    const index_t vectors = lanes / kWidth<X>, in_whole = vectors * kWidth<X>;
    const auto apart = [&](index_t lane, index_t side, int n, auto whole) NK_INLINE_LAMBDA {
        f(Chunks<X, Shape<kChunk, 1, whole>>{lane, side, n, 0, leaves / kChunk});
        f(Chunks<X, Shape<1, 1, whole>>{lane, side, n, leaves / kChunk * kChunk, leaves % kChunk});
    };
    if (vectors > 0) apart(0, vectors, kWidth<X>, std::true_type{});
    if (lanes == in_whole) return;
    const int n = static_cast<int>(lanes - in_whole);
    with_slots<X>(n, [&](auto slots) NK_INLINE_LAMBDA {
        constexpr int P = slots;
        if constexpr (P == 1) {
            apart(in_whole, 1, n, std::false_type{});
        } else {
            // What is left over, if most slots of the last vector would be empty, goes leaf by leaf: one leaf in eight
            // slots took 1.4 times as long.
            const index_t chunks = leaves / (kSlotVectors * P), first = chunks * kSlotVectors * P;
            const index_t last = leaves % P, alone = 4 * last <= P + 2 ? last : 0, in_slots = leaves - alone - first;
            f(Chunks<X, Shape<kSlotVectors, P, false>>{in_whole, 1, n, 0, chunks});
            f(Chunks<X, Shape<1, P, false>>{in_whole, 1, n, first, (in_slots + P - 1) / P});
            f(Chunks<X, Shape<1, 1, false>>{in_whole, 1, n, leaves - alone, alone});
        }
    });
}

// Doubles that go with the lanes of a vector, and room to load a whole one from any of them.
template <class X>
struct LaneDoubles {
    alignas(64) double of[2 * kWidth<X>] = {};
    NK_INLINE void put(const Widened<Compute<X>>& v) {
#pragma GCC unroll 2
        for (int j = 0; j < Widened<Compute<X>>::kVectors; ++j) {
            store<double>(reinterpret_cast<char*>(of + j * kWidth<double>), v.v[j]);
        }
    }
    NK_INLINE Vec<double> from(index_t lane) const { return load<double>(reinterpret_cast<const char*>(of + lane)); }
};

// ------------------------------------------------------------------------------------------------------------- moments

// The moments of leaves of `rows` <= kLeafRows rows, for each lane of a chunk: the mean in double, then the squares
// about it in X, one chain for the even rows and one for the odd ones. As along the lanes.
//
// Row by row in both parts, so that the squares of one chunk can be taken beside the mean of the next (take_moments).
template <class X, class From>
class LeafChunk {
  public:
    using T = Compute<X>;
    static constexpr int V = From::kVectors, W = Widened<T>::kVectors;
    static constexpr bool kInTurn = From::kInTurn;
    // What is read twice is put side by side in L1, where rows a power of two apart would not stay: forward 15 % on
    // batch NHWC 32 x 14^2 x 1024, 10 % on group NHWC 1 x 64^2 x 512, nothing where x is in L2.
    using Staged = Vec<X>[V * kLeafRows];

    NK_INLINE explicit LeafChunk(From x) : x_(x) {}
    // What the means are about.
    NK_INLINE Vec<X>& origin(int i) { return from_[i]; }

    NK_INLINE void mean_row(index_t r, Staged& staged) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            x_.ask(r, i);
            const Vec<X> v = x_.load(r, i);
            staged[r * V + i] = v;
            if constexpr (kAboutOrigin<X>) {
                means_[i].v[0] += v - from_[i];
            } else {
                const Widened<T> wide = x_.widen(r, i, v);
#pragma GCC unroll 2
                for (int j = 0; j < W; ++j) means_[i].v[j] = plus_(means_[i].v[j], wide.v[j]);
            }
        }
    }
    // The mean has all its rows.
    NK_INLINE void finish_mean(index_t rows) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < W; ++j) {
                // A power of two: multiplying is dividing, bit for bit.
                means_[i].v[j] =
                    rows == kLeafRows ? means_[i].v[j] * (1.0 / kLeafRows) : means_[i].v[j] / static_cast<double>(rows);
            }
            pilot_[i] = narrowed<T>(means_[i]);
            if constexpr (kAboutOrigin<X>) pilot_[i] = pilot_[i] + from_[i];
        }
    }
    template <int Odd>
    NK_INLINE void squares_row(index_t r, const Staged& staged) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Vec<X> d = staged[r * V + i] - pilot_[i];
            squares_[Odd][i] += d * d;
        }
    }
    NK_INLINE const Widened<T>& mean(int i) const { return means_[i]; }
    NK_INLINE Widened<T> M2(int i, double count) const {
        const Vec<X> pilot = kAboutOrigin<X> ? pilot_[i] - from_[i] : pilot_[i];  // less the origin, as the mean is
        const Widened<T> about = widened<T>(pilot), squares = widened<T>(squares_[0][i] + squares_[1][i]);
        Widened<T> M2;
#pragma GCC unroll 2
        for (int j = 0; j < W; ++j) M2.v[j] = M2_about_mean(squares.v[j], means_[i].v[j] - about.v[j], count);
        return M2;
    }

  private:
    From x_;
    Vec<X> from_[V] = {}, pilot_[V] = {}, squares_[2][V] = {};
    Doubles<X, V> means_ = {};
    Adder<double> plus_;
};

// f(row, 0 or 1 as a constant), for even and odd rows.
template <class F>
NK_INLINE void for_row_pairs(index_t rows, F f) {
    index_t r = 0;
    for (; r + 1 < rows; r += 2) {
        f(r, std::integral_constant<int, 0>{});
        f(r + 1, std::integral_constant<int, 1>{});
    }
    if (r < rows) f(r, std::integral_constant<int, 0>{});
}

// Moments::merge of a leaf of `count` rows, with the divisions of the counts taken out of the loop (all lanes have seen
// the same rows).
struct Merging {
    double share, weight;
    NK_INLINE Merging(double count, double seen) : share(count / (seen + count)), weight(seen * share) {}
    NK_INLINE void operator()(Vec<double> mean, Vec<double> M2, Vec<double>& all_mean, Vec<double>& all_M2) const {
        const Vec<double> delta = mean - all_mean;
        all_mean += delta * share;
        all_M2 += M2 + delta * delta * weight;
    }
};

// The moments of lanes, which have seen `seen` rows, as chunks go over to them.
template <class X>
struct LaneMoments {
    using T = Compute<X>;
    double seen, *mean, *M2;

    // n: lanes of the last vector.
    template <int V, bool Far>
    NK_INLINE void merge(const LeafChunk<X, Neighbours<X, V, Far>>& leaf, index_t rows, index_t lane, int n) const {
        const double count = static_cast<double>(rows);
        const Merging merging(count, seen);
        Doubles<X, V> all_mean, all_M2;
        load_doubles<X, V>(all_mean, mean + lane, n);
        load_doubles<X, V>(all_M2, M2 + lane, n);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Widened<T> own = leaf.M2(i, count);
#pragma GCC unroll 2
            for (int j = 0; j < Widened<T>::kVectors; ++j) {
                merging(leaf.mean(i).v[j], own.v[j], all_mean[i].v[j], all_M2[i].v[j]);
            }
        }
        store_doubles<X, V>(mean + lane, all_mean, n);
        store_doubles<X, V>(M2 + lane, all_M2, n);
    }

    // Whole leaves one after another, the first of them number `first`.
    template <int V, bool Whole>
    NK_INLINE void merge(const LeafChunk<X, Apart<X, V, Whole>>& of, index_t first, index_t, index_t lane,
                         int n) const {
        Doubles<X, 1> all_mean, all_M2;
        load_doubles<X, 1>(all_mean, mean + lane, n);
        load_doubles<X, 1>(all_M2, M2 + lane, n);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Merging merging = whole_leaf(first + i);
            const Widened<T> own = of.M2(i, kLeafRows);
#pragma GCC unroll 2
            for (int j = 0; j < Widened<T>::kVectors; ++j) {
                merging(of.mean(i).v[j], own.v[j], all_mean[0].v[j], all_M2[0].v[j]);
            }
        }
        store_doubles<X, 1>(mean + lane, all_mean, n);
        store_doubles<X, 1>(M2 + lane, all_M2, n);
    }
    // The lanes of one are no more than a vector of doubles.
    template <int V, int P>
    NK_INLINE void merge(const LeafChunk<X, InSlots<X, V, P>>& of, index_t first, index_t leaves, index_t lane,
                         int n) const {
        constexpr index_t kLanes = Slots<X, P>::kLanes;
        static_assert(kLanes <= kWidth<double>);
        char *const p_mean = reinterpret_cast<char*>(mean + lane), *const p_M2 = reinterpret_cast<char*>(M2 + lane);
        Vec<double> all_mean = load_rest<double>(p_mean, n), all_M2 = load_rest<double>(p_M2, n);
        LaneDoubles<X> means, M2s;
        for (int i = 0; i < V; ++i) {
            means.put(of.mean(i));
            M2s.put(of.M2(i, kLeafRows));
            for (index_t p = 0; p < P && i * P + p < leaves; ++p) {
                whole_leaf(first + i * P + p)(means.from(p * kLanes), M2s.from(p * kLanes), all_mean, all_M2);
            }
        }
        put<double, false>(p_mean, all_mean, n);
        put<double, false>(p_M2, all_M2, n);
    }

  private:
    NK_INLINE Merging whole_leaf(index_t i) const {
        return {static_cast<double>(kLeafRows), seen + static_cast<double>(i * kLeafRows)};
    }
};

// n chunks of leaves of so many rows. The mean of one is taken beside the squares of the one before: a core does one
// conversion to double at a time, and has room for the squares meanwhile (one thread of a Zen 5, x in L2: 0.85 of the
// time of one after the other). at(k), merge(leaf, k).
template <class Leaf, class At, class Merge>
NK_INLINE void take_moments(index_t n, index_t rows, At at, Merge merge) {
    if (n <= 0) return;
    if constexpr (Leaf::kInTurn) {
        typename Leaf::Staged staged;
        for (index_t k = 0; k < n; ++k) {
            Leaf leaf = at(k);
            for (index_t r = 0; r < rows; ++r) leaf.mean_row(r, staged);
            leaf.finish_mean(rows);
            for_row_pairs(rows,
                          [&](index_t r, auto odd) NK_INLINE_LAMBDA { leaf.template squares_row<odd>(r, staged); });
            merge(leaf, k);
        }
        return;
    }
    typename Leaf::Staged staged[2];
    Leaf last = at(index_t{0});
    for (index_t r = 0; r < rows; ++r) last.mean_row(r, staged[0]);
    last.finish_mean(rows);
    for (index_t k = 1; k < n; ++k) {
        Leaf next = at(k);
        for_row_pairs(rows, [&](index_t r, auto odd) NK_INLINE_LAMBDA {
            next.mean_row(r, staged[k % 2]);
            last.template squares_row<odd>(r, staged[(k - 1) % 2]);
        });
        merge(last, k - 1);
        next.finish_mean(rows);
        last = next;
    }
    for_row_pairs(
        rows, [&](index_t r, auto odd) NK_INLINE_LAMBDA { last.template squares_row<odd>(r, staged[(n - 1) % 2]); });
    merge(last, n - 1);
}

// Of one leaf, V vectors of lanes at a time, as many as there are; of one vector, the last may be part-filled.
template <class X, bool Far, int V>
NK_INLINE void leaf_in_chunks(In x, const Compute<X>* origin, index_t rows, index_t lanes, const LaneMoments<X>& all) {
    using Leaf = LeafChunk<X, Neighbours<X, V, Far>>;
    constexpr index_t kLanes = V * kWidth<X>;
    const auto lanes_of = [=](index_t k) NK_INLINE_LAMBDA {
        return V == 1 && lanes - k * kLanes < kLanes ? static_cast<int>(lanes - k * kLanes) : kWidth<X>;
    };
    const auto chunk_at = [&](index_t k) NK_INLINE_LAMBDA {
        Leaf leaf({{x.p + bytes<X>(k * kLanes), x.row}, lanes_of(k)});
        for (int i = 0; kAboutOrigin<X> && i < V; ++i) {
            leaf.origin(i) = load_term<X>(origin + k * kLanes + i * kWidth<X>, lanes_of(k));
        }
        return leaf;
    };
    const index_t chunks = (lanes + (V == 1 ? kLanes - 1 : 0)) / kLanes;
    take_moments<Leaf>(chunks, rows, chunk_at, [&](const Leaf& leaf, index_t k) NK_INLINE_LAMBDA {
        all.merge(leaf, rows, k * kLanes, lanes_of(k));
    });
}

// Of whole leaves.
template <class X>
void moments_of_few_lanes(In x, const Compute<X>* origin, index_t leaves, index_t lanes, bool far,
                          const LaneMoments<X>& all) {
    const index_t leaf = kLeafRows * x.row;
    for_few_lanes<X>(leaves, lanes, [&](auto chunks) NK_INLINE_LAMBDA {
        using S = typename decltype(chunks)::Shape;
        using From = typename S::template From<X>;
        using Leaf = LeafChunk<X, From>;
        const index_t ahead = far ? ahead_in_chunks(S::kLeaves, leaf) : 0;
        const auto chunk_at = [&](index_t k) NK_INLINE_LAMBDA {
            const index_t i = chunks.leaf(k), l = chunks.lane(k);
            Leaf chunk(From({{x.p + i * leaf + bytes<X>(l), x.row}, leaf, leaves - i, chunks.n, ahead}));
            if constexpr (kAboutOrigin<X>) {
                const Vec<X> one = From::spread(origin + l, chunks.n);
                for (int v = 0; v < S::V; ++v) chunk.origin(v) = one;
            }
            return chunk;
        };
        take_moments<Leaf>(chunks.count(), kLeafRows, chunk_at, [&](const Leaf& chunk, index_t k) NK_INLINE_LAMBDA {
            all.merge(chunk, chunks.leaf(k), leaves - chunks.leaf(k), chunks.lane(k), chunks.n);
        });
    });
}

// The same about 0 (rms) or, in the loose build, about the first row: in one reading.
template <class X, bool Center, int V>
NK_INLINE void leaf_in_one_reading(In x, index_t rows, int n, double seen, double* mean, double* M2) {
    using T = Compute<X>;
    const double count = static_cast<double>(rows), share = count / (seen + count), weight = seen * share;
    Vec<X> pilot[V] = {}, squares[2][V] = {}, sum[V] = {};
#pragma GCC unroll 4
    for (int i = 0; Center && i < V; ++i) pilot[i] = load_chunk<X, V>(x.p, i, n);
    for_row_pairs(rows, [&](index_t r, auto odd) NK_INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Vec<X> d = load_chunk<X, V>(x.at(r), i, n) - pilot[i];
            squares[odd][i] += d * d;
            if constexpr (Center) sum[i] += d;
        }
    });
    Doubles<X, V> all_mean, all_M2;
    load_doubles<X, V>(all_mean, mean, n);
    load_doubles<X, V>(all_M2, M2, n);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        const Widened<T> all = widened<T>(squares[0][i] + squares[1][i]);
        [[maybe_unused]] const Widened<T> about = widened<T>(pilot[i]), sums = widened<T>(sum[i]);
#pragma GCC unroll 2
        for (int j = 0; j < Widened<T>::kVectors; ++j) {
            if constexpr (Center) {
                const Vec<double> off = sums.v[j] / count, delta = about.v[j] + off - all_mean[i].v[j];
                all_mean[i].v[j] += delta * share;
                all_M2[i].v[j] += M2_about_mean(all.v[j], off, count) + delta * delta * weight;
            } else {
                all_M2[i].v[j] += all.v[j];
            }
        }
    }
    if constexpr (Center) store_doubles<X, V>(mean, all_mean, n);
    store_doubles<X, V>(M2, all_M2, n);
}

template <class X>
NK_INLINE void leaf_in_one(In x, index_t rows, index_t lanes, double seen, bool center, double* mean, double* M2) {
    for_chunks<X>(lanes, [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
        const In at{x.p + bytes<X>(lane), x.row};
        if (kLoose && center) {
            leaf_in_one_reading<X, kLoose, v>(at, rows, n, seen, mean + lane, M2 + lane);
        } else {
            leaf_in_one_reading<X, false, v>(at, rows, n, seen, mean + lane, M2 + lane);
        }
    });
}

template <class X>
void moments_down(In x, const Compute<X>* origin, index_t rows, index_t lanes, index_t seen, bool center, bool far,
                  double* mean, double* M2) {
    constexpr index_t kLanes = kChunk * kWidth<X>;
    const bool in_one = !center || kLoose;
    const index_t in_chunks = lanes / kLanes * kLanes, few = lanes - in_chunks;
    const index_t at_once = leaves_at_once<X>(few, kLeafRows * x.row, in_chunks == 0);
    for (index_t r = 0; r < rows;) {
        const index_t whole = (rows - r) / kLeafRows, leaves = whole < at_once ? whole : at_once;
        const index_t n = leaves > 0 ? leaves * kLeafRows : rows - r;
        for (index_t i = 0; (in_one || in_chunks > 0) && i < n; i += kLeafRows) {
            const In leaf{x.at(r + i), x.row};
            const index_t of_leaf = n - i < kLeafRows ? n - i : kLeafRows;
            const double before = static_cast<double>(seen + r + i);
            if (in_one) {
                leaf_in_one<X>(leaf, of_leaf, lanes, before, center, mean, M2);
            } else if (far) {
                leaf_in_chunks<X, true, kChunk>(leaf, origin, of_leaf, lanes, {before, mean, M2});
            } else {
                leaf_in_chunks<X, false, kChunk>(leaf, origin, of_leaf, lanes, {before, mean, M2});
            }
        }
        if (!in_one && few > 0) {
            const In rest{x.at(r) + bytes<X>(in_chunks), x.row};
            const Compute<X>* const from = kAboutOrigin<X> ? origin + in_chunks : origin;
            const LaneMoments<X> all{static_cast<double>(seen + r), mean + in_chunks, M2 + in_chunks};
            if (leaves >= kWorthTogether) {
                moments_of_few_lanes<X>(rest, from, leaves, few, far, all);
            } else {
                for (index_t i = 0; i < n; i += kLeafRows) {
                    const index_t of_leaf = n - i < kLeafRows ? n - i : kLeafRows;
                    leaf_in_chunks<X, false, 1>({rest.at(i), rest.row}, from, of_leaf, few,
                                                {all.seen + static_cast<double>(i), all.mean, all.M2});
                }
            }
        }
        r += n;
    }
}

}  // namespace
