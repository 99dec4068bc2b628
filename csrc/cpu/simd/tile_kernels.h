// The kernels, written once over a `Simd` type. Included by one file an instruction set, inside a
// namespace of its own and under its target options; includes nothing, so that no header's code is
// compiled for the wrong processor.

// --- packing ---

template <class T>
bool pack_as(const T*, const RowColumns* rows, const RowColumns* ahead, int n, int64_t cols,
             float* tile) {
    float check = 0.0f;  // becomes NaN on the first value that is not finite
    const int64_t blocked = Simd::TRANSPOSES ? cols / 8 * 8 : 0;
    for (int r = 0; r < n; r += 8) {
        const T* eight[8];  // the last row stands for those beyond it, whose lanes become 0
        for (int i = 0; i < 8; ++i)
            eight[i] = static_cast<const T*>(rows[r + i < n ? r + i : n - 1].at);
        check +=
            Simd::transpose(eight, ahead && r + 8 <= n ? ahead + r : nullptr, blocked, tile + r);
        for (int i = r; i < r + 8 && i < n; ++i)
            for (int64_t c = blocked; c < cols; ++c) {
                const float x = widen(eight[i - r] + c);
                tile[c * TILE + i] = x;
                check += x * 0.0f;
            }
        if constexpr (SCALED<T>) {
            float scales[8];
            for (int i = 0; i < 8; ++i) {
                scales[i] = scale_of<T>(rows[r + i < n ? r + i : n - 1]);
                check += scales[i] * 0.0f;
            }
            for (int64_t c = 0; c < cols; ++c)
                for (int i = 0; i < 8; ++i) tile[c * TILE + r + i] *= scales[i];
        }
    }
    if (n < TILE)
        for (int64_t c = 0; c < cols; ++c)
            for (int lane = n; lane < TILE; ++lane) tile[c * TILE + lane] = 0.0f;
    return check == 0.0f;
}

bool pack(const RowColumns* rows, const RowColumns* ahead, DType dtype, int n, int64_t cols,
          float* tile) {
    return with_element(dtype,
                        [&](auto* type) { return pack_as(type, rows, ahead, n, cols, tile); });
}

// --- the chain ---

using Vec = Simd::Vec;
constexpr int W = Simd::WIDTH;

// Keeps the compiler from fusing a product with the sum it is added to, which would leave it
// unrounded.
template <class X>
inline X rounded(X product) {
#if defined(__x86_64__)  // on ARM, setup.py turns fusing off
    // Shorter vectors are the portable kernels', which do not fuse; Clang has no register for them.
    if constexpr (sizeof(X) >= 16) asm("" : "+v"(product));
#endif
    return product;
}

// What codes stand for; of other elements, themselves.
template <class T, class X>
inline X scaled(X x, float scale) {
    if constexpr (SCALED<T>) return rounded(X(x * scale));
    return x;
}

// One column of one pair: scores grow nowhere else.
template <Source S>
inline Vec step(Vec query, Vec row, Vec sum) {
    if constexpr (S == Source::DIFFERENCE) {
        const Vec difference = query - row;
        return Simd::fnma(difference, difference, sum);
    } else {
        return Simd::fma(query, row, sum);
    }
}

void sqnorms(Segment segment, float* sums) {
    constexpr int V = TILE / W < 8 ? TILE / W : 8;
    for (int r = 0; r < TILE; r += V * W) {
        Vec sum[V];
        for (int v = 0; v < V; ++v) sum[v] = Simd::load(sums + r + v * W);
        for (int64_t c = 0; c < segment.cols; ++c)
            for (int v = 0; v < V; ++v) {
                const Vec x = Simd::load(segment.tile + c * TILE + r + v * W);
                sum[v] = Simd::fma(x, x, sum[v]);
            }
        for (int v = 0; v < V; ++v) Simd::store(sums + r + v * W, sum[v]);
    }
}

template <Source S>
void advance_as(Segment segment, const float* query, float* sums) {
    constexpr int V = TILE / W < 8 ? TILE / W : 8;
    for (int r = 0; r < TILE; r += V * W) {
        Vec sum[V];
        for (int v = 0; v < V; ++v) sum[v] = Simd::load(sums + r + v * W);
        for (int64_t c = 0; c < segment.cols; ++c) {
            const Vec q = Simd::broadcast(query[c]);
            for (int v = 0; v < V; ++v)
                sum[v] = step<S>(q, Simd::load(segment.tile + c * TILE + r + v * W), sum[v]);
        }
        for (int v = 0; v < V; ++v) Simd::store(sums + r + v * W, sum[v]);
    }
}

