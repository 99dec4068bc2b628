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

// --- softmax
// -------------------------------------------------------------------------------------------------------

// exp(x) for x <= 0 to 2 ulp: 2^n · e^r with |r| <= ln(2)/2; 0 below −87.
inline Vec exp_negative(Vec x) {
    const Vec low = Simd::broadcast(-87.0f);
    const Vec clamped = Simd::max(low, x);  // in this order NaN stays NaN
    const Vec magic =
        Simd::broadcast(12582912.0f);  // 1.5 · 2^23: rounds to an integer in the low bits
    const Vec shifted = Simd::fma(clamped, Simd::broadcast(1.44269504088896341f), magic);
    const Vec n = shifted - magic;
    Vec r = Simd::fnma(n, Simd::broadcast(0.693145751953125f), clamped);
    r = Simd::fnma(n, Simd::broadcast(1.42860682030941723e-6f), r);
    Vec p = Simd::broadcast(1.0f / 5040);
    p = Simd::fma(p, r, Simd::broadcast(1.0f / 720));
    p = Simd::fma(p, r, Simd::broadcast(1.0f / 120));
    p = Simd::fma(p, r, Simd::broadcast(1.0f / 24));
    p = Simd::fma(p, r, Simd::broadcast(1.0f / 6));
    p = Simd::fma(p, r, Simd::broadcast(0.5f));
    p = Simd::fma(p, r, Simd::broadcast(1.0f));
    p = Simd::fma(p, r, Simd::broadcast(1.0f));
    const typename Simd::Int exponent = (((typename Simd::Int)shifted) << 23) + (127 << 23);
    return x < low ? Simd::broadcast(0.0f) : p * (Vec)exponent;
}

inline float fold_max(Vec v) {
    float lanes[W], best;
    Simd::store(lanes, v);
    best = lanes[0];
    for (int i = 1; i < W; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
}
inline float fold_sum(Vec v) {
    float lanes[W], sum = 0.0f;
    Simd::store(lanes, v);
    for (int i = 0; i < W; ++i) sum += lanes[i];
    return sum;
}
// The last, partial vector of a row of `cols`.
inline Vec load_rest(const float* z, int64_t count, float fill) {
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = i < count ? z[i] : fill;
    return Simd::load(lanes);
}

void softmax_stats(const float* z, const float* soft, int64_t cols, float* row_max, float* sum,
                   double* soft_sum) {
    const int64_t whole = cols / W * W;
    const float floor = -__builtin_inff();
    Vec top = cols > whole ? load_rest(z + whole, cols - whole, floor) : Simd::broadcast(floor);
    for (int64_t j = 0; j < whole; j += W) top = Simd::max(Simd::load(z + j), top);
    const float tile_max = fold_max(top), new_max = tile_max > *row_max ? tile_max : *row_max;
    const Vec shift = Simd::broadcast(new_max);
    Vec sums[2] = {Simd::broadcast(0.0f), Simd::broadcast(0.0f)};
    int64_t j = 0;
    for (; j + 2 * W <= whole; j += 2 * W)
        for (int i = 0; i < 2; ++i) sums[i] += exp_negative(Simd::load(z + j + i * W) - shift);
    for (; j < whole; j += W) sums[0] += exp_negative(Simd::load(z + j) - shift);
    if (cols > whole) sums[1] += exp_negative(load_rest(z + whole, cols - whole, floor) - shift);
    const float rescale = *row_max == new_max ? 1.0f : __builtin_expf(*row_max - new_max);
    *sum = *sum * rescale + fold_sum(sums[0] + sums[1]);
    *row_max = new_max;
    if (soft) {
        double total = 0.0;
        for (int64_t i = 0; i < cols; ++i) total += double(soft[i]) * z[i];
        *soft_sum += total;
    }
}

void softmax_grad(const float* z, const float* soft, int64_t cols, float row_max, float log_sum,
                  float p_scale, float soft_scale, float* grad) {
    const Vec top = Simd::broadcast(row_max), log_total = Simd::broadcast(log_sum);
    const Vec scale = Simd::broadcast(p_scale), spread = Simd::broadcast(soft_scale);
    for (int64_t j = 0; j < cols; j += W) {
        const bool whole = j + W <= cols;
        const Vec score = whole ? Simd::load(z + j) : load_rest(z + j, cols - j, 0.0f);
        Vec out = Simd::broadcast(0.0f);
        if (soft)
            out = spread * (whole ? Simd::load(soft + j) : load_rest(soft + j, cols - j, 0.0f));
        out = Simd::fnma(scale, exp_negative((score - top) - log_total), out);
        if (whole) {
            Simd::store(grad + j, out);
        } else {
            float lanes[W];
            Simd::store(lanes, out);
            for (int64_t i = j; i < cols; ++i) grad[i] = lanes[i - j];
        }
    }
}

// --- table
// ---------------------------------------------------------------------------------------------------------

template <Metric M>
void fill_scans(Kernels& kernels) {
    void (**scan)(const Scan&) = kernels.scan[int(M)];
    scan[0] = scan_as<M, 1, Simd::rows_of(1)>;
    scan[1] = scan_as<M, 2, Simd::rows_of(2)>;
    scan[2] = scan_as<M, 3, Simd::rows_of(3)>;
    scan[3] = scan_as<M, 4, Simd::rows_of(4)>;
    scan[4] = scan_as<M, 5, Simd::rows_of(5)>;
    scan[5] = scan_as<M, 6, Simd::rows_of(6)>;
}

Kernels make_kernels(const char* name) {
    Kernels kernels = {name, pack, sqnorms, advance, {}, softmax_stats, softmax_grad};
    fill_scans<Metric::IP>(kernels);
    fill_scans<Metric::COSINE>(kernels);
    fill_scans<Metric::L2>(kernels);
    return kernels;
}
