// Results along the lanes, y and dx: rows are contiguous, and written front to back. Part of kernels.cpp.
#pragma once

#include <type_traits>

#include "kernels_steps.h"

namespace {

// Whether it pays to ask for lines of y: with w and b one a lane 1.0 to 1.14, else 0.9 to 1.05 (an Emerald Rapids).
template <bool WLane>
constexpr bool kAsksForY = WLane;

// A row to be written, a few vectors at a time; half as many as its moments, which are two readings, take.
template <class X, bool WLane, Stores How>
struct Applying {
    using T = Compute<X>;
    using Ends = EndsOf<X, How, WLane>;
    static constexpr bool kBehindHead = WLane && How == Stores::joined, kHasOthers = false;
    NK_INLINE static index_t head_of_leaf(const char* x) { return head_of<X>(x); }
    static constexpr index_t kElements = kTurn / 2;
    index_t lanes, lane;
    const char *x, *w, *b;
    char* y;
    index_t w_lanes = 0, b_lanes = 0;  // masks: 0 for a constant
    bool centred;                      // as in apply_along_rows: where not, b is added as it is
    bool far;
    EndsOf<X, How, WLane>* ends;
    Vec<X> hi, lo, rstd, a = {}, c = {};

    NK_INLINE Applying(const Unwritten<X>& of, EndsOf<X, How, WLane>& of_rows)
        : lanes(of.lanes),
          lane(of.lane),
          x(of.x.at(of.row)),
          w(of.w.at(of.row)),
          b(of.b.at(of.row)),
          y(of.y.at(of.row)),
          far(of.far),
          ends(&of_rows) {
        const index_t k = of.row * of.s.row;
        const T hi_row = of.s.hi[k], lo_row = of.s.lo[k], rstd_row = of.s.rstd[k];
        centred = hi_row != 0 || lo_row != 0;
        hi = splat<X>(hi_row);
        lo = splat<X>(lo_row);
        rstd = splat<X>(rstd_row);
        if constexpr (WLane) {
            w_lanes = of.w_constant ? 0 : ~index_t{0};
            b_lanes = of.b_constant ? 0 : ~index_t{0};
        } else {
            const YTerms<T> terms = y_terms<T>(hi_row, lo_row, rstd_row, value_at<T>(w), value_at<T>(b));
            a = splat<X>(terms.a);
            c = splat<X>(terms.c);
        }
        if constexpr (How == Stores::joined) {
            ends->begin(y + bytes<X>(lane));
            const index_t head = lane == 0 ? head_of_joined<X, WLane>(of.x, of.y, of.row, of.lanes) : 0;
            if (head > 0) vector(static_cast<int>(head));
        } else if constexpr (How == Stores::cached && !WLane) {
            const index_t head = lane == 0 ? head_in_cache<X>(of.y, of.row, of.lanes) : 0;
            if (head > 0) vector(static_cast<int>(head));
        }
    }
    NK_INLINE void vector(int n) {
        const Vec<X> av = WLane ? rstd * load_rest<T>(w + bytes<T>(lane & w_lanes), n) : a;
        Vec<X> d = load_rest<X>(x + bytes<X>(lane), n), cv = c;
        if constexpr (WLane) cv = load_rest<T>(b + bytes<T>(lane & b_lanes), n);
        if (centred) {
            d -= hi;
            if constexpr (WLane) cv = bias_term<Vec<X>>(av, lo, cv);
        }
        put_asking<X, How, WLane, kAsksForY<WLane>>(*ends, y + bytes<X>(lane), d * av + cv, n);
        lane += n;
    }
    NK_INLINE bool asks() const { return How != Stores::cached || far; }
    NK_INLINE index_t turns() const { return (lanes - lane) / kElements; }
    NK_INLINE void turn() {
#pragma GCC unroll 8
        for (int i = 0; i < kElements / kWidth<X>; ++i) vector(kWidth<X>);
    }
    NK_INLINE void rest() {
        while (lanes - lane >= kWidth<X>) vector(kWidth<X>);
        if (lane < lanes) vector(static_cast<int>(lanes - lane));
    }
};

// R rows at once: with w and b one a lane they share the loads of those, which else are half of all.
template <class X, bool WLane, Stores How, bool Centred, int R>
NK_INLINE void apply_rows(const Unwritten<X>& tile, EndsOf<X, How, WLane>& ends) {
    static_assert(R == 1 || How == Stores::cached, "past the caches, rows are joined");
    using T = Compute<X>;
    const In x = tile.x, w = tile.w, b = tile.b;
    const Out y = tile.y;
    const Statistics<T>& s = tile.s;
    const index_t r = tile.row, lanes = tile.lanes;
    index_t lane = 0;
    Vec<X> hi[R], lo[R], rstd[R], a[R], c[R];
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
        const index_t k = (r + j) * s.row;
        hi[j] = splat<X>(s.hi[k]);
        lo[j] = splat<X>(s.lo[k]);
        rstd[j] = splat<X>(s.rstd[k]);
        if constexpr (!WLane) {
            const YTerms<T> terms =
                y_terms<T>(s.hi[k], s.lo[k], s.rstd[k], value_at<T>(w.at(r + j)), value_at<T>(b.at(r + j)));
            a[j] = splat<X>(terms.a);
            c[j] = splat<X>(terms.c);
        }
    }
    const char *px = x.at(r), *pw = w.at(r), *pb = b.at(r);
    char* py = y.at(r);
    const auto write = [&](int n) NK_INLINE_LAMBDA {
        const index_t o = bytes<X>(lane);
        Vec<X> wv = {}, bv = {};
        if constexpr (WLane) {
            wv = load_rest<T>(pw + bytes<T>(lane), n);
            bv = load_rest<T>(pb + bytes<T>(lane), n);
        }
#pragma GCC unroll 4
        for (int j = 0; j < R; ++j) {
            const Vec<X> xv = load_rest<X>(px + j * x.row + o, n);
            const Vec<X> d = Centred ? xv - hi[j] : xv;
            const Vec<X> av = WLane ? rstd[j] * wv : a[j];
            const Vec<X> cv = !WLane ? c[j] : Centred ? bias_term<Vec<X>>(av, lo[j], bv) : bv;
            put_asking<X, How, WLane, kAsksForY<WLane>>(ends, py + j * y.row + o, d * av + cv, n);
        }
        lane += n;
    };
    index_t head = 0;
    if constexpr (How == Stores::joined) {
        ends.begin(py);
        head = head_of_joined<X, WLane>(x, y, r, lanes);
    } else if constexpr (How == Stores::cached &&
                         (!WLane || R > 1)) {  // of one row, loads of w and b would cross lines
        head = head_in_cache<X>(y, r, lanes);
    }
    if (head > 0) write(static_cast<int>(head));
    while (lanes - lane >= kWidth<X>) write(kWidth<X>);
    if (lane < lanes) write(static_cast<int>(lanes - lane));
}