void advance(Source source, Segment segment, const float* query, float* sums) {
    if (source == Source::DIFFERENCE)
        advance_as<Source::DIFFERENCE>(segment, query, sums);
    else
        advance_as<Source::PRODUCT>(segment, query, sums);
}

// --- whole rows ---

template <class T>
void widen_as(const T* x, float scale, int64_t cols, float* out) {
    int64_t c = 0;
    for (; c + W <= cols; c += W) Simd::store(out + c, scaled<T>(Simd::load(x + c), scale));
    for (; c < cols; ++c) out[c] = scaled<T>(widen(x + c), scale);
}

void widen_row(RowColumns row, DType dtype, int64_t cols, float* out) {
    with_element(dtype, [&](auto* type) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        widen_as(static_cast<const T*>(row.at), scale_of<T>(row), cols, out);
    });
}

// A product of two fp32 is exact in fp64, so fusing changes no bit.
double dot64(const float* x, const float* y, int64_t cols) {
    typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
    typedef double Doubles __attribute__((vector_size(64)));
    Doubles sums = {};
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8)
        sums += __builtin_convertvector(*reinterpret_cast<const Floats*>(x + c), Doubles) *
                __builtin_convertvector(*reinterpret_cast<const Floats*>(y + c), Doubles);
    for (int i = 0; c < cols; ++c, ++i) sums[i] += double(x[c]) * y[c];
    double sum = 0.0;
    for (int i = 0; i < 8; ++i) sum += sums[i];
    return sum;
}

// --- scan: Q queries against a tile, V vectors of rows at a time ---

template <Source S, int Q, int V>
inline void sum_columns(Scan& s, int r, Vec (&sum)[Q][V]) {
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = Simd::broadcast(0.0f);
    const float* query = static_cast<const float*>(s.panel);
    Ahead ahead = s.ahead;  // in registers: what is read as bytes could be s itself
    for (const Segment& segment : s.segments) {
        const float* x = segment.tile + r;
        for (int64_t c = 0; c < segment.cols; ++c, x += TILE, query += Q) {
            ahead.prefetch();
            Vec row[V];
            for (int v = 0; v < V; ++v) row[v] = Simd::load(x + v * W);
            for (int q = 0; q < Q; ++q) {
                const Vec value = Simd::broadcast(query[q]);
                for (int v = 0; v < V; ++v) sum[q][v] = step<S>(value, row[v], sum[q][v]);
            }
        }
    }
    s.ahead = ahead;
}

template <int Q, int V>
inline void sum_codes(Scan& s, int r, Vec (&sum)[Q][V]) {
    Simd::Int dot[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) dot[q][v] = Simd::broadcast_int(s.offsets[q]);
    const char* query = static_cast<const char*>(s.panel);
    const uint8_t* x = s.codes + r * 4;
    Ahead ahead = s.ahead;
    for (int64_t i = 0, steps = s.steps; i < steps; ++i, x += TILE * 4) {
        ahead.prefetch();
        Simd::Bytes row[V];
        for (int v = 0; v < V; ++v) row[v] = Simd::load_bytes(x + v * W * 4);
        for (int q = 0; q < Q; ++q, query += Simd::QUAD_BYTES)
            for (int v = 0; v < V; ++v) dot[q][v] = Simd::dot4(row[v], query, dot[q][v]);
    }
    s.ahead = ahead;
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = Simd::to_float(dot[q][v]);
}

#include "cpu/simd/code_kernels.h"

// A score that at least k of V * W scores reach, and few more; NaN where one is not finite. A later
// row of the thread has to beat it.
template <int V>
inline float first_gate(const float* scores, int64_t k) {
    constexpr int STEPS = 8;
    Vec least = Simd::load(scores), most = least, check = least - least;
    for (int v = 1; v < V; ++v) {
        const Vec x = Simd::load(scores + v * W);
        most = Simd::max(most, x);
        least = -Simd::max(-least, -x);
        check = check + (x - x);
    }
    float lows[W], highs[W], checks[W], low, high, zero = 0.0f;
    Simd::store(lows, least);
    Simd::store(highs, most);
    Simd::store(checks, check);
    low = lows[0];
    high = highs[0];
    for (int i = 0; i < W; ++i) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
        zero += checks[i];
    }
    if (zero != 0.0f) return __builtin_nanf("");
    for (int i = 0; i < STEPS; ++i) {
        const float middle = 0.5f * low + 0.5f * high;
        const Vec gate = Simd::broadcast(middle);
        int above = 0;
        for (int v = 0; v < V; ++v)
            above += __builtin_popcount(Simd::bits(Simd::above(Simd::load(scores + v * W), gate)));
        (above >= k ? low : high) = middle;
        if (above == k) break;
    }
    return low;
}

