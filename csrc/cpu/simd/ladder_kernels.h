// Codes of rows of a ladder, as codes.h describes them. Included after wide_kernels.h, whose
// Narrow, Wide and rounded it uses.
//
// Sums are eight on every processor, each of every eighth column, so that they have the same bits.
// Products are fused with what they are added to only where they are exact.

constexpr int STEP = 8, PARTS = STEP / L;  // columns of a step; vectors that hold them
typedef int32_t Ints __attribute__((vector_size(4 * L)));

inline Narrow load_narrow(const float* x) {
    Narrow values;
    __builtin_memcpy(&values, x, sizeof values);
    return values;
}

inline Narrow size_of(Narrow x) { return Narrow(Ints(x) & 0x7fffffff); }

// The sum of eight sums, like dot64's.
inline double in_order(const Wide (&sums)[PARTS]) {
    double sum = 0.0;
    for (int p = 0; p < PARTS; ++p)
        for (int i = 0; i < L; ++i) sum += sums[p][i];
    return sum;
}

void add_prefix(const float* x, const float* centre, int64_t cols, float* y, PrefixSums* sums) {
    Wide square[PARTS] = {}, beside[PARTS] = {}, along[PARTS] = {}, of_centre[PARTS] = {};
    Narrow largest = {};
    const auto add = [&](const float* x, const float* centre,
                         float* y) __attribute__((always_inline)) {
        for (int p = 0; p < PARTS; ++p) {
            const Narrow value = load_narrow(x + p * L), middle = load_narrow(centre + p * L),
                         rest = value - middle, size = size_of(rest);
            __builtin_memcpy(y + p * L, &rest, sizeof rest);
            const Wide wide = Simd::to_double(value), wide_rest = Simd::to_double(rest);
            square[p] += wide * wide;
            beside[p] += wide_rest * wide_rest;
            along[p] += Simd::to_double(size);
            of_centre[p] += Simd::to_double(middle) * wide;
            largest = largest > size ? largest : size;
        }
    };
    const int64_t whole = cols / STEP * STEP;
    for (int64_t c = 0; c < whole; c += STEP) add(x + c, centre + c, y + c);
    if (whole < cols) {  // the last columns, then zeros
        float last[STEP] = {}, middle[STEP] = {}, rest[STEP];
        for (int64_t c = whole; c < cols; ++c)
            last[c - whole] = x[c], middle[c - whole] = centre[c];
        add(last, middle, rest);
        for (int64_t c = whole; c < cols; ++c) y[c] = rest[c - whole];
    }
    sums->square += in_order(square);
    sums->beside += in_order(beside);
    sums->along += in_order(along);
    sums->of_centre += in_order(of_centre);
    for (int i = 0; i < L; ++i)
        sums->largest = sums->largest > largest[i] ? sums->largest : largest[i];
}

float square_beyond(const float* y, int64_t steps, float reach) {
    Narrow sums[PARTS] = {};
    for (int64_t i = 0; i < steps; ++i, y += STEP)
        for (int p = 0; p < PARTS; ++p) {
            const Narrow over = size_of(load_narrow(y + p * L)) - reach,
                         more = over > 0.0f ? over : Narrow{};
            sums[p] += rounded(more * more);
        }
    float sum = 0.0f;
    for (int p = 0; p < PARTS; ++p)
        for (int i = 0; i < L; ++i) sum += sums[p][i];
    return sum;
}

// Packs eight bits of each column into a row's nibbles and lows.
inline void put_bytes(const int32_t* __restrict codes, int64_t steps, uint32_t* __restrict nibbles,
                      uint8_t* __restrict lows) {
    const int64_t half = steps * STEP / 2;
    for (int64_t j = 0; j < half; ++j) lows[j] = uint8_t((codes[j] & 15) | codes[half + j] << 4);
    for (int64_t i = 0; i < steps; ++i, codes += STEP) {
        uint32_t bytes = 0;
        for (int j = 0; j < 4; ++j)
            bytes |= uint32_t(codes[j] >> 4 | (codes[j + 4] & 0xf0)) << 8 * j;
        nibbles[i] = bytes;
    }
}

void code_row(const RowToCode& row, RowCodes* to) {
    const Narrow least = {}, most = least + 255.0f, inverse = least + row.inverse,
                 scale = least + row.scale, low_scale = scale / 16.0f;
    Ints lanes[PARTS];
    for (int i = 0; i < STEP; ++i) lanes[i / L][i % L] = i;
    Wide square[PARTS] = {}, low_square[PARTS] = {};
    for (int64_t c = 0; c < row.steps * STEP; c += STEP)
        for (int p = 0; p < PARTS; ++p) {
            const Narrow y = load_narrow(row.y + c + p * L), at = rounded(y * inverse) + 128.0f,
                         above = at > least ? at : least;
            const Ints codes = __builtin_convertvector(above < most ? above : most, Ints),
                       inside = lanes[p] < int32_t(row.cols - c);
            __builtin_memcpy(to->codes + c + p * L, &codes, sizeof codes);
            const Narrow four = __builtin_convertvector(codes >> 4, Narrow) - 7.5f,
                         eight = __builtin_convertvector(codes, Narrow) - 127.5f,
                         rest = y - rounded(four * scale),
                         low_rest = y - rounded(eight * low_scale);
            const Wide wide = Simd::to_double(Narrow(Ints(rest) & inside)),
                       low_wide = Simd::to_double(Narrow(Ints(low_rest) & inside));
            square[p] += wide * wide;
            low_square[p] += low_wide * low_wide;
        }
    to->square = in_order(square);
    to->low_square = in_order(low_square);
    put_bytes(to->codes, row.steps, to->nibbles, to->lows);
}

void tile_signs(const uint8_t* nibbles, int64_t steps, int first, int count, uint8_t* signs) {
    for (int64_t i = 0; i < steps; ++i, nibbles += 4 * TILE, signs += TILE)
        for (int r = first; r < first + count; ++r) {
            uint32_t word;
            __builtin_memcpy(&word, nibbles + 4 * r, sizeof word);
            // A product gathers four bits, each eight places from the next, in the highest places.
            const uint32_t bits = word >> 3 & 0x11111111u, gather = 0x10204080u;
            signs[r] = uint8_t((bits * gather >> 28) | (bits >> 4) * gather >> 28 << 4);
        }
}