// Whether rows follow each other in memory without a gap, and are neither whole vectors nor so long that their ends do
// not count: they are then written as one run, and no vector is part-filled but the last.
template <class X>
NK_INLINE bool joins(In x, Out y, index_t rows, index_t lanes) {
    constexpr index_t kLong = 256;
    return rows > 1 && x.row == bytes<X>(lanes) && y.row == x.row && lanes >= kWidth<X> && lanes < kLong &&
           lanes % kWidth<X> != 0;
}

// Writes such rows. terms_of(r): an array of the N vectors that the formula has for all lanes of row r. write(terms,
// element, n): n elements from that one on, counted through all rows. A vector meets two rows at most.
template <class X, int N, class TermsOf, class Write>
NK_INLINE void for_joined(index_t rows, index_t lanes, index_t head, TermsOf terms_of, Write write) {
    Vec<X> row[N], next[N], both[N];
    terms_of(0, row);
    index_t at = 0, end = lanes;
    if (head > 0) {
        write(row, at, static_cast<int>(head));
        at += head;
    }
    for (index_t r = 1; r < rows; ++r, end += lanes) {
        for (; end - at >= kWidth<X>; at += kWidth<X>) write(row, at, kWidth<X>);
        terms_of(r, next);
        if (at < end) {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) both[i] = join_at<Compute<X>>(row[i], next[i], static_cast<int>(end - at));
            write(both, at, kWidth<X>);
            at += kWidth<X>;
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) row[i] = next[i];
    }
    for (; end - at >= kWidth<X>; at += kWidth<X>) write(row, at, kWidth<X>);
    if (at < end) write(row, at, static_cast<int>(end - at));
}

