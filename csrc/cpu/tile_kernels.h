// The kernels, written once over a `Simd` type. Included by one file an instruction set, inside a
// namespace of its own and under its target options; includes nothing, so that no header's code is
// compiled for the wrong processor.

// --- packing
// -------------------------------------------------------------------------------------------------------

inline float widen(const float* x) { return *x; }
inline float widen(const BF16* x) {
    const uint32_t bits = uint32_t(x->bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
inline float widen(const F16* x) {
    const uint32_t h = x->bits, sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31,
                   mantissa = h & 1023;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = float(mantissa) * 5.9604644775390625e-8f;  // subnormal: mantissa · 2^-24
        __builtin_memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    }
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

template <class T>
bool pack_as(const void* const* rows, int n, int64_t cols, float* tile) {
    float check = 0.0f;  // becomes NaN on the first value that is not finite
    int64_t blocked = 0;
    int r = 0;
    if (Simd::TRANSPOSES) {
        blocked = cols / 8 * 8;
        for (; r + 8 <= n; r += 8) {
            check +=
                Simd::transpose(reinterpret_cast<const T* const*>(rows + r), blocked, tile + r);
            for (int i = r; i < r + 8; ++i) {
                const T* row = static_cast<const T*>(rows[i]);
                for (int64_t c = blocked; c < cols; ++c) {
                    const float x = widen(row + c);
                    tile[c * TILE + i] = x;
                    check += x * 0.0f;
                }
            }
        }
    }
    for (; r < n; ++r) {
        const T* row = static_cast<const T*>(rows[r]);
        for (int64_t c = 0; c < cols; ++c) {
            const float x = widen(row + c);
            tile[c * TILE + r] = x;
            check += x * 0.0f;
        }
    }
    if (n < TILE)
        for (int64_t c = 0; c < cols; ++c)
            for (int lane = n; lane < TILE; ++lane) tile[c * TILE + lane] = 0.0f;
    return check == 0.0f;
}

bool pack(const void* const* rows, DType dtype, int n, int64_t cols, float* tile) {
    switch (dtype) {
        case DType::F16:
            return pack_as<F16>(rows, n, cols, tile);
        case DType::BF16:
            return pack_as<BF16>(rows, n, cols, tile);
        default:
            return pack_as<float>(rows, n, cols, tile);
    }
}

// --- the chain
// -----------------------------------------------------------------------------------------------------

using Vec = Simd::Vec;
constexpr int W = Simd::WIDTH;

// One column of one pair: the only place where a score grows.
template <Metric M>
inline Vec step(Vec query, Vec row, Vec sum) {
    if constexpr (M == Metric::L2) {
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

template <Metric M>
void advance_as(Segment segment, const float* query, float* sums) {
    constexpr int V = TILE / W < 8 ? TILE / W : 8;
    for (int r = 0; r < TILE; r += V * W) {
        Vec sum[V];
        for (int v = 0; v < V; ++v) sum[v] = Simd::load(sums + r + v * W);
        for (int64_t c = 0; c < segment.cols; ++c) {
            const Vec q = Simd::broadcast(query[c]);
            for (int v = 0; v < V; ++v)
                sum[v] = step<M>(q, Simd::load(segment.tile + c * TILE + r + v * W), sum[v]);
        }
        for (int v = 0; v < V; ++v) Simd::store(sums + r + v * W, sum[v]);
    }
}

void advance(Metric metric, Segment segment, const float* query, float* sums) {
    if (metric == Metric::L2)
        advance_as<Metric::L2>(segment, query, sums);
    else
        advance_as<Metric::IP>(segment, query, sums);
}

// --- scan: Q queries against a tile, V vectors of rows at a time
// ---------------------------------------------------

template <Metric M, int Q, int V>
void scan_as(const Scan& s) {
    for (int r = 0; r < s.rows; r += V * W) {
        Vec sum[Q][V];
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < V; ++v) sum[q][v] = Simd::broadcast(0.0f);
        const float* query = s.panel;
        for (const Segment& segment : s.segments) {
            const float* x = segment.tile + r;
            for (int64_t c = 0; c < segment.cols; ++c, x += TILE, query += Q) {
                Vec row[V];
                for (int v = 0; v < V; ++v) row[v] = Simd::load(x + v * W);
                for (int q = 0; q < Q; ++q) {
                    const Vec value = Simd::broadcast(query[q]);
                    for (int v = 0; v < V; ++v) sum[q][v] = step<M>(value, row[v], sum[q][v]);
                }
            }
        }
        // Gate: what is not <= threshold, so that NaN passes and is reported later.
        auto score = [&](int q, int v) __attribute__((always_inline)) {
            if constexpr (M == Metric::COSINE)
                return sum[q][v] *
                       (Simd::load(s.row_scale + r + v * W) * Simd::broadcast(s.query_scale[q]));
            else
                return sum[q][v];
        };
        typename Simd::Mask any = {};
        for (int q = 0; q < Q; ++q) {
            const Vec threshold = Simd::broadcast(s.thresholds[q]);
            for (int v = 0; v < V; ++v)
                any = Simd::either(any, Simd::above(score(q, v), threshold));
        }
        if (!Simd::bits(any)) continue;
        for (int q = 0; q < Q; ++q) {
            for (int v = 0; v < V; ++v) {
                const Vec scored = score(q, v);
                uint32_t passed = Simd::bits(Simd::above(scored, Simd::broadcast(s.thresholds[q])));
                if (!passed) continue;
                float scores[W], partials[W];
                Simd::store(scores, scored);
                Simd::store(partials, sum[q][v]);
                TopK& topk = s.topk[q];
                for (; passed; passed &= passed - 1) {
                    const int lane = __builtin_ctz(passed), row = r + v * W + lane;
                    if (row >= s.rows) break;
                    if (scores[lane] <= s.thresholds[q]) continue;  // it rose within this vector
                    topk.entries[topk.count++] = {make_key(scores[lane], s.first_row + row),
                                                  partials[lane],
                                                  M == Metric::COSINE ? s.row_sqnorm[row] : 0.0f};
                    if (topk.count == topk.capacity) s.thresholds[q] = shrink(topk);
                }
            }
        }
    }
}
