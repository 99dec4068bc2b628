// Scores in fp64, a group of queries against a tile of 64 rows. Included like tile_kernels.h.
//
// Each score has the bits that dot64, or a plain sum of squared differences, gives the pair alone:
// it adds up CHAINS sums in order, each over every CHAINS-th column. So columns lie by chain: first
// those of the first sum, then those of the second, ...

constexpr int L = W / 2;  // lanes of a vector of doubles
typedef float Narrow __attribute__((vector_size(4 * L)));
typedef double Wide __attribute__((vector_size(8 * L)));
constexpr int WIDE_ROWS = Simd::rows_of(MAX_GROUP) * L;  // scored together

template <Source S>
constexpr int64_t CHAINS = chains_of(S);

// Writes out[TILE / WIDE_ROWS][cols][WIDE_ROWS]. Columns are read in memory order, since memory is
// slower than arithmetic.
template <Source S>
void widen_tile(const Segment* segments, double* out) {
    const int64_t cols = segments[0].cols + segments[1].cols;
    int64_t chain = 0, first = 0, place = 0;  // of the column that is next
    for (const Segment* segment = segments; segment < segments + 2; ++segment)
        for (int64_t c = 0; c < segment->cols; ++c) {
            const float* x = segment->tile + c * TILE;
            for (int r = 0; r < TILE; r += L) {
                Narrow narrow;
                __builtin_memcpy(&narrow, x + r, sizeof narrow);
                const Wide wide = Simd::to_double(narrow);
                double* to = out + (r / WIDE_ROWS * cols + first + place) * WIDE_ROWS;
                __builtin_memcpy(to + r % WIDE_ROWS, &wide, sizeof wide);
            }
            first += (cols - chain + CHAINS<S> - 1) / CHAINS<S>;
            if (++chain == CHAINS<S>) chain = 0, first = 0, ++place;
        }
}

inline Wide load_wide(const double* x) {
    Wide wide;
    __builtin_memcpy(&wide, x, sizeof wide);
    return wide;
}

// `queries` is [cols, Q], columns by chain; out is [Q, TILE].
template <Source S, int Q>
void scores64(const double* tile, const double* queries, int64_t cols, Ahead* ahead, double* out) {
    constexpr int V = WIDE_ROWS / L;
    for (int r = 0; r < TILE; r += WIDE_ROWS) {
        Wide total[Q][V] = {};
        const double* query = queries;
        for (int64_t chain = 0; chain < CHAINS<S>; ++chain) {
            Wide sum[Q][V] = {};
            const int64_t count = (cols - chain + CHAINS<S> - 1) / CHAINS<S>;
            for (int64_t i = 0; i < count; ++i, tile += WIDE_ROWS, query += Q) {
                ahead->prefetch();
                Wide x[V];
                for (int v = 0; v < V; ++v) x[v] = load_wide(tile + v * L);
                for (int q = 0; q < Q; ++q)
                    for (int v = 0; v < V; ++v) {
                        if constexpr (S == Source::DIFFERENCE) {
                            const Wide difference = query[q] - x[v];
                            sum[q][v] += rounded(difference * difference);
                        } else {
                            sum[q][v] += query[q] * x[v];
                        }
                    }
            }
            for (int q = 0; q < Q; ++q)
                for (int v = 0; v < V; ++v) total[q][v] += sum[q][v];
        }
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < V; ++v)
                __builtin_memcpy(out + q * TILE + r + v * L, &total[q][v], sizeof(Wide));
    }
}

// Σ x² of each row with dot64's bits; the tile is one of products.
void squares64(const double* tile, int64_t cols, double* out) {
    for (int r = 0; r < TILE; r += WIDE_ROWS) {
        double total[WIDE_ROWS] = {};
        for (int64_t chain = 0; chain < CHAINS<Source::PRODUCT>; ++chain) {
            double sum[WIDE_ROWS] = {};
            const int64_t count =
                (cols - chain + CHAINS<Source::PRODUCT> - 1) / CHAINS<Source::PRODUCT>;
            for (int64_t i = 0; i < count; ++i, tile += WIDE_ROWS)
                for (int v = 0; v < WIDE_ROWS; ++v) sum[v] += tile[v] * tile[v];
            for (int v = 0; v < WIDE_ROWS; ++v) total[v] += sum[v];
        }
        __builtin_memcpy(out + r, total, sizeof total);
    }
}

uint64_t finish64(double scale, double norm, const double* row_norms, double threshold,
                  double* sums) {
    uint64_t lanes = 0;
    for (int r = 0; r < TILE; r += L) {
        Wide score = load_wide(sums + r) * scale;
        if (row_norms) {
            const Wide length = load_wide(row_norms + r) * norm;
            const auto some = length > 0.0;
            score = some ? score / (some ? length : length + 1.0) : length * 0.0;
        }
        score = score + 0.0;  // −0 becomes +0
        __builtin_memcpy(sums + r, &score, sizeof score);
        const auto above = score > threshold;
        for (int lane = 0; lane < L; ++lane) lanes |= uint64_t(above[lane] & 1) << (r + lane);
    }
    return lanes;
}