template <class X, bool Stream>
void apply_joined(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    for_joined<X, 3>(
        rows, lanes, Stream || kCanJoin ? head_of<X>(y.p) : 0,
        [&](index_t r, Vec<X>(&terms)[3]) NK_INLINE_LAMBDA {
            const index_t k = r * s.row;
            const YTerms<T> y = y_terms<T>(s.hi[k], s.lo[k], s.rstd[k], value_at<T>(w.at(r)), value_at<T>(b.at(r)));
            terms[0] = splat<X>(s.hi[k]);
            terms[1] = splat<X>(y.a);
            terms[2] = splat<X>(y.c);
        },
        [&](const Vec<X>(&terms)[3], index_t at, int n) NK_INLINE_LAMBDA {
            const Vec<X> d = load_rest<X>(x.p + bytes<X>(at), n) - terms[0];
            put_asking<X, Stream>(y.p + bytes<X>(at), d * terms[1] + terms[2], n);
        });
}

#if defined(__AVX512F__)
constexpr int kRowsTogether = 4;
#else
constexpr int kRowsTogether = 2;
#endif

template <class X, bool WLane, Stores How>
void apply_along_rows(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    // Rms: without a mean there are two subtractions less.
    const auto centred = [&](index_t r) { return s.hi[r * s.row] != 0 || s.lo[r * s.row] != 0; };
    // Not past the caches: those stores want one stream.
    const bool together = WLane && How == Stores::cached && w.row == 0 && b.row == 0;
    constexpr int kTogether = How == Stores::cached ? kRowsTogether : 1;
    EndsOf<X, How, WLane> ends;
    Unwritten<X> tile{x, y, w, b, s, rows, lanes};
    for (index_t& r = tile.row; r < rows;) {
        bool all_centred = together && rows - r >= kTogether, none_centred = all_centred;
        for (int j = 0; j < kTogether && (all_centred || none_centred); ++j) {
            (centred(r + j) ? none_centred : all_centred) = false;
        }
        if (all_centred) {
            apply_rows<X, WLane, How, true, kTogether>(tile, ends);
            r += kTogether;
        } else if (none_centred) {
            apply_rows<X, WLane, How, false, kTogether>(tile, ends);
            r += kTogether;
        } else {
            if (centred(r)) {
                apply_rows<X, WLane, How, true, 1>(tile, ends);
            } else {
                apply_rows<X, WLane, How, false, 1>(tile, ends);
            }
            ++r;
        }
    }
    ends.finish();
}

template <class X, bool WLane>
void apply_along(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if constexpr (!WLane) {
        if (joins<X>(x, y, rows, lanes)) {
            const bool streamed = stream && can_stream<X>(y, rows * lanes);
            return (streamed ? apply_joined<X, true> : apply_joined<X, false>)(x, y, w, b, s, rows, lanes);
        }
    }
    with_row_stores<X, WLane>(stream, x, y, lanes, on_lines(y), [&](auto how) NK_INLINE_LAMBDA {
        apply_along_rows<X, WLane, how>(x, y, w, b, s, rows, lanes);
    });
}

