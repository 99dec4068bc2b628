// Vectors of the tests: values that a dtype holds, laid out as csrc reads them. Every array is
// exactly as long as it has to be, and the gaps between rows are NaN.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include "check.h"
#include "cpu/search/search.h"

// For naive loops, which neither race nor overrun, and would take minutes under a sanitizer.
#define UNWATCHED __attribute__((no_sanitize("address", "thread", "undefined")))

using namespace mrl;

constexpr double ROUNDING = 1.0 / (1 << 24);  // of fp32, relative
// ThreadSanitizer sees every read and write, so what several threads do is run once, and the cases
// of one thread are left to the other builds.
#ifdef __SANITIZE_THREAD__
constexpr bool RACES_ONLY = true;
constexpr int THREADS[] = {4};
#else
constexpr bool RACES_ONLY = false;
constexpr int THREADS[] = {1, 4};
#endif
constexpr Metric metric_named(std::string_view name) {
    int metric = 0;
    while (METRIC_TERMS[metric].name != name) ++metric;
    return Metric(metric);
}
constexpr Metric IP = metric_named("ip"), COSINE = metric_named("cosine"), L2 = metric_named("l2");
template <int N>
constexpr std::array<Metric, N> first_metrics() {
    std::array<Metric, N> metrics = {};
    for (int i = 0; i < N; ++i) metrics[i] = Metric(i);
    return metrics;
}
constexpr auto EVERY_METRIC = first_metrics<int(std::size(METRIC_TERMS))>();
constexpr auto METRICS = first_metrics<int(metric_named("test ip"))>();  // without the tests' own
constexpr DType DTYPES[] = {DType::F32, DType::F16, DType::BF16};

inline std::vector<const Kernels*> tested_kernels() { return available_kernels(); }

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() &&
           (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

inline float uniform(std::mt19937& random) { return float(random()) * 0x1p-31f - 1.0f; }

inline uint16_t to_half(float x, DType dtype) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == DType::BF16) {
        if (x != x) return 0x7fc0;
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    const uint16_t sign = bits >> 16 & 0x8000;
    if (x != x) return 0x7e00;
    if (std::isinf(x)) return sign | 0x7c00;
    int exponent;
    const float size = std::abs(x), fraction = std::frexp(size, &exponent);
    if (size < 0x1p-14f) return sign | uint16_t(std::lrint(std::ldexp(size, 24)));
    return sign | uint16_t(((exponent + 14) << 10) + std::lrint(std::ldexp(fraction, 11)) - 1024);
}

inline float from_half(uint16_t half, DType dtype) {
    if (dtype == DType::BF16) {
        const uint32_t bits = uint32_t(half) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float size =
        exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
    return half & 0x8000 ? -size : size;
}

// Columns [begin, end) of a matrix as elements of a dtype, rows `stride` apart.
class Elements {
  public:
    Elements(const float* data, int64_t rows, int64_t width, int64_t begin, int64_t end,
             int64_t stride, DType dtype)
        : stride(stride), size_(dtype == DType::F32 ? 4 : 2) {
        const int64_t cols = end - begin, count = rows && cols ? (rows - 1) * stride + cols : 0;
        if (!count) return;
        bytes_.reset(new char[count * size_]);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = i / stride, c = i % stride;
            const float x = c < cols ? data[row * width + begin + c] : NAN;
            const uint16_t half = to_half(x, dtype);
            std::memcpy(bytes_.get() + i * size_, size_ == 4 ? (const void*)&x : &half, size_);
        }
    }
    const void* row(int64_t row) const {
        return bytes_ ? bytes_.get() + row * stride * size_ : nullptr;
    }
    const int64_t stride;

  private:
    const int64_t size_;
    std::unique_ptr<char[]> bytes_;
};

struct Table {
    int64_t n, width;
    DType dtype;
    std::vector<float> values;  // [n, width], as the dtype holds them

