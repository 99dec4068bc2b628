// Kernels of nested.h, written once over a `Simd` type. Included like tile_kernels.h.

// --- product ---

template <int R, int V>
void product_strip(const Product& p, int r, int c) {
    const float* a = p.a + r * p.a_row;
    const float* b = p.b + c;
    Vec sum[R][V];
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] = Simd::broadcast(0.0f);
    for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += TILE) {
        Vec row[V];
        for (int v = 0; v < V; ++v) row[v] = Simd::load(b + v * W);
        for (int i = 0; i < R; ++i) {
            const Vec x = Simd::broadcast(a[i * p.a_row]);
            for (int v = 0; v < V; ++v) sum[i][v] = Simd::fma(x, row[v], sum[i][v]);
        }
    }
    for (int i = 0; i < R; ++i)
        for (int v = 0; v < V; ++v) {
            const int64_t at = (r + i) * TILE + c + v * W;
            Simd::store(p.out + at, p.in ? Simd::load(p.in + at) + sum[i][v] : sum[i][v]);
        }
}

template <int V>
void product_columns(const Product& p, int c) {
    int r = 0;
    for (; r + 6 <= p.rows; r += 6) product_strip<6, V>(p, r, c);
    switch (p.rows - r) {
        case 1:
            return product_strip<1, V>(p, r, c);
        case 2:
            return product_strip<2, V>(p, r, c);
        case 3:
            return product_strip<3, V>(p, r, c);
        case 4:
            return product_strip<4, V>(p, r, c);
        case 5:
            return product_strip<5, V>(p, r, c);
    }
}

void product(const Product& p) {
    constexpr int V = Simd::rows_of(6);
    int c = p.begin / W * W;
    for (; c + V * W <= (p.end + W - 1) / W * W; c += V * W) product_columns<V>(p, c);
    for (; c < p.end; c += W) product_columns<1>(p, c);
}

// --- scores as a loss reads them ---

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

inline float row_scale(const ScoreBlock& b, int g, int r) {
    return b.row_scale ? b.row_scale[g * b.row_apart + r] : 1.0f;
}

// A row's own columns in the block are first, first + period, …, below cols; target is its target's
// column, −1 if it lies elsewhere.
struct Own {
    int64_t first, target;
};
inline Own own_columns(const ScoreBlock& b, int r) {
    if (!b.target) return {TILE, -1};
    int64_t first = (b.target[r] - b.first_col) % b.period;
    if (first < 0) first += b.period;
    const int64_t target = b.target[r] - b.first_col;
    return {first, target >= 0 && target < b.cols ? target : -1};
}

// y [TILE] of one row and prefix, as ScoreBlock defines it.
inline void read_scores(const ScoreBlock& b, int g, int r, Own own, float* y) {
    const float* s = b.scores + (g * ROWS + r) * TILE;
    const float* cs = b.col_scale + g * b.col_apart;
    const float scale = row_scale(b, g, r);
    const Vec rs = Simd::broadcast(scale), boost = Simd::broadcast(b.other_boost);
    for (int c = 0; c < TILE; c += W)
        Simd::store(
            y + c,
            Simd::fma(Simd::load(s + c) * Simd::load(cs + c), rs, Simd::load(b.bias + c)) * boost);
    if (b.exclude_own || b.own_boost != 1.0f || b.other_boost != 1.0f)
        for (int64_t c = own.first; c < b.cols; c += b.period) {
            const float z = s[c] * cs[c] * scale + b.bias[c];
            y[c] = b.exclude_own ? NEGATIVE_INFINITY : c == own.target ? z : z * b.own_boost;
        }
    if (b.mask) {
        const uint8_t* mask = b.mask + r * b.mask_stride;
        for (int c = 0; c < b.cols; ++c) y[c] = mask[c] ? NEGATIVE_INFINITY : y[c];
    }
}

// A row of soft targets, padded with 0.
inline const float* soft_row(const ScoreBlock& b, int r, float* padded) {
    const float* soft = b.soft + r * b.soft_stride;
    if (b.cols == TILE) return soft;
    for (int c = 0; c < TILE; ++c) padded[c] = c < b.cols ? soft[c] : 0.0f;
    return padded;
}

// --- folding ---

