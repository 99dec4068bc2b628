// Tiles, codes and norms against their definitions, whatever pieces rows are stored in.
#include "vectors.h"

namespace {

void check_packed(const Table& table, const Rows& rows, const Database::Block& block) {
    for (int64_t row = 0;
         row < int64_t(block.packed.size()) / std::max<int64_t>(rows.packed_dim, 1); ++row)
        for (int64_t c = 0; c < rows.packed_dim; ++c) {
            const int64_t at = (row / TILE * rows.packed_dim + c) * TILE + row % TILE;
            CHECK_EQUAL(block.packed[at], row < table.n ? table.row(row)[c] : 0.0f);
        }
}

// An upper bound, but hardly larger than the value.
void check_above(double bound, double value, double slack) {
    CHECK(bound >= value);
    CHECK_NEAR(bound, value, value * 4.0 * ROUNDING + slack);
}

double norm(const float* x, int64_t begin, int64_t end) {
    double sum = 0.0;
    for (int64_t c = begin; c < end; ++c) sum += double(x[c]) * x[c];
    return std::sqrt(sum);
}

void check_stats(const Table& table, const Rows& rows, const Database::Block& block) {
    const int64_t prefix = std::max(rows.packed_dim, rows.code_dim);
    for (int64_t row = 0; row < table.n; ++row) {
        const float *stats = block.stats.data() + row, *x = table.row(row);
        check_above(stats[PREFIX_NORM * table.n], norm(x, 0, prefix), 0.0);
        for (size_t l = 0; l < rows.levels.size(); ++l)
            check_above(stats[(TAIL_NORM + l) * table.n], norm(x, rows.levels[l], table.width),
                        0.0);
        if (!rows.code_dim) continue;
        const double unit = stats[CODE_SCALE * table.n];
        const int64_t quads = (rows.code_dim + 3) / 4;
        double error = 0.0;
        for (int64_t c = 0; c < quads * 4; ++c) {
            const int64_t at = ((row / TILE * quads + c / 4) * TILE + row % TILE) * 4 + c % 4;
            const double value = c < rows.code_dim ? x[c] : 0.0;
            const double rest = value - unit * (int(block.codes[at]) - 128);
            CHECK(std::abs(rest) <= unit * 0.50001);
            error += rest * rest;
        }
        check_above(stats[CODE_ERROR * table.n], std::sqrt(error), 1e-44);
    }
}

void check_pieces(const Kernels& kernels, std::mt19937& random) {
    for (DType dtype : DTYPES)
        for (bool coded : {false, true}) {
            const Table table = make_table(150, coded ? 37 : 29, dtype, random);
            const Layout layout = {coded ? 18 : 13, coded};
            const Database whole(table, layout, {table.n}, table.n, kernels, 1);
            const Database::Block& block = whole.blocks.front();
            check_packed(table, whole.rows, block);
            check_stats(table, whole.rows, block);
            for (int64_t batch : {1, 7, 63, 65}) {
                const Database pieces(table, layout, {table.n}, batch, kernels, 1);
                const Database::Block& other = pieces.blocks.front();
                CHECK(other.packed == block.packed);
                CHECK(same_bits(other.stats, block.stats));
                CHECK(other.codes == block.codes);
            }
        }
}

// The other columns, row-major, whatever pieces rows are stored in; the gaps between rows are not
// written.
void check_suffix(const Kernels& kernels, std::mt19937& random) {
    for (DType dtype : DTYPES) {
        const int64_t n = 150, width = 29, packed = 13, stride = width - packed + 3;
        const int64_t size = dtype == DType::F32 ? 4 : 2;
        const Table table = make_table(n, width, dtype, random);
        const Elements from(table.row(0), n, width, 0, width, width + 1, dtype);
        const Rows rows = {{}, packed, 0, dtype, {}};
        std::vector<char> right(n * stride * size, 0x5a);
        for (int64_t row = 0; row < n; ++row)
            std::memcpy(right.data() + row * stride * size,
                        static_cast<const char*>(from.row(row)) + packed * size,
                        (width - packed) * size);
        for (int64_t batch : {7, 65, 150}) {
            std::vector<char> suffix(right.size(), 0x5a);
            for (int64_t begin = 0; begin < n; begin += batch)
                CHECK(
                    store({kernels, 1}, rows,
                          {from.row(begin), dtype, from.stride, std::min(batch, n - begin), width},
                          begin,
                          {nullptr, nullptr, nullptr, 0, suffix.data(), stride}) == Status::OK);
            CHECK(suffix == right);
        }
    }
}

void check_not_finite(const Kernels& kernels, std::mt19937& random) {
    for (DType dtype : DTYPES) {
        const int64_t n = 70, packed = 11, width = 13;
        const Rows rows = {{}, packed, 0, dtype, {}};
        std::vector<float> tiles(2 * packed * TILE);
        for (float bad : {NAN, INFINITY, -INFINITY})
            for (int64_t row : {int64_t(0), int64_t(7), n - 1})
                for (int64_t c : {int64_t(0), packed - 1}) {
                    Table table = make_table(n, width, dtype, random);
                    table.set(row, c, bad);
                    const Elements from(table.row(0), n, width, 0, width, width, dtype);
                    CHECK(store({kernels, 1}, rows, {from.row(0), dtype, width, n, width}, 0,
                                {tiles.data(), nullptr, nullptr, 0, nullptr, 0}) ==
                          Status::NOT_FINITE);
                }
    }
}

}  // namespace

void test_store() {
    std::mt19937 random(1);
    for (const Kernels* kernels : tested_kernels()) {
        if (RACES_ONLY) break;
        scenario = std::string("store, ") + kernels->name;
        check_pieces(*kernels, random);
        check_suffix(*kernels, random);
        check_not_finite(*kernels, random);
    }
    scenario = "store, two threads";
    const Table table = make_table(2600, 200, DType::F32, random);  // worth two threads
    for (bool coded : {false, true}) {
        const Kernels& kernels = *tested_kernels().front();
        const Database alone(table, {20, coded}, {table.n}, table.n, kernels, 1);
        const Database both(table, {20, coded}, {table.n}, table.n, kernels, 2);
        CHECK(alone.blocks[0].packed == both.blocks[0].packed);
        CHECK(same_bits(alone.blocks[0].stats, both.blocks[0].stats));
        CHECK(alone.blocks[0].codes == both.blocks[0].codes);
    }
}
