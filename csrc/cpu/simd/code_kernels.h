// Sums of a tile's codes of 1 and of 4 bits with a group of queries. Included like tile_kernels.h.

// A query has a table for every four columns: one value below 64 for each of their 16 combinations
// of signs, so that the sum of four values fits a byte.
template <int Q>
inline void sum_signs(Scan& s, const uint8_t* tables, int64_t apart, int block, float* sums) {
    typename Simd::U16 all[Q] = {}, odd[Q] = {};  // sums of pairs of bytes; of each second byte
    const uint8_t* x = s.codes + block;
    Ahead ahead = s.ahead;
    for (int64_t i = 0, steps = s.steps; i < steps; i += 2, x += 2 * TILE) {
        ahead.prefetch();
        const Simd::U8 first = Simd::load_u8(x), second = Simd::load_u8(x + TILE);
        const Simd::U8 index[4] = {Simd::low(first), Simd::high(first), Simd::low(second),
                                   Simd::high(second)};
        for (int q = 0; q < Q; ++q) {
            const uint8_t *table = tables + i * apart + q * SIGN_TABLES, *next = table + apart;
            const Simd::U8 sum = Simd::add_u8(
                Simd::add_u8(Simd::lookup(table, index[0]), Simd::lookup(table + 16, index[1])),
                Simd::add_u8(Simd::lookup(next, index[2]), Simd::lookup(next + 16, index[3])));
            all[q] = Simd::add_u16(all[q], Simd::as_u16(sum));
            odd[q] = Simd::add_u16(odd[q], Simd::seconds(sum));
        }
    }
    s.ahead = ahead;
    for (int q = 0; q < Q; ++q) Simd::store_u16(all[q], odd[q], sums + q * TILE + block);
}

// sums[q][r] of the whole tile.
template <int Q>
void sum_signs(Scan& s, float* sums) {
    constexpr int BYTES = sizeof(Simd::U8),
                  AT_ONCE = Q < Simd::SIGN_QUERIES ? Q : Simd::SIGN_QUERIES, REST = Q % AT_ONCE;
    const uint8_t* tables = static_cast<const uint8_t*>(s.panel);
    for (int block = 0; block < s.rows; block += BYTES) {
        int q = 0;
        for (; q + AT_ONCE <= Q; q += AT_ONCE)
            sum_signs<AT_ONCE>(s, tables + q * SIGN_TABLES, Q * SIGN_TABLES, block,
                               sums + q * TILE);
        if constexpr (REST > 0)
            sum_signs<REST>(s, tables + q * SIGN_TABLES, Q * SIGN_TABLES, block, sums + q * TILE);
    }
    for (int q = 0; q < Q; ++q) {
        const Vec shift = Simd::broadcast(s.shifts[q]);
        for (int r = 0; r < TILE; r += W)
            Simd::store(sums + q * TILE + r, Simd::load(sums + q * TILE + r) + shift);
    }
}

template <int Q, int V>
inline void sum_nibbles(Scan& s, int r, Vec (&sum)[Q][V]) {
    Simd::Int dot[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) dot[q][v] = Simd::broadcast_int(0);
    const char* query = static_cast<const char*>(s.panel);
    const uint8_t* x = s.codes + r * 4;
    Ahead ahead = s.ahead;
    for (int64_t i = 0, steps = s.steps; i < steps; ++i, x += TILE * 4) {
        ahead.prefetch();
        Simd::U8 low[V], high[V];
        for (int v = 0; v < V; ++v) {
            const Simd::U8 both = Simd::load_u8(x + v * W * 4);
            low[v] = Simd::low(both);
            high[v] = Simd::high(both);
        }
        for (int q = 0; q < Q; ++q, query += NIBBLE_BYTES) {
            const Simd::U8 first = Simd::broadcast4(query), second = Simd::broadcast4(query + 4);
            for (int v = 0; v < V; ++v) {
                dot[q][v] = Simd::dot4_nibbles(low[v], first, dot[q][v]);
                dot[q][v] = Simd::dot4_nibbles(high[v], second, dot[q][v]);
            }
        }
    }
    s.ahead = ahead;
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v)
            sum[q][v] = Simd::to_float(dot[q][v]) + Simd::broadcast(s.shifts[q]);
}

void dot_halves(const uint8_t* const* rows, int64_t n, const int8_t* query, int64_t bytes,
                float* sums) {
    constexpr int BYTES = sizeof(Simd::U8), FOUR = 4;
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(query);
    for (int64_t r = 0; r < n; r += FOUR, rows += FOUR, sums += FOUR) {
        Simd::Int low[FOUR], high[FOUR];
        for (int i = 0; i < FOUR; ++i) low[i] = high[i] = Simd::broadcast_int(0);
        const auto add = [&](const uint8_t* first, const uint8_t* second,
                             const uint8_t* const* x) __attribute__((always_inline)) {
            const Simd::U8 one = Simd::load_u8(first), other = Simd::load_u8(second);
            for (int i = 0; i < FOUR; ++i) {
                const Simd::U8 both = Simd::load_u8(x[i]);
                low[i] = Simd::dot4_nibbles(Simd::low(both), one, low[i]);
                high[i] = Simd::dot4_nibbles(Simd::high(both), other, high[i]);
            }
        };
        const int64_t whole = bytes / BYTES * BYTES;
        for (int64_t j = 0; j < whole; j += BYTES) {
            const uint8_t* const x[FOUR] = {rows[0] + j, rows[1] + j, rows[2] + j, rows[3] + j};
            add(codes + j, codes + bytes + j, x);
        }
        if (whole < bytes) {  // the last bytes, then zeros
            uint8_t last[FOUR][BYTES] = {}, first[BYTES] = {}, second[BYTES] = {};
            for (int64_t j = whole; j < bytes; ++j) {
                first[j - whole] = codes[j];
                second[j - whole] = codes[bytes + j];
                for (int i = 0; i < FOUR; ++i) last[i][j - whole] = rows[i][j];
            }
            const uint8_t* const x[FOUR] = {last[0], last[1], last[2], last[3]};
            add(first, second, x);
        }
        Vec lanes[FOUR];  // integers below 2^24, whose sums are exact
        for (int i = 0; i < FOUR; ++i) lanes[i] = Simd::to_float(low[i] + high[i]);
        Simd::add_lanes(lanes, sums);
    }
}

void sum_bits(const uint8_t* const* rows, int64_t n, const int8_t* query, int64_t columns,
              float* sums) {
    constexpr int BYTES = sizeof(Simd::U8), FOUR = 4;
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(query);
    const char ones[4] = {1, 1, 1, 1};
    const Simd::U8 one = Simd::broadcast4(ones);
    for (int64_t r = 0; r < n; r += FOUR, rows += FOUR, sums += FOUR) {
        Simd::Int sum[FOUR];
        for (int i = 0; i < FOUR; ++i) sum[i] = Simd::broadcast_int(0);
        for (int64_t c = 0; c < columns; c += BYTES) {
            const Simd::U8 values = Simd::load_u8(codes + c);
            for (int i = 0; i < FOUR; ++i)
                sum[i] = Simd::dot4_nibbles(one, Simd::where(rows[i] + c / 8, values), sum[i]);
        }
        Vec lanes[FOUR];  // integers below 2^24, whose sums are exact
        for (int i = 0; i < FOUR; ++i) lanes[i] = Simd::to_float(sum[i]);
        Simd::add_lanes(lanes, sums);
    }
}
