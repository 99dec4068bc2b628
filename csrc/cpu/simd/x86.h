// What AVX2 and AVX-512 share: sums over lanes, and packing by 8×8 transposes. Included like
// tile_kernels.h.

// out[i] = the sum of v[i]'s lanes.
inline void add_lanes8(const __m256 (&v)[4], float* out) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const F16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline __m256 load8(const BF16* x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256 load8(const I8* x) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

// tile[c][0..8) = rows[0..8)[c] for c < cols, a multiple of 8. Returns 0, or NaN if a value is not
// finite. Prefetches as many columns of the 8 rows `ahead`, if not null.
template <class T>
inline float transpose8(const T* const* rows, const RowColumns* ahead, int64_t cols, float* tile) {
    Prefetch<8> prefetch = {ahead, cols * int64_t(sizeof(T))};
    __m256 check = _mm256_setzero_ps();
    const __m256 zero = _mm256_setzero_ps();
    for (int64_t c = 0; c < cols; c += 8, tile += 8 * TILE) {
        prefetch.lines(sizeof(T));  // 8 rows of 8 columns are sizeof(T) lines
        __m256 a[8], b[8];
        for (int i = 0; i < 8; ++i) {
            a[i] = load8(rows[i] + c);
            check = _mm256_fmadd_ps(a[i], zero, check);
        }
        for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
            a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
            a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
            a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_ps(tile + i * TILE, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
            _mm256_storeu_ps(tile + (i + 4) * TILE, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
        }
    }
    float lanes[8], sum = 0.0f;
    _mm256_storeu_ps(lanes, check);
    for (int i = 0; i < 8; ++i) sum += lanes[i];
    return sum;
}
