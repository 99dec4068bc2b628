// Sums of row-major rows: columns in lanes, four rows at a time. Included after tile_kernels.h,
// whose Vec, W and step it uses.

constexpr int ROWS = 4;

// Adds the sums of Q queries with the rows from p.rows[r] on. Where SQUARES, which is for the first
// queries, it adds Σ x² too, and prefetches.
template <Source S, int Q, bool SQUARES, class T>
inline void sum_rows(const RowSums& p, int r, int query) {
    const int n = p.n - r < ROWS ? p.n - r : ROWS;
    const T* rows[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        rows[i] = static_cast<const T*>(p.rows[r + (i < n ? i : n - 1)]);
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
                             for (int i = 0; i < ROWS; ++i) row[i] = Simd::load(x[i]);
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
    const auto put = [&](const Vec(&lanes)[ROWS], float* to) __attribute__((always_inline)) {
        float four[ROWS];
        Simd::add_lanes(lanes, four);
        if (n == ROWS)
            for (int i = 0; i < ROWS; ++i) to[i] += four[i];
        else
            for (int i = 0; i < n; ++i) to[i] += four[i];
    };
    for (int q = 0; q < Q; ++q) put(sum[q], p.sums + (query + q) * TILE + r);
    if (SQUARES) put(square, p.squares + r);
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