// exp(x) for x <= 88 to 2 ulp: 2^n · e^r with |r| <= ln(2)/2; 0 below −87.
inline Vec exp_bounded(Vec x) {
    const Vec low = Simd::broadcast(-87.0f);
    const Vec clamped = Simd::max(low, x);  // in this order NaN stays NaN
    // Adding 1.5 · 2^23 rounds to an integer, which stands in the low bits.
    const Vec magic = Simd::broadcast(12582912.0f);
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

inline Vec absolute(Vec x) { return Simd::max(x, Simd::broadcast(0.0f) - x); }

// log(1 + e) for e in [0, 1] to 3 ulp: 2·atanh(e / (2 + e)).
inline Vec log1p_of(Vec e) {
    const Vec s = e / (Simd::broadcast(2.0f) + e), q = s * s;
    Vec p = Simd::broadcast(1.0f / 15);
    p = Simd::fma(p, q, Simd::broadcast(1.0f / 13));
    p = Simd::fma(p, q, Simd::broadcast(1.0f / 11));
    p = Simd::fma(p, q, Simd::broadcast(1.0f / 9));
    p = Simd::fma(p, q, Simd::broadcast(1.0f / 7));
    p = Simd::fma(p, q, Simd::broadcast(1.0f / 5));
    p = Simd::fma(p, q, Simd::broadcast(1.0f / 3));
    p = Simd::fma(p, q, Simd::broadcast(1.0f));
    return (s + s) * p;
}

inline Vec softplus(Vec y) {
    const Vec zero = Simd::broadcast(0.0f);
    return Simd::max(y, zero) + log1p_of(exp_bounded(zero - absolute(y)));
}

inline Vec sigmoid_of(Vec y) {
    const Vec zero = Simd::broadcast(0.0f), one = Simd::broadcast(1.0f);
    const Vec e = exp_bounded(zero - absolute(y));
    return (y < zero ? e : one) / (one + e);
}

inline void fold_row(const float* y, const Statistics& s, int64_t at, int64_t first_col) {
    float* lanes = s.top + at * MAX_WIDTH;
    Vec top = Simd::load(lanes);
    if (s.best) {
        typedef typename Simd::Int Int;
        Int best;
        __builtin_memcpy(&best, s.best + at * MAX_WIDTH, sizeof best);
        for (int c = 0; c < TILE; c += W) {
            const Vec z = Simd::load(y + c);
            const Int here = Int{} + int32_t(first_col + c);
            best = z > top ? here : best;
            top = Simd::max(z, top);
        }
        __builtin_memcpy(s.best + at * MAX_WIDTH, &best, sizeof best);
    } else {
        for (int c = 0; c < TILE; c += W) top = Simd::max(Simd::load(y + c), top);
    }
    Simd::store(lanes, top);
    Vec sum = Simd::load(s.sum + at * MAX_WIDTH);
    if (Simd::bits(Simd::above(top, Simd::broadcast(s.ref[at])))) {
        const float ref = fold_max(top);
        sum = sum * Simd::broadcast(__builtin_expf(s.ref[at] - ref));
        s.ref[at] = ref;
    }
    const Vec ref = Simd::broadcast(s.ref[at]);
    for (int c = 0; c < TILE; c += W) sum += exp_bounded(Simd::load(y + c) - ref);
    Simd::store(s.sum + at * MAX_WIDTH, sum);
}

inline void fold_columns(const float* y, const Statistics& s, int64_t at) {
    for (int c = 0; c < TILE; c += W) {
        const Vec z = Simd::load(y + c), top = Simd::max(z, Simd::load(s.col_top + at + c));
        Vec sum = Simd::load(s.col_sum + at + c), ref = Simd::load(s.col_ref + at + c);
        Simd::store(s.col_top + at + c, top);
        if (Simd::bits(Simd::above(top, ref))) {
            const Vec above = Simd::max(ref, top);
            sum = sum * exp_bounded(ref - above);
            ref = above;
            Simd::store(s.col_ref + at + c, ref);
        }
        Simd::store(s.col_sum + at + c, sum + exp_bounded(z - ref));
    }
}

void fold_block(const ScoreBlock& b, const Statistics& s) {
    float y[TILE], padded[TILE];
    for (int r = 0; r < b.rows; ++r) {
        const Own own = own_columns(b, r);
        const float* soft = b.soft ? soft_row(b, r, padded) : nullptr;
        const double weight = s.weight[r];
        for (int c = 0; soft && c < TILE; ++c) s.weight[r] += soft[c];
        for (int g = 0; g < b.prefixes; ++g) {
            const int64_t at = g * ROWS + r;
            read_scores(b, g, r, own, y);
            if (own.target >= 0 && s.hit) s.hit[g * s.hit_apart + r] = y[own.target];
            if (b.sigmoid) {
                if (own.target >= 0) y[own.target] = NEGATIVE_INFINITY;  // `hit` is its part
                Vec sum = Simd::load(s.sum + at * MAX_WIDTH);
                for (int c = 0; c < TILE; c += W) sum += softplus(Simd::load(y + c));
                Simd::store(s.sum + at * MAX_WIDTH, sum);
                continue;
            }
            const double before = s.ref[at];
            fold_row(y, s, at, b.first_col);
            if (s.col_top) fold_columns(y, s, g * s.stats_apart);
            if (soft) {  // relative to the maximum: a target that is the maximum adds exactly 0
                const Vec zero = Simd::broadcast(0.0f), ref = Simd::broadcast(s.ref[at]);
                Vec sum = zero;
                for (int c = 0; c < TILE; c += W) {
                    const Vec t = Simd::load(soft + c);
                    sum += t == zero ? zero : t * (Simd::load(y + c) - ref);
                }
                s.soft[at] += fold_sum(sum) + (before - s.ref[at]) * weight;
            }
        }
    }
}

// --- gradients ---

void score_gradients(const ScoreBlock& b, const ScoreGradients& s) {
    const Vec zero = Simd::broadcast(0.0f);
    float y[TILE], a[TILE], padded[TILE];
    for (int r = 0; r < b.rows; ++r) {
        const Own own = own_columns(b, r);
        const float* soft = s.d_soft ? soft_row(b, r, padded) : nullptr;
        float suffix[TILE] = {};
        for (int g = b.prefixes - 1; g >= 0; --g) {
            const int64_t at = g * s.apart + r;
            read_scores(b, g, r, own, y);
            const float d_hit = s.d_hit ? s.d_hit[at] : 0.0f;
            if (b.sigmoid) {
                const Vec d_row = Simd::broadcast(s.d_row[at]);
                for (int c = 0; c < TILE; c += W)
                    Simd::store(a + c, d_row * sigmoid_of(Simd::load(y + c)));
                if (own.target >= 0) a[own.target] = d_hit / (1.0f + __builtin_expf(y[own.target]));
            } else {
                const float d_soft = soft ? s.d_soft[at] : 0.0f;
                const float total = soft ? s.soft_total[r * s.total_step] : 0.0f;
                const float p_scale = s.d_row[at] - d_hit - d_soft * total;
                const float *d_col = nullptr, *col_max = nullptr, *col_log = nullptr;
                if (s.d_col) {
                    d_col = s.d_col + g * s.cols_apart;
                    col_max = s.col_max + g * s.cols_apart;
                    col_log = s.col_log + g * s.cols_apart;
                }
                const Vec top = Simd::broadcast(s.row_max[at]),
                          log = Simd::broadcast(s.row_log[at]);
                for (int c = 0; c < TILE; c += W) {
                    const Vec z = Simd::load(y + c);
                    Vec grad = Simd::broadcast(p_scale) * exp_bounded((z - top) - log);
                    if (d_col) {
                        const Vec shifted = (z - Simd::load(col_max + c)) - Simd::load(col_log + c);
                        grad = Simd::fma(Simd::load(d_col + c), exp_bounded(shifted), grad);
                    }
                    if (soft) grad = Simd::fma(Simd::broadcast(d_soft), Simd::load(soft + c), grad);
                    Simd::store(a + c, grad);
                }
                const bool masked =
                    b.mask && own.target >= 0 && b.mask[r * b.mask_stride + own.target];
                if (own.target >= 0 && !b.exclude_own && !masked) {
                    // expm1 gives p − 1: near p = 1 a difference would keep few digits.
                    const int64_t t = own.target;
                    float value =
                        p_scale * __builtin_expm1f((y[t] - s.row_max[at]) - s.row_log[at]);
                    float sum = s.d_row[at];
                    if (d_col) {
                        value += d_col[t] * __builtin_expm1f((y[t] - col_max[t]) - col_log[t]);
                        sum += d_col[t];
                    }
                    if (soft) value += d_soft * (soft[t] - total);
                    a[t] = value + sum;
                }
            }
            const Vec rs = Simd::broadcast(row_scale(b, g, r));
            const float* scores = b.scores + (g * ROWS + r) * TILE;
            const float* col_scale = b.col_scale + g * b.col_apart;
            float* out = s.suffix + g * s.suffix_apart + r * TILE;
            Vec row_sum = zero;
            for (int c = 0; c < TILE; c += W) {
                const Vec grad = Simd::load(a + c), cs = Simd::load(col_scale + c);
                const Vec scaled = grad * rs, total = Simd::fma(scaled, cs, Simd::load(suffix + c));
                Simd::store(suffix + c, total);
                Simd::store(out + c, total);
                if (s.bias_sums) Simd::store(s.bias_sums + c, Simd::load(s.bias_sums + c) + grad);
                if (s.row_sums) {
                    const Vec z = Simd::load(scores + c);
                    row_sum = Simd::fma(grad * cs, z, row_sum);
                    float* sums = s.col_sums + g * TILE + c;
                    Simd::store(sums, Simd::fma(scaled, z, Simd::load(sums)));
                }
            }
            if (s.row_sums) s.row_sums[g * s.sums_apart + r] = fold_sum(row_sum);
        }
    }
}
