// Sums of row-major rows: columns in lanes; the lanes of four rows are added up together. Included
// after tile_kernels.h, whose Vec, W and step it uses.

constexpr int ROWS = 4;

// Adds the sums of the lanes of n of four rows.
inline void continue_sums(const Vec (&lanes)[ROWS], int n, float* to) {
    float four[ROWS];
    Simd::add_lanes(lanes, four);
    if (n == ROWS)
        for (int i = 0; i < ROWS; ++i) to[i] += four[i];
    else
        for (int i = 0; i < n; ++i) to[i] += four[i];
}

// Adds the sums of Q queries with the rows from p.rows[r] on, four rows side by side. Where
// SQUARES, which is for the first queries, it adds Σ x² too, and prefetches.
template <Source S, int Q, bool SQUARES, class T>
inline void sum_rows(const RowSums& p, int r, int query) {
    const int n = p.n - r < ROWS ? p.n - r : ROWS;
    const T* rows[ROWS];
    float scales[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        const RowColumns& row = p.rows[r + (i < n ? i : n - 1)];
        rows[i] = static_cast<const T*>(row.at);
        scales[i] = scale_of<T>(row);
    }
    Prefetch<ROWS> prefetch = {p.ahead && n == ROWS ? p.ahead + r : nullptr,
                               p.cols * int64_t(sizeof(T))};
    const float* queries = p.queries + query * p.stride;
    Vec sum[Q][ROWS], square[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        square[i] = Simd::broadcast(0.0f);
        for (int q = 0; q < Q; ++q) sum[q][i] = Simd::broadcast(0.0f);
    }
    const auto add = [&](const auto* const* x, const float* values, int64_t stride)
                         __attribute__((always_inline)) {
                             Vec row[ROWS];
                             for (int i = 0; i < ROWS; ++i)
                                 row[i] = scaled<T>(Simd::load(x[i]), scales[i]);
                             for (int q = 0; q < Q; ++q) {
                                 const Vec value = Simd::load(values + q * stride);
                                 for (int i = 0; i < ROWS; ++i)
                                     sum[q][i] = step<S>(value, row[i], sum[q][i]);
                             }
                             for (int i = 0; SQUARES && i < ROWS; ++i)
                                 square[i] = Simd::fma(row[i], row[i], square[i]);
                         };
    constexpr int LINES = ROWS * W * int(sizeof(T)) / 64;  // that a step reads
    const int64_t whole = p.cols / W * W;
    for (int64_t c = 0; c < whole; c += W) {
        const T* x[ROWS];
        for (int i = 0; i < ROWS; ++i) x[i] = rows[i] + c;
        if (SQUARES) prefetch.lines(LINES > 0 ? LINES : 1);
        add(x, queries + c, p.stride);
    }
    if (whole < p.cols) {  // the last columns, then zeros
        float last[ROWS][W] = {}, values[Q][W] = {};
        const float* x[ROWS];
        for (int i = 0; i < ROWS; ++i) {
            x[i] = last[i];
            for (int64_t c = whole; c < p.cols; ++c) last[i][c - whole] = widen(rows[i] + c);
        }
        for (int q = 0; q < Q; ++q)
            for (int64_t c = whole; c < p.cols; ++c)
                values[q][c - whole] = queries[q * p.stride + c];
        add(x, values[0], W);
    }
    for (int q = 0; q < Q; ++q) continue_sums(sum[q], n, p.sums + (query + q) * TILE + r);
    if (SQUARES) continue_sums(square, n, p.squares + r);
}

// The same for one query, a row after the other: memory is read fastest in its order.
template <Source S, class T>
inline void sum_linear(const RowSums& p, int r) {
    constexpr int CHAINS = 4;  // of a row's sum
    const int n = p.n - r < ROWS ? p.n - r : ROWS;
    Vec sum[ROWS], square[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        const int row = r + (i < n ? i : n - 1);
        const T* x = static_cast<const T*>(p.rows[row].at);
        const float scale = scale_of<T>(p.rows[row]);
        const char* ahead = p.ahead ? static_cast<const char*>(p.ahead[row].at) : nullptr;
        Vec sums[CHAINS], squares[CHAINS];
        for (int k = 0; k < CHAINS; ++k) sums[k] = squares[k] = Simd::broadcast(0.0f);
        const auto add = [&](int k, Vec query, Vec loaded) __attribute__((always_inline)) {
            const Vec value = scaled<T>(loaded, scale);
            sums[k] = step<S>(query, value, sums[k]);
            squares[k] = Simd::fma(value, value, squares[k]);
        };
        constexpr int64_t STEP = CHAINS * W, BYTES = STEP * sizeof(T), LINE = 64;
        int64_t c = 0;
        for (; c + STEP <= p.cols; c += STEP) {
            for (int64_t byte = 0; ahead && byte < BYTES; byte += LINE)
                __builtin_prefetch(ahead + c * int64_t(sizeof(T)) + byte);
            for (int k = 0; k < CHAINS; ++k)
                add(k, Simd::load(p.queries + c + k * W), Simd::load(x + c + k * W));
        }
        for (; c + W <= p.cols; c += W) add(0, Simd::load(p.queries + c), Simd::load(x + c));
        if (c < p.cols) {  // the last columns, then zeros
            float value[W] = {}, query[W] = {};
            for (int64_t at = c; at < p.cols; ++at) {
                query[at - c] = p.queries[at];
                value[at - c] = widen(x + at);
            }
            add(0, Simd::load(query), Simd::load(value));
        }
        sum[i] = sums[0] + sums[1] + (sums[2] + sums[3]);
        square[i] = squares[0] + squares[1] + (squares[2] + squares[3]);
    }
    continue_sums(sum, n, p.sums + r);
    continue_sums(square, n, p.squares + r);
}

template <Source S, bool SQUARES, class T>
inline void sum_group(const RowSums& p, int r, int query, int size) {
    if (size == 1) sum_rows<S, 1, SQUARES, T>(p, r, query);
    if constexpr (Simd::ROW_QUERIES > 1)
        if (size == 2) sum_rows<S, 2, SQUARES, T>(p, r, query);
    if constexpr (Simd::ROW_QUERIES > 2) {
        if (size == 3) sum_rows<S, 3, SQUARES, T>(p, r, query);
        if (size == 4) sum_rows<S, 4, SQUARES, T>(p, r, query);
    }
}

template <Source S>
void row_sums(const RowSums& p) {
    with_element(p.dtype, [&](auto* type) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        const bool linear = p.count == 1 && !p.cached;
        for (int r = 0; linear && r < p.n; r += ROWS) sum_linear<S, T>(p, r);
        if (linear) return;
        for (int r = 0; r < p.n; r += ROWS)
            for (int q = 0; q < p.count; q += Simd::ROW_QUERIES) {
                const int size = p.count - q < Simd::ROW_QUERIES ? p.count - q : Simd::ROW_QUERIES;
                if (q == 0)
                    sum_group<S, true, T>(p, r, q, size);
                else
                    sum_group<S, false, T>(p, r, q, size);
            }
    });
}
