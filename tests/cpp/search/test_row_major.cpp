// Few queries over row-major rows: the bits that a scan of packed tiles gives, whatever the data;
// and the list decides where nothing ties.
#include "cpu/search/scan.h"
#include "vectors.h"

namespace {

constexpr int64_t ROWS = 600;

// Rows that differ by about what fp32 sums of them are off.
Table rounded_apart(int64_t width, DType dtype, std::mt19937& random) {
    const Table centre = make_table(8, width, DType::F32, random);
    Table table = make_table(ROWS, width, dtype, random);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t c = 0; c < width; ++c)
            table.set(row, c, centre.row(7)[c] * (1.0f + 0x1p-22f * uniform(random)));
    return table;
}

Table one_long(int64_t width, DType dtype, std::mt19937& random) {
    Table table = make_table(ROWS, width, dtype, random);
    for (int64_t c = 0; c < width; ++c) table.set(401, c, 3e4f * uniform(random));
    return table;
}

struct Scene {
    const Kernels& kernels;
    Metric metric;
    int64_t packed;
};

// Rows whose squares are about as small as fp32 numbers get.
Table tiny(int64_t width, DType dtype, std::mt19937& random) {
    Table table = make_table(ROWS, width, dtype, random);
    std::vector<float> centre(width);
    for (float& x : centre) x = uniform(random) + uniform(random);
    for (int64_t row = 0; row < ROWS; ++row) {
        const float size = 1e-19f * (2.0f + uniform(random));
        for (int64_t c = 0; c < width; ++c)
            table.set(row, c, size * centre[c] * (1.0f + 0.03f * uniform(random)));
    }
    return table;
}

// Denormals are 0 while it lives, where a processor can do that.
struct FlushDenormals {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    explicit FlushDenormals(bool flush) {
        if (flush) __builtin_ia32_ldmxcsr(before | 0x8040);
    }
    ~FlushDenormals() { __builtin_ia32_ldmxcsr(before); }
#else
    explicit FlushDenormals(bool) {}
#endif
};

// How many of the queries the list decided.
int64_t check(const Scene& scene, const Table& table, int64_t count, int64_t k,
              std::mt19937& random) {
    const auto& [kernels, metric, packed] = scene;
    const int64_t dim = table.width - 1;
    const bool few_rows = count == 1;
    const QueryRows queries(make_table(40, table.width, DType::F32, random), count, random);
    const Database database(table, {packed, false}, split(ROWS), 77, kernels, 1);
    Rows rows = database.rows;
    if (few_rows)
        for (int64_t row = 0; row < ROWS; row += 1 + row % 2) rows.gathered_rows.push_back(row);
    const int64_t all = few_rows ? rows.gathered_rows.size() : ROWS;
    const FirstStage stage = {metric, terms_of(metric).source, dim, k, 1},
                     whole = {metric, stage.source, dim, all, 1};
    std::vector<Entry> right(count * all), found(count * k), mine(count * k);
    std::vector<int64_t> counts(count);
    for (int threads : THREADS) {
        const Run run = {kernels, threads};
        // Every row is wanted, so that tiles are packed.
        CHECK(scan_all(run, rows, queries.queries, whole, right.data(), counts.data()) ==
              Status::OK);
        CHECK(scan_all(run, rows, queries.queries, stage, found.data(), counts.data()) ==
              Status::OK);
        for (int64_t q = 0; q < count; ++q) {
            CHECK_EQUAL(counts[q], k);
            for (int64_t i = 0; i < k; ++i) {
                const Entry &a = found[q * k + i], &b = right[q * all + i];
                CHECK_EQUAL(row_of(a.key), row_of(b.key));
                CHECK_EQUAL(a.key, b.key);
                CHECK_EQUAL(a.partial, b.partial);
                if (terms_of(metric).normalized) CHECK_EQUAL(a.sqnorm, b.sqnorm);
            }
        }
    }
    return count - int64_t(scan_row_major({kernels, THREADS[0]}, rows, queries.queries, stage,
                                          mine.data(), counts.data())
                               .size());
}

}  // namespace

void test_row_major() {
    std::mt19937 random(11);
    int64_t decided = 0, ordinary = 0;
    for (const Kernels* kernels : tested_kernels())
        for (DType dtype : DTYPES)
            for (Metric metric : EVERY_METRIC)
                for (const auto& [packed, width] :
                     {std::pair<int64_t, int64_t>(0, 142), {13, 161}}) {
                    const Table tables[] = {
                        make_table(ROWS, width, dtype, random), rounded_apart(width, dtype, random),
                        one_long(width, dtype, random), tiny(width, dtype, random)};
                    for (int kind = 0; kind < 4; ++kind)
                        for (const auto& [count, k] :
                             {std::pair<int64_t, int64_t>(1, 1), {7, 9}, {2, 5}}) {
                            scenario = std::string("row major, ") + kernels->name + ", dtype " +
                                       std::to_string(int(dtype)) + ", metric " +
                                       std::to_string(int(metric)) + ", width " +
                                       std::to_string(width) + ", kind " + std::to_string(kind) +
                                       ", queries " + std::to_string(count);
                            const FlushDenormals flush(kind == 3);
                            const int64_t did =
                                check({*kernels, metric, packed}, tables[kind], count, k, random);
                            if (kind > 0) continue;
                            decided += did;
                            ordinary += count;
                        }
                }
    // An eighth of the rows are copies of others, and one query in a few is 0.
    scenario = "row major, all";
    CHECK(2 * decided > ordinary);
}
