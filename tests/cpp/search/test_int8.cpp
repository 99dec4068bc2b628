// Rows of codes with a scale each: stored from fp32, or as they are; then searched as the fp32 rows
// that they stand for.
#include <cfloat>

#include "search/exact.h"

namespace {

constexpr int64_t PREFIX = 10;

// A table's rows as codes, in one span.
struct Coded {
    Coded(const Table& table, bool coded, const Ladder& ladder, int64_t batch,
          const Kernels& kernels)
        : n(table.n), stride(table.width + SCALE_BYTES + 3), suffix(n * stride - 3) {
        const int64_t width = table.width, tiles = (n + TILE - 1) / TILE;
        const int64_t dims = ladder.dims.size(), steps = (width + 15) / 16 * 2;
        rows = {{}, 0, coded ? PREFIX : 0, DType::I8, {}, ladder, width};
        if (!dims) rows.levels = {coded ? PREFIX : 0};
        stats.assign((dims ? SIGN_FACTOR + 3 * dims : TAIL_NORM + 1) * n, NAN);
        codes.resize(tiles * (PREFIX + 3) / 4 * 4 * TILE);
        for (auto* each : {&signs, &nibbles, &lows}) each->resize(tiles * steps * TILE * 4);
        tile_stats.resize(tiles * TILE_STATS);
        for (int64_t begin = 0; begin < n; begin += batch)
            put(kernels, {table.row(begin), DType::F32, width, std::min(batch, n - begin), width},
                begin);
        rows.spans.push_back({0, n, nullptr, codes.data(), suffix.data(), stride, stats.data(), n,
                              nullptr, signs.data(), nibbles.data(), lows.data(),
                              tile_stats.data()});
    }
    void put(const Kernels& kernels, const NewRows& vectors, int64_t begin) {
        const bool laddered = !rows.ladder.dims.empty();
        CHECK(store({kernels, 1}, rows, vectors, begin,
                    {nullptr, rows.code_dim ? codes.data() : nullptr, stats.data(), n,
                     suffix.data(), stride, laddered ? signs.data() : nullptr, nibbles.data(),
                     lows.data(), tile_stats.data()}) == Status::OK);
    }
    float scale(int64_t row) const {
        float scale;
        std::memcpy(&scale, suffix.data() + row * stride, sizeof scale);
        return scale;
    }
    int code(int64_t row, int64_t c) const { return suffix[row * stride + SCALE_BYTES + c]; }
    // What the codes stand for.
    Table table() const {
        Table out = {n, rows.width, DType::F32, {}};
        for (int64_t row = 0; row < n; ++row)
            for (int64_t c = 0; c < rows.width; ++c)
                out.values.push_back(float(code(row, c)) * scale(row));
        return out;
    }
    const int64_t n, stride;
    std::vector<int8_t> suffix;
    std::vector<float> stats, tile_stats;
    std::vector<uint8_t> codes, signs, nibbles, lows;
    Rows rows;
};

void check_codes(const Table& table, const Coded& coded) {
    for (int64_t row = 0; row < table.n; ++row) {
        const float* x = table.row(row);
        float largest = 0.0f;
        for (int64_t c = 0; c < table.width; ++c) largest = std::max(largest, std::abs(x[c]));
        CHECK_EQUAL(coded.scale(row), largest < 2e-36f ? 0.0f : largest / 127.0f);
        const double half = 0.50001 * double(coded.scale(row));
        for (int64_t c = 0; c < table.width && coded.scale(row) > 0.0f; ++c) {
            CHECK(std::abs(coded.code(row, c)) <= 127);
            CHECK_NEAR(double(coded.code(row, c)) * double(coded.scale(row)), x[c], half);
        }
    }
}

void check_extremes(const Kernels& kernels, std::mt19937& random) {
    Table table = make_table(70, 21, DType::F32, random);
    for (int64_t c = 0; c < table.width; ++c) {
        table.set(5, c, 1e-38f);
        table.set(6, c, 1e-42f);
        table.set(7, c, c % 2 ? FLT_MAX : -FLT_MAX);
    }
    const Table held = Coded(table, false, {}, 70, kernels).table();
    for (int64_t c = 0; c < table.width; ++c) {
        CHECK_EQUAL(held.row(5)[c], 0.0f);
        CHECK_EQUAL(held.row(6)[c], 0.0f);
        CHECK(std::isfinite(held.row(7)[c]));
        CHECK_NEAR(held.row(7)[c], table.row(7)[c], 1e-6 * double(FLT_MAX));
    }
}

void check_searches(const Coded& coded, Metric metric, const Kernels& kernels,
                    std::mt19937& random) {
    const Table held = coded.table();
    const Database plain(held, {0, false}, {held.n}, held.n, kernels, 1);
    for (int64_t count : {1, 9}) {
        const QueryRows queries(held, count, random);
        for (int64_t k : {int64_t(1), int64_t(8), held.n + 2}) {
            Visits visits;
            const Found right =
                brute_force(scores64(held, queries, metric), count, held.n, all_rows(held.n), k);
            check_found(find_exact(kernels, coded.rows, queries, metric, k, 1, &visits), right);
            for (const std::vector<Stage>& stages :
                 {std::vector<Stage>{{held.width, k}},
                  std::vector<Stage>{{PREFIX + 1, std::max(k, held.n / 2)}, {held.width, k}}}) {
                Found found = room_for(count, k), same = room_for(count, k);
                CHECK(search({kernels, 1}, coded.rows, queries.queries, metric, stages,
                             {found.scores.data(), found.ids.data()}) == Status::OK);
                CHECK(search({kernels, 1}, plain.rows, queries.queries, metric, stages,
                             {same.scores.data(), same.ids.data()}) == Status::OK);
                CHECK_EQUAL(found, same);
            }
        }
    }
}

}  // namespace

void test_int8() {
    std::mt19937 random(21);
    for (const Kernels* kernels : tested_kernels()) {
        scenario = std::string("int8, ") + kernels->name;
        check_extremes(*kernels, random);
        for (Metric metric : METRICS)
            for (int layout : {0, 1, 2})
                for (int64_t n : {1, 65, 700}) {
                    const int64_t width = n == 65 ? 83 : 37;
                    const Table table = make_table(n, width, DType::F32, random);
                    const Ladder ladder = {
                        layout == 2 ? std::vector<int64_t>{PREFIX, width} : std::vector<int64_t>{},
                        nullptr, metric};
                    const Coded coded(table, layout == 1, ladder, 60, *kernels);
                    check_codes(table, coded);
                    Coded moved(table, layout == 1, ladder, 60, *kernels);
                    std::fill(moved.suffix.begin(), moved.suffix.end(), int8_t(0));
                    moved.put(*kernels, {coded.suffix.data(), DType::I8, coded.stride, n, width},
                              0);
                    CHECK(moved.table().values == coded.table().values);
                    CHECK(same_bits(moved.stats, coded.stats));
                    check_searches(coded, metric, *kernels, random);
                }
    }
}
