// Scores in fp64, a group of queries against a tile of 64 rows. Included like tile_kernels.h.
//
// Each score has the bits that dot64, or a plain sum of squared differences, gives the pair alone:
// CHAINS sums of every CHAINS-th column each, then these in order. So columns lie by chain: those
// of the first, those of the second, ...

constexpr int L = W / 2;  // lanes of a vector of doubles
typedef float Narrow __attribute__((vector_size(4 * L)));
typedef double Wide __attribute__((vector_size(8 * L)));
constexpr int WIDE_ROWS = Simd::rows_of(MAX_GROUP) * L;  // scored together

template <Source S>
constexpr int64_t CHAINS = chains_of(S);

// out[TILE / WIDE_ROWS][cols][WIDE_ROWS]
template <Source S>
void widen_tile(const Segment* segments, double* out) {
    const int64_t head = segments[0].cols, cols = head + segments[1].cols;
    for (int r = 0; r < TILE; r += WIDE_ROWS)
        for (int64_t chain = 0; chain < CHAINS<S>; ++chain)
            for (int64_t c = chain; c < cols; c += CHAINS<S>, out += WIDE_ROWS) {
                const float* x =
                    c < head ? segments[0].tile + c * TILE : segments[1].tile + (c - head) * TILE;
                for (int v = 0; v < WIDE_ROWS; v += L) {
                    Narrow narrow;
                    __builtin_memcpy(&narrow, x + r + v, sizeof narrow);
                    const Wide wide = __builtin_convertvector(narrow, Wide);
                    __builtin_memcpy(out + v, &wide, sizeof wide);
                }
            }
}

inline Wide load_wide(const double* x) {
    Wide wide;
    __builtin_memcpy(&wide, x, sizeof wide);
    return wide;
}

// Keeps a product apart from the sum it is added to: fused, it would not be rounded.
inline Wide rounded(Wide product) {
#if defined(__x86_64__)  // elsewhere nothing is fused that is not written so
    asm("" : "+v"(product));
#endif
    return product;
}

// `queries` is [cols, Q], columns by chain; out is [Q, TILE].
template <Source S, int Q>
void scores64(const double* tile, const double* queries, int64_t cols, double* out) {
    constexpr int V = WIDE_ROWS / L;
    for (int r = 0; r < TILE; r += WIDE_ROWS) {
        Wide total[Q][V] = {};
        const double* query = queries;
        for (int64_t chain = 0; chain < CHAINS<S>; ++chain) {
            Wide sum[Q][V] = {};
            const int64_t count = (cols - chain + CHAINS<S> - 1) / CHAINS<S>;
            for (int64_t i = 0; i < count; ++i, tile += WIDE_ROWS, query += Q) {
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