// A loop of its own: row after row of WritingDx took 1.06 times as long for runs of 64 in a cache, 1.03 of 256.
template <class X, bool WLane, Stores How>
void dx_along_rows(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    EndsOf<X, How, WLane> ends;
    for (index_t r = 0; r < rows; ++r) {
        const char *pdy = dy.at(r), *px = x.at(r), *pw = w.at(r);
        char* pdx = dx.at(r);
        const index_t i = r * s.row;
        const DxTerms<T> terms = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
        const Vec<X> hi = splat<X>(s.hi[i]), rstd = splat<X>(s.rstd[i]), e = splat<X>(terms.e), c = splat<X>(terms.c);
        Vec<X> a = {};
        if constexpr (!WLane) a = splat<X>(s.rstd[i] * value_at<T>(pw));
        index_t head = 0;
        if constexpr (How == Stores::joined) {
            ends.begin(pdx);
            head = head_of_joined<X, WLane>(x, dx, r, lanes);
        } else if constexpr (How == Stores::cached && !WLane) {
            head = head_in_cache<X>(dx, r, lanes);
        }
        for_vectors<X>(lanes, head, [&](index_t lane, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            const Vec<X> d = load_rest<X>(px + o, n) - hi;
            const Vec<X> av = WLane ? rstd * load_rest<T>(pw + bytes<T>(lane), n) : a;
            put<X, How, WLane>(ends, pdx + o, dx_of<Vec<X>>(load_rest<X>(pdy + o, n), d, rstd, av, e, c), n);
        });
    }
    ends.finish();
}

template <class X, bool Stream>
void dx_joined(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    for_joined<X, 5>(
        rows, lanes, Stream || kCanJoin ? head_of<X>(dx.p) : 0,
        [&](index_t r, Vec<X>(&terms)[5]) NK_INLINE_LAMBDA {
            const index_t i = r * s.row;
            const DxTerms<T> more = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
            terms[0] = splat<X>(s.hi[i]);
            terms[1] = splat<X>(s.rstd[i]);
            terms[2] = splat<X>(s.rstd[i] * value_at<T>(w.at(r)));
            terms[3] = splat<X>(more.e);
            terms[4] = splat<X>(more.c);
        },
        [&](const Vec<X>(&terms)[5], index_t at, int n) NK_INLINE_LAMBDA {
            const Vec<X> d = load_rest<X>(x.p + bytes<X>(at), n) - terms[0];
            const Vec<X> dyv = load_rest<X>(dy.p + bytes<X>(at), n);
            put_asking<X, Stream>(dx.p + bytes<X>(at), dx_of<Vec<X>>(dyv, d, terms[1], terms[2], terms[3], terms[4]),
                                  n);
        });
}

template <class X, bool WLane>
void dx_along(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if constexpr (!WLane) {
        if (dy.row == x.row && joins<X>(x, dx, rows, lanes)) {
            const bool streamed = stream && can_stream<X>(dx, rows * lanes);
            return (streamed ? dx_joined<X, true> : dx_joined<X, false>)(dy, x, w, dx, s, rows, lanes);
        }
    }
    with_row_stores<X, WLane>(stream, x, dx, lanes, on_lines(dx), [&](auto how) NK_INLINE_LAMBDA {
        dx_along_rows<X, WLane, how>(dy, x, w, dx, s, rows, lanes);
    });
}

// What the sums of the first row are added to: to clear sums instead would be stores that wait behind results which go
// past the caches. Not const, or it would lie in the file.
template <class T>
alignas(64) T no_sums[kMostSums / static_cast<index_t>(sizeof(T)) + 2 * kVectorBytes / static_cast<int>(sizeof(T))];

// Sums down rows of at most `most` lanes, one a lane, for rows whose vectors begin behind `head` lanes: none crosses a
// line.
template <class X, index_t most>
class ShortDownSums {
  public:
    using T = Compute<X>;
    static_assert(most * static_cast<index_t>(sizeof(T)) <= kMostSums);