    void set(int64_t row, int64_t column, float x) {
        values[row * width + column] =
            dtype == DType::F32 ? x : from_half(to_half(x, dtype), dtype);
    }
    const float* row(int64_t row) const { return values.data() + row * width; }
};

// Clusters whose first columns say most; an eighth of the rows are copies of others, one is 0.
inline Table make_table(int64_t n, int64_t width, DType dtype, std::mt19937& random) {
    constexpr int64_t CENTRES = 9;
    Table table = {n, width, dtype, std::vector<float>(n * width)};
    std::vector<float> centres(CENTRES * width);
    for (float& x : centres) x = uniform(random);
    for (int64_t row = 0; row < n; ++row) {
        const float* centre = centres.data() + random() % CENTRES * width;
        for (int64_t c = 0; c < width; ++c)
            table.set(row, c, (centre[c] + 0.5f * uniform(random)) / (1.0f + 0.3f * float(c)));
        const int64_t other = random() % (row + 1);
        if (random() % 8 == 0)
            std::copy_n(table.row(other), width, table.values.begin() + row * width);
    }
    if (n > 3) std::fill_n(table.values.begin() + 3 * width, width, 0.0f);
    return table;
}

// The table's rows times the factors, which repeat.
inline Table scaled(const Table& table, const std::vector<float>& factors, DType dtype) {
    Table out = {table.n, table.width, dtype, table.values};
    for (int64_t row = 0; row < table.n; ++row)
        for (int64_t c = 0; c < table.width; ++c)
            out.set(row, c, table.row(row)[c] * factors[row % factors.size()]);
    return out;
}

// Rows of a table, distorted; the third is 0. In memory they are further apart than they are wide.
class QueryRows {
  public:
    QueryRows(const Table& table, int64_t n, std::mt19937& random)
        : QueryRows(table.width, distorted(table, n, random)) {}
    QueryRows(int64_t width_, std::vector<float> values_)
        : width(width_), values(std::move(values_)) {
        const int64_t n = values.size() / width;
        elements_.reset(new Elements(values.data(), n, width, 0, width, width + 3, DType::F32));
        queries = {static_cast<const float*>(elements_->row(0)), n, width + 3};
    }
    const float* row(int64_t q) const { return values.data() + q * width; }
    Queries some(int64_t first, int64_t n) const {
        return {queries.data + first * queries.stride, n, queries.stride};
    }
    const int64_t width;
    std::vector<float> values;
    Queries queries;

  private:
    static std::vector<float> distorted(const Table& table, int64_t n, std::mt19937& random) {
        std::vector<float> values;
        for (int64_t q = 0; q < n; ++q) {
            const float* row = table.row(random() % table.n);
            for (int64_t c = 0; c < table.width; ++c)
                values.push_back(
                    q == 2 ? 0.0f : row[c] + 0.1f * uniform(random) / (1.0f + 0.3f * float(c)));
        }
        return values;
    }
    std::unique_ptr<Elements> elements_;
};

// How rows are laid out, as mrl_fast.search.index.blocks does it; a prefix of 0 is row-major
// without stats.
struct Layout {
    int64_t prefix;
    bool coded;
};

// A table's rows in spans of their own, stored `batch` at a time.
class Database {
  public:
    Database(const Table& table, Layout layout, const std::vector<int64_t>& spans, int64_t batch,
             const Kernels& kernels, int threads, const Ladder& ladder = {}) {
        rows = {{},
                layout.coded ? 0 : layout.prefix,
                layout.coded ? layout.prefix : 0,
                table.dtype,
                {},
                ladder};
        for (int64_t level = layout.prefix; level && level < table.width; level *= 2)
            rows.levels.push_back(level);
        int64_t first = 0;
        for (int64_t n : spans) {
            append(table, first, n, batch, kernels, threads);
            first += n;
        }
        CHECK_EQUAL(first, table.n);
    }

    struct Block {
        Elements suffix;
        std::vector<float> packed, stats, tile_stats;
        std::vector<uint8_t> codes, signs, nibbles, lows;
    };
    Rows rows;
    std::deque<Block> blocks;