template <Source S, int Q, int V>
void scan_as(Scan& s) {
    float of_signs[S == Source::SIGNS ? Q * TILE : 1];
    if constexpr (S == Source::SIGNS) sum_signs<Q>(s, of_signs);
    for (int r = 0; r < s.rows; r += V * W) {
        const uint64_t wanted = s.wanted >> r & (~uint64_t(0) >> (64 - V * W));
        if (!wanted) continue;
        Vec sum[Q][V];
        if constexpr (S == Source::CODES)
            sum_codes<Q, V>(s, r, sum);
        else if constexpr (S == Source::NIBBLES)
            sum_nibbles<Q, V>(s, r, sum);
        else if constexpr (S == Source::SIGNS)
            for (int q = 0; q < Q; ++q)
                for (int v = 0; v < V; ++v) sum[q][v] = Simd::load(of_signs + q * TILE + r + v * W);
        else
            sum_columns<S, Q, V>(s, r, sum);
        const bool bare = s.row_scale == nullptr;
        auto score = [&](int q, int v) __attribute__((always_inline)) {
            Vec value = sum[q][v];
            if constexpr (!of_codes(S))
                if (s.rest) value = value + Simd::load(s.rest + q * TILE + r + v * W);
            if (bare) return value;
            value = Simd::fma(
                value, Simd::load(s.row_scale + r + v * W) * Simd::broadcast(s.query_scale[q]),
                Simd::broadcast(s.bases ? s.bases[q] : 0.0f));
            for (int j = 0; j < TERMS && j < s.terms; ++j)
                value = Simd::fma(Simd::load(s.term_values[j] + r + v * W),
                                  Simd::broadcast(s.term_factors[j * Q + q]), value);
            return value;
        };
        // The gate passes what is not <= threshold, so that NaN passes and is reported later.
        typename Simd::Mask any = {};
        for (int q = 0; q < Q; ++q) {
            const Vec threshold = Simd::broadcast(s.thresholds[q]);
            for (int v = 0; v < V; ++v)
                any = Simd::either(any, Simd::above(score(q, v), threshold));
        }
        if (!Simd::bits(any)) continue;
        for (int q = 0; q < Q; ++q) {
            const Vec threshold = Simd::broadcast(s.thresholds[q]);
            uint64_t lanes = 0;
            for (int v = 0; v < V; ++v)
                lanes |= uint64_t(Simd::bits(Simd::above(score(q, v), threshold))) << (v * W);
            lanes &= wanted;
            if (!lanes) continue;
            float scores[V * W], partials[V * W];
            for (int v = 0; v < V; ++v) {
                Simd::store(scores + v * W, score(q, v));
                Simd::store(partials + v * W, sum[q][v]);
            }
            TopK& topk = s.topk[q];
            float first = s.thresholds[q];
            if (first != first && lanes == ~uint64_t(0) >> (64 - V * W) && topk.k < V * W) {
                first = first_gate<V>(scores, topk.k);
                const Vec gate = Simd::broadcast(first);
                for (int v = 0; v < V; ++v)
                    if (first == first)
                        lanes &=
                            ~(uint64_t(Simd::bits(Simd::above(gate, Simd::load(scores + v * W))))
                              << (v * W));
            }
            for (; lanes; lanes &= lanes - 1) {
                const int lane = __builtin_ctzll(lanes), row = r + lane;
                if (scores[lane] <= s.thresholds[q]) continue;  // that rose, or this fell
                topk.entries[topk.count++] = {make_key(scores[lane], s.first_row + row),
                                              partials[lane],
                                              s.row_sqnorm ? s.row_sqnorm[row] : 0.0f};
                if (topk.count == topk.capacity) s.thresholds[q] = shrink(topk);
            }
            if (s.thresholds[q] != s.thresholds[q]) s.thresholds[q] = first;
        }
    }
}