    NK_INLINE explicit ShortDownSums(index_t head = 0) : first_(first_lane<X>(head)) {}
    NK_INLINE T* g() { return room_[0] + first_; }
    NK_INLINE T* g_xhat() { return room_[1] + first_; }
    NK_INLINE const T* none() const { return no_sums<T> + first_; }
    // Instead, for short rows: two arrays more take registers and instructions that those notice (8192 x 64
    // float16 1.19).
    NK_INLINE void clear(index_t lanes) {
        for (index_t l = 0; l < lanes + kWidth<X>; ++l) g()[l] = g_xhat()[l] = 0;
    }
    NK_INLINE void add_to(DownSums all, index_t lanes) {
        add(g(), lanes, all.g, all.fresh);
        add(g_xhat(), lanes, all.g_xhat, all.fresh);
    }

  private:
    NK_INLINE static void add(const T* sums, index_t lanes, double* to, bool fresh) {
        if (fresh) {
            for (index_t l = 0; l < lanes; ++l) to[l] = 0 + static_cast<double>(sums[l]);
        } else {
            for (index_t l = 0; l < lanes; ++l) to[l] += static_cast<double>(sums[l]);
        }
    }

    index_t first_;
    alignas(64) T room_[2][most + 2 * kWidth<X>];
};

// What becomes of the sums down the lanes: they are not wanted, kept for the rows that follow, or, at the last row of
// all, given as they are to the gradients of w and b (each: if it is wanted).
enum class Down { none, kept, given };
struct NotGiven {};

// dx of a row, a few vectors at a time, and dy and dy * xhat added to what earlier rows have left; `first`: there are
// none. Sums that are kept are whole vectors: lanes beside those of a part have 0 added, and what comes beyond the
// row's last is never looked at.
template <class X, Down Add, Stores How, bool WLane = true>
struct WritingDx : std::conditional_t<Add == Down::given, Gradients, NotGiven> {
    static_assert(Add != Down::given || How != Stores::joined);
    static_assert(Add == Down::none || WLane);
    using Ends = EndsOf<X, How, WLane>;
    static constexpr bool kBehindHead = WLane && How == Stores::joined, kHasOthers = false;
    index_t head = 0;
    NK_INLINE index_t head_of_leaf(const char*) const { return head; }
    using T = Compute<X>;
    static constexpr index_t kElements = kTurn;
    index_t lanes = 0, lane = 0;
    const char *dy = nullptr, *x = nullptr, *w = nullptr;
    char* dx = nullptr;
    T *sum = nullptr, *sum_xhat = nullptr;
    const T *before = nullptr, *before_xhat = nullptr;
    bool far;
    Ends* ends;
    Vec<X> hi, lo, rstd, e, c, a_row = {};  // a_row: rstd * w, where that is one a row