  private:
    void append(const Table& table, int64_t first, int64_t n, int64_t batch, const Kernels& kernels,
                int threads) {
        const float* data = table.row(first);
        const int64_t width = table.width, packed = rows.packed_dim, code = rows.code_dim;
        const int64_t tiles = (n + TILE - 1) / TILE;
        const Ladder& ladder = rows.ladder;
        const bool laddered = !ladder.dims.empty(), stats = packed || code || laddered;
        const int64_t kinds = laddered ? SIGN_FACTOR + 3 * int64_t(ladder.dims.size())
                                       : TAIL_NORM + int64_t(rows.levels.size()),
                      steps = laddered ? (width + 15) / 16 * 2 : 0;
        blocks.push_back({{data, n, width, packed, width, width - packed + 5, table.dtype},
                          std::vector<float>(tiles * packed * TILE, NAN),
                          std::vector<float>(stats ? kinds * n : 0, NAN),
                          std::vector<float>(laddered ? tiles * TILE_STATS : 0, NAN),
                          std::vector<uint8_t>(tiles * ((code + 3) / 4) * TILE * 4, 0xab),
                          std::vector<uint8_t>(tiles * steps * TILE, 0xab),
                          std::vector<uint8_t>(tiles * steps * TILE * 4, 0xab),
                          std::vector<uint8_t>(tiles * steps * TILE * 4, 0xab)});
        Block& to = blocks.back();
        const Elements from(data, n, width, 0, width, width + 1, table.dtype);
        for (int64_t begin = 0; stats && begin < n; begin += batch)
            CHECK(store({kernels, threads}, rows,
                        {from.row(begin), table.dtype, from.stride, std::min(batch, n - begin),
                         width},
                        begin,
                        {packed ? to.packed.data() : nullptr, code ? to.codes.data() : nullptr,
                         to.stats.data(), n, nullptr, 0, laddered ? to.signs.data() : nullptr,
                         to.nibbles.data(), to.lows.data(), to.tile_stats.data()}) == Status::OK);
        rows.spans.push_back({first, n, to.packed.data(), to.codes.data(), to.suffix.row(0),
                              to.suffix.stride, to.stats.data(), n, nullptr, to.signs.data(),
                              to.nibbles.data(), to.lows.data(), to.tile_stats.data()});
    }
};

// Some spans of n rows, the last tiles of which are partial.
inline std::vector<int64_t> split(int64_t n) {
    if (n < 65) return {n};
    return {n / 3, 1, n - n / 3 - 1};
}

struct Found {
    std::vector<float> scores;  // [queries, k]
    std::vector<int64_t> ids;
    bool operator==(const Found& other) const {
        return ids == other.ids && same_bits(scores, other.scores);
    }
};
inline std::ostream& operator<<(std::ostream& out, const Found& found) {
    for (size_t i = 0; i < std::min<size_t>(found.ids.size(), 8); ++i)
        out << found.ids[i] << " (" << found.scores[i] << ") ";
    return out << "... ";
}

inline Found room_for(int64_t queries, int64_t k) {
    return {std::vector<float>(queries * k, NAN), std::vector<int64_t>(queries * k, -7)};
}

// The results where nothing is found.
inline Found none(int64_t queries, int64_t k) {
    return {std::vector<float>(queries * k, -INFINITY), std::vector<int64_t>(queries * k, -1)};
}

inline std::vector<int64_t> all_rows(int64_t n) {
    std::vector<int64_t> rows(n);
    std::iota(rows.begin(), rows.end(), 0);
    return rows;
}

// The k best of one query's candidates by (score descending, row ascending), padded.
template <class Score>
void keep_best(std::vector<int64_t>* rows, int64_t k, const Score& score) {
    std::sort(rows->begin(), rows->end(), [&](int64_t a, int64_t b) {
        const auto at = score(a), bt = score(b);
        return at > bt || (at == bt && a < b);
    });
    rows->resize(std::min<int64_t>(rows->size(), k));
}
