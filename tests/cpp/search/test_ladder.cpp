// Codes of one, four and eight bits: what they stand for, how kernels sum them, and certified exact
// search by them.
#include "cpu/search/scan.h"
#include "search/exact.h"
#include "search/ladder.h"

namespace {

// The statistics of a row against their definitions; norms are upper bounds, but hardly larger.
void check_row(const Setup& setup, const Table& table, const Database::Block& block, int64_t row) {
    const float *stats = block.stats.data() + row, *x = table.row(row);
    const auto stat = [&](int64_t which) { return double(stats[which * table.n]); };
    const MetricTerms& terms = terms_of(setup.ladder.metric);
    // What the statistics are divided by. Those of a row of norm 0 say nothing.
    double length = 0.0;
    for (int64_t c = 0; c < WIDTH; ++c) length += double(x[c]) * x[c];
    length = terms.normalized ? std::sqrt(length) : 1.0;
    const double unit = stat(CODE_SCALE) * length;
    if (length == 0.0) return CHECK_EQUAL(stat(CODE_ERROR), 0.0);
    const std::vector<double> beside_centre = setup.coded(x);
    double error = 0.0, low_error = 0.0, coded = 0.0, square = 0.0, beside = 0.0, along = 0.0,
           of_centre = 0.0, largest = 0.0;
    int64_t place = 0;
    for (int64_t c = 0; c < WIDTH; ++c) {
        const Code code = code_of(block, row, c);
        const double y = beside_centre[c], four = (code.nibble - 7.5) * unit,
                     eight = four + (code.low - 7.5) * unit / 16;
        CHECK_EQUAL(code.sign, code.nibble >= 8);
        if (std::abs(y) <= 8.00001 * unit) {
            CHECK(std::abs(y - four) <= 0.50001 * unit + 2e-6);
            CHECK(std::abs(y - eight) <= 0.50001 * unit / 16 + 2e-6);
        } else {
            CHECK_EQUAL(code.nibble, y > 0 ? 15 : 0);
            CHECK_EQUAL(code.low, y > 0 ? 15 : 0);
        }
        largest = std::max(largest, std::abs(y));
        error += (y - four) * (y - four);
        low_error += (y - eight) * (y - eight);
        coded += std::max(four * four, eight * eight);
        square += double(x[c]) * x[c];
        beside += y * y;
        along += code.sign ? y : -y;
        of_centre += setup.of(c) * x[c];
        if (c + 1 != DIMS[place]) continue;
        if (beside == 0.0) {
            CHECK_EQUAL(stat(SIGN_FACTOR + place++), 0.0);
            continue;
        }
        const double over = terms.normalized ? std::sqrt(square) : 1.0,
                     own = terms.squares > 0.0f ? beside : of_centre;
        CHECK_NEAR(stat(SIGN_FACTOR + place), beside / along / over, 1e-5 * beside / along);
        CHECK_NEAR(stat(SIGN_FACTOR + 3 + place), own / over, 1e-5 * std::abs(own / over) + 1e-12);
        if (terms.normalized) CHECK_NEAR(stat(SIGN_FACTOR + 6 + place), 1 / over, 1e-6 / over);
        ++place;
    }
    const auto above = [&](int which, double value, double slack) {
        CHECK(stat(which) >= value);
        CHECK_NEAR(stat(which), value, value * slack + 1e-5 * std::sqrt(square) / length);
    };
    const double reach = std::min(largest, 2.7 * std::sqrt(beside / WIDTH));
    CHECK(8 * unit >= reach * 0.9999 && 8 * unit <= largest * 1.0001);
    above(PREFIX_NORM, std::sqrt(square), 2e-5);
    above(CODE_ERROR, std::sqrt(error) / length, 1e-4);
    above(LOW_ERROR, std::sqrt(low_error) / length, 1e-3);
    const float* tile = block.tile_stats.data() + row / TILE * TILE_STATS;
    CHECK(tile[CODE_NORM] >= std::sqrt(coded) / length * (1 - 1e-6));
    CHECK(tile[ROUNDED_NORM] >= (std::sqrt(coded) + std::sqrt(square)) / length * (1 - 1e-6));
}

// A scan's sums over a prefix of every row, against sums made of the codes.
void check_sums(const Setup& setup, const Table& table, const Database& database,
                const Kernels& kernels, Source source, int64_t dim, std::mt19937& random) {
    for (int64_t count : {1, 2, 5, 6, 13}) {
        const QueryRows queries(table, count, random);
        std::vector<Entry> entries(count * table.n);
        std::vector<int64_t> counts(count);
        CHECK(scan_all({kernels, 1}, database.rows, queries.queries,
                       {setup.ladder.metric, source, dim, table.n, 1}, entries.data(),
                       counts.data()) == Status::OK);
        for (int64_t q = 0; q < count; ++q) {
            std::vector<float> less(dim);
            centred(queries.row(q), setup.ladder.centre, dim, less.data());
            rotate(setup.ladder, dim, less.data());
            const CodedQuery coded = code_query(kernels, source, less.data(), dim);
            const Codes eights = encode(less.data(), dim);
            CHECK_EQUAL(counts[q], table.n);
            for (int64_t i = 0; i < table.n; ++i) {
                const Entry& entry = entries[q * table.n + i];
                const int64_t row = row_of(entry.key);
                const Database::Block& block = database.blocks[0];
                double sum = 0.0;
                for (int64_t c = 0; c < dim; ++c) {
                    const Code code = code_of(block, row, c);
                    sum += source == Source::SIGNS ? (code.sign ? less[c] : -less[c])
                                                   : (code.nibble - 7.5) * eights.codes[c];
                }
                if (source == Source::SIGNS)  // a table's entry is to within half a unit
                    CHECK_NEAR(entry.partial * coded.scale, sum, coded.scale * (dim + 8) / 8);
                else
                    CHECK_EQUAL(double(entry.partial), sum);
            }
        }
    }
}

// Codes and statistics have the same bits whatever kernels make them, of whatever pieces.
void check_bits(const Setup& setup, const Table& table) {
    const auto stored = [&](const Kernels& kernels, int64_t batch) {
        return Database(table, {0, false}, {table.n}, batch, kernels, 1, setup.ladder);
    };
    const Database right = stored(portable_kernels(), table.n);
    const Database::Block& block = right.blocks[0];
    for (const Kernels* kernels : tested_kernels())
        for (int64_t batch : {int64_t(1), int64_t(37), table.n}) {
            scenario = std::string("bits of codes, ") + kernels->name;
            const Database found = stored(*kernels, batch);
            const Database::Block& other = found.blocks[0];
            CHECK(other.signs == block.signs);
            CHECK(other.nibbles == block.nibbles);
            CHECK(other.lows == block.lows);
            CHECK(same_bits(other.stats, block.stats));
            CHECK(same_bits(other.tile_stats, block.tile_stats));
        }
}

// Rotated vectors are right, but for a part of the room that bounds have for it.
void check_rotation(const Setup& setup, const Table& table) {
    for (int64_t row = 0; row < table.n; ++row) {
        std::vector<float> y(WIDTH);
        centred(table.row(row), setup.ladder.centre, WIDTH, y.data());
        const std::vector<double> right = setup.turned({y.begin(), y.end()});
        rotate(setup.ladder, WIDTH, y.data());
        double error = 0.0, square = 0.0;
        for (int64_t c = 0; c < WIDTH; ++c) {
            error += (y[c] - right[c]) * (y[c] - right[c]);
            square += right[c] * right[c];
        }
        CHECK(std::sqrt(error) <= ROTATION_ROUNDING / 8 * std::sqrt(square));
    }
}

void check_codes(std::mt19937& random) {
    for (Metric metric : METRICS)
        for (const Frame& frame : FRAMES) {
            const Setup setup(metric, frame, random);
            const Table table = rows_beside(setup, 150, random);
            check_bits(setup, table);
            check_rotation(setup, table);
            for (const Kernels* kernels : tested_kernels()) {
                scenario = std::string("codes, ") + kernels->name;
                const Database database(table, {0, false}, {table.n}, 37, *kernels, 1,
                                        setup.ladder);
                for (int64_t row = 0; row < table.n; ++row)
                    check_row(setup, table, database.blocks[0], row);
                for (int64_t dim : DIMS)
                    check_sums(setup, table, database, *kernels, Source::SIGNS, dim, random);
                check_sums(setup, table, database, *kernels, Source::NIBBLES, WIDTH, random);
            }
        }
}

void set_row(Table* table, int64_t row, const std::vector<float>& x) {
    for (int64_t c = 0; c < WIDTH; ++c) table->set(row, c, x[c]);
}

// Rows, some of which lie as far beyond what their codes of so many bits stand for as they can, in
// the query's direction: only a bound with the whole error keeps them.
Table along_the_error(const Setup& setup, const float* query, int bits, int64_t n,
                      std::mt19937& random) {
    Table table = rows_beside(setup, n, random);
    const std::vector<double> p = setup.coded(query);
    for (int64_t row = 0; row < n; row += 3) {
        std::vector<double> y = setup.coded(table.row(row));
        double largest = 0.0;
        for (double value : y) largest = std::max(largest, std::abs(value));
        const double unit = largest / double(1 << (bits - 1));
        for (int64_t c = 0; c < WIDTH; ++c)
            if (std::abs(y[c]) != largest)
                y[c] = (std::floor(y[c] / unit) + (p[c] > 0.0 ? 0.98 : 0.02)) * unit;
        set_row(&table, row, setup.vector_of(y));
    }
    return table;
}

// Queries that are so much of a code longer in every column than what their codes stand for: 0, so
// that only rows' codes err, or nearly half.
Table queries_of_codes(const Setup& setup, int64_t n, float more, std::mt19937& random) {
    Table table = make_table(n, WIDTH, DType::F32, random);
    for (int64_t row = 0; row < n; ++row) {
        std::vector<double> p;
        for (int64_t c = 0; c < WIDTH; ++c) {
            const float code = c == row ? 127.0f : std::round(100.0f * uniform(random));
            const float longer = c == row ? 0.0f : std::copysign(more, code);
            p.push_back((code + longer) / 128.0f);
        }
        set_row(&table, row, setup.vector_of(p));
    }
    return table;
}

// Rows of many directions about the queries', and but for one column what eight bits stand for:
// only a bound with the whole error of the query keeps them.
Table along_the_queries(const Setup& setup, const Table& queries, int64_t n, std::mt19937& random) {
    Table table = make_table(n, WIDTH, DType::F32, random);
    for (int64_t row = 0; row < n; ++row) {
        std::vector<double> y = setup.coded(queries.row(row % queries.n));
        for (int64_t c = 0; c < WIDTH; ++c) {
            const double level = std::floor(100.0 * y[c] + 30.0f * uniform(random));
            y[c] = c == row % WIDTH ? 1.0 : (level + 0.5) / 128.0;
        }
        set_row(&table, row, setup.vector_of(y));
    }
    return table;
}

// What kind of codes err: those of rows, of so many bits, or for 0 those of queries.
void check_exact(int bits, std::mt19937& random) {
    Visits visits = {};
    for (Metric metric : EVERY_METRIC)
        for (const Frame& frame : FRAMES) {
            Setup setup(metric, frame, random);
            for (float& x : setup.centre) x = std::round(16.0f * x) / 16.0f;  // sums are exact
            const Table asked = queries_of_codes(setup, 9, bits ? 0.0f : 0.48f, random);
            const QueryRows queries(WIDTH, asked.values);
            const Table table = bits ? along_the_error(setup, queries.row(0), bits, 700, random)
                                     : along_the_queries(setup, asked, 700, random);
            const std::vector<double> scores = scores64(table, queries, metric);
            std::vector<double> first(scores.begin(), scores.begin() + table.n);
            std::sort(first.rbegin(), first.rend());
            const double threshold = (first[6] + first[7]) / 2;
            for (const Kernels* kernels : tested_kernels())
                for (int threads : THREADS) {
                    scenario = std::string("exact by codes, ") + kernels->name + ", metric " +
                               std::to_string(int(metric)) + ", bits " + std::to_string(bits);
                    const Database database(table, {0, false}, split(table.n), 77, *kernels, 1,
                                            setup.ladder);
                    for (int64_t k : {1, 3, 5})
                        check_found(find_exact(*kernels, database.rows, queries, metric, k, threads,
                                               &visits),
                                    brute_force(scores, 9, table.n, all_rows(table.n), k));
                    // Bounds serve every query of a range search, whatever they drop.
                    check_range({*kernels, threads}, database.rows, queries.queries, metric, WIDTH,
                                threshold, scores,
                                rows_in_range(scores, 9, table.n, all_rows(table.n), threshold));
                }
        }
    scenario = "exact by codes";
    CHECK(3 * visits.pruned > visits.full);
}

}  // namespace

void test_ladder() {
    std::mt19937 random(11);
    if (!RACES_ONLY) check_codes(random);
    for (int bits : {0, 4, 8}) check_exact(bits, random);
}