    template <class Sums>
    NK_INLINE WritingDx(const BackwardRows<T>& all, index_t r, bool first, Sums& down, Ends& of_rows)
        : WritingDx(all, r, all.s, r * all.s.row, first, down, of_rows) {}
    template <class Sums>
    NK_INLINE WritingDx(const BackwardRows<T>& all, index_t r, const Statistics<T>& s, index_t i, bool first,
                        Sums& down, Ends& of_rows)
        : WritingDx(all, r, {s.hi[i], s.lo[i], s.rstd[i], 1},
                    dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]), first, down, of_rows) {}
    // all: BackwardRows or BackwardEights.
    template <class All, class Sums>
    NK_INLINE WritingDx(const All& all, index_t r, Split<T> s, DxTerms<T> terms, bool first, Sums& down, Ends& of_rows)
        : lanes(all.lanes),
          dy(all.dy.at(r)),
          x(all.x.at(r)),
          w(all.w.at(r)),
          dx(all.dx.at(r)),
          sum(down.g()),
          sum_xhat(down.g_xhat()),
          before(first ? down.none() : sum),
          before_xhat(first ? down.none() : sum_xhat),
          far(all.far),
          ends(&of_rows),
          hi(splat<X>(s.hi)),
          lo(splat<X>(s.lo)),
          rstd(splat<X>(s.rstd)),
          e(splat<X>(terms.e)),
          c(splat<X>(terms.c)) {
        ends->begin(dx);
        if constexpr (How == Stores::joined && std::is_same_v<All, BackwardRows<T>>) {
            head = head_of_joined<X, true>(all.x, all.dx, r, all.lanes);
            if (head > 0) vector(static_cast<int>(head));
        }
    }
    // A row of a tile, from where that has come to.
    NK_INLINE WritingDx(const Unwritten<X>& of, Ends& of_rows)
        : lanes(of.lanes),
          lane(of.lane),
          dy(of.dy.at(of.row)),
          x(of.x.at(of.row)),
          w(of.w.at(of.row)),
          dx(of.y.at(of.row)),
          far(of.far),
          ends(&of_rows) {
        static_assert(!WLane && Add == Down::none);
        const index_t k = of.row * of.s.row;
        const DxTerms<T> terms = dx_terms<T>(of.s.lo[k], of.s.rstd[k], of.s.mean_g[k], of.s.mean_g_xhat[k]);
        hi = splat<X>(of.s.hi[k]);
        rstd = splat<X>(of.s.rstd[k]);
        e = splat<X>(terms.e);
        c = splat<X>(terms.c);
        a_row = splat<X>(of.s.rstd[k] * value_at<T>(w));
        index_t to_boundary = 0;
        if constexpr (How == Stores::joined) {
            ends->begin(dx + bytes<X>(lane));
            if (lane == 0) to_boundary = head_of_joined<X, WLane>(of.x, of.y, of.row, of.lanes);
        } else if constexpr (How == Stores::cached) {
            if (lane == 0) to_boundary = head_in_cache<X>(of.y, of.row, of.lanes);
        }
        if (to_boundary > 0) vector(static_cast<int>(to_boundary));
    }
    NK_INLINE void add(const T* from, T* to, Vec<X> v) {
        store<T>(reinterpret_cast<char*>(to + lane), load<T>(reinterpret_cast<const char*>(from + lane)) + v);
    }
    NK_INLINE void give(const T* from, char* to, Vec<X> v, int n) {
        if (!to) return;
        put<T, How == Stores::lines>(to + bytes<T>(lane), load<T>(reinterpret_cast<const char*>(from + lane)) + v, n);
    }
    NK_INLINE void vector(int n) {
        const Vec<X> dyv = load_rest<X>(dy + bytes<X>(lane), n);
        const Vec<X> d = load_rest<X>(x + bytes<X>(lane), n) - hi;
        Vec<X> a = a_row;
        if constexpr (WLane) a = rstd * load_rest<T>(w + bytes<T>(lane), n);
        put_asking<X, How, WLane, Add == Down::kept>(*ends, dx + bytes<X>(lane), dx_of<Vec<X>>(dyv, d, rstd, a, e, c),
                                                     n);
        if constexpr (Add != Down::none) {
            const Vec<X> xhat = (kLoose ? d : d - lo) * rstd;
            if constexpr (Add == Down::given) {
                give(before, this->dbias, dyv, n);
                give(before_xhat, this->dweight, dyv * xhat, n);
            } else {
                add(before, sum, n < kWidth<X> ? keep_first<T>(dyv, n) : dyv);
                add(before_xhat, sum_xhat, n < kWidth<X> ? keep_first<T>(dyv * xhat, n) : dyv * xhat);
            }
        }
        lane += n;
    }
    NK_INLINE bool asks() const { return How != Stores::cached || far; }
    NK_INLINE index_t turns() const { return (lanes - lane) / kElements; }
    NK_INLINE void turn() {
#pragma GCC unroll 16
        for (int i = 0; i < kElements / kWidth<X>; ++i) vector(kWidth<X>);
    }
    NK_INLINE void rest() {
        while (lanes - lane >= kWidth<X>) vector(kWidth<X>);
        if (lane < lanes) vector(static_cast<int>(lanes - lane));
    }
};

}  // namespace
