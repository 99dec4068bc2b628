// A graph: sums over bits, codes of nodes, the same edges by any kernels and threads, and
// shortlists.
#include "cpu/search/graph_builder.h"
#include "search/masks.h"

namespace {

constexpr int64_t WIDTH = 45;

void check_sums(const Kernels& kernels, std::mt19937& random) {
    for (int64_t columns : {1, 15, 16, 63, 64, 65, 130, 256}) {
        const int64_t bytes = query_bytes(columns);
        std::vector<int8_t> query(bytes, 0);
        for (int64_t c = 0; c < columns; ++c) query[c] = int8_t(int(random() % 255) - 127);
        for (int64_t n = 1; n < 10; ++n) {
            std::vector<std::vector<uint8_t>> rows(n, std::vector<uint8_t>(bytes / 8));
            std::vector<const uint8_t*> places;
            for (auto& row : rows) {
                for (uint8_t& byte : row) byte = uint8_t(random());
                places.push_back(row.data());
            }
            places.resize((n + 3) / 4 * 4, places.back());
            std::vector<float> sums(places.size(), NAN);
            kernels.sum_bits(places.data(), n, query.data(), columns, sums.data());
            for (int64_t r = 0; r < n; ++r) {
                int sum = 0;
                for (int64_t c = 0; c < columns; ++c)
                    if (rows[r][c / 8] >> c % 8 & 1) sum += query[c];
                CHECK_EQUAL(sums[r], float(sum));
            }
        }
    }
}

// A graph with its arrays, each as long as it has to be.
struct Built {
    Built(const Run& run, const Rows& rows, Metric metric, const float* centre)
        : edges(rows.count() * DEGREE, 7),
          entries(ENTRIES),
          signs(rows.count() * sign_bytes(WIDTH)),
          nibbles(rows.count() * low_bytes(WIDTH)) {
        GraphBuilder builder(run, rows, metric, centre, WIDTH,
                             {edges.data(), signs.data(), nibbles.data(), entries.data()});
        while (builder.add()) continue;
        CHECK_EQUAL(builder.added(), builder.count());
        entries.resize(builder.finish());
        graph = {rows.count(),
                 WIDTH,
                 centre,
                 signs.data(),
                 nibbles.data(),
                 entries.data(),
                 int64_t(entries.size()),
                 edges.data()};
    }
    std::vector<uint32_t> edges, entries;
    std::vector<uint8_t> signs, nibbles;
    Graph graph;
};

// A node's bits are its signs, and its four bits stand for its columns to within half a step of one
// of the reaches. Both are made as long as the row.
void check_codes(const Built& built, const Table& table, const float* centre) {
    for (int64_t row = 0; row < table.n; ++row) {
        const uint8_t* bits = built.signs.data() + row * sign_bytes(WIDTH) + sizeof(NodeTerms);
        const uint8_t* fours = built.nibbles.data() + row * low_bytes(WIDTH);
        std::vector<float> y(WIDTH);
        centred(table.row(row), centre, WIDTH, y.data());
        double square = 0.0, by_signs = 0.0, by_fours = 0.0;
        float largest = 0.0f;
        for (float value : y)
            square += double(value) * value, largest = std::max(largest, std::abs(value));
        const auto four = [&](int64_t c) {
            return fours[c % low_bytes(WIDTH)] >> (c < low_bytes(WIDTH) ? 0 : 4) & 15;
        };
        const auto error = [&](double reach) {  // the largest of all columns, in steps
            double most = 0.0;
            for (int64_t c = 0; c < WIDTH; ++c) {
                const double inside = std::max(-reach, std::min(reach, double(y[c])));
                most = std::max(most, std::abs((four(c) - 7.5) * reach / 8 - inside) / (reach / 8));
            }
            return most;
        };
        double least = error(largest);
        for (double deviations : {2.0, 2.7, 3.6, 5.0, 7.0}) {
            const double reach = deviations * std::sqrt(square / WIDTH);
            if (reach < largest) least = std::min(least, error(reach));
        }
        if (largest > 1e-20f) CHECK(least <= 0.501);
        for (int64_t c = 0; c < WIDTH; ++c) {
            by_signs += std::abs(double(y[c]));
            by_fours += y[c] * (four(c) - 7.5);
        }
        const NodeTerms& node = built.graph.terms(row);
        if (largest > 1e-20f && std::isfinite(node.factor))
            CHECK(std::abs(node.factor * by_signs - node.scale * by_fours) <=
                  1e-5 * std::abs(node.factor * by_signs));
        for (int64_t c = 0; c < WIDTH; ++c) {
            CHECK_EQUAL(bits[c / 8] >> c % 8 & 1, int(y[c] > 0.0f));
        }
    }
}

double score(const Table& table, Metric metric, const float* q, int64_t row) {
    const MetricTerms& terms = terms_of(metric);
    const float* x = table.row(row);
    double dot = 0.0, qq = 0.0, xx = 0.0;
    for (int64_t c = 0; c < WIDTH; ++c)
        dot += double(q[c]) * x[c], qq += double(q[c]) * q[c], xx += double(x[c]) * x[c];
    const double whole = terms.product * dot - terms.squares * (qq + xx);
    return !terms.normalized ? whole : qq * xx > 0.0 ? whole / std::sqrt(qq * xx) : 0.0;
}

void check_shortlists(const Built& built, const Run& run, const Table& table, const Rows& rows,
                      Metric metric, const std::vector<int64_t>& allowed, std::mt19937& random) {
    const QueryRows queries(table, 9, random);
    const int64_t n = queries.queries.n, eligible = allowed.size();
    for (int64_t keep : {int64_t(64), eligible}) {
        std::vector<Entry> entries(n * 2 * keep);
        std::vector<int64_t> counts(n);
        CHECK(graph_shortlist(run, rows, queries.queries, metric, built.graph, {2 * table.n, keep},
                              entries.data(), counts.data()) == Status::OK);
        int64_t best = 0;
        for (int64_t q = 0; q < n; ++q) {
            std::vector<int64_t> found, wanted = allowed;
            for (int64_t i = 0; i < counts[q]; ++i)
                found.push_back(row_of(entries[q * 2 * keep + i].key));
            std::sort(found.begin(), found.end());
            CHECK(std::adjacent_find(found.begin(), found.end()) == found.end());
            CHECK(std::includes(allowed.begin(), allowed.end(), found.begin(), found.end()));
            if (keep == eligible) CHECK_EQUAL(int64_t(found.size()), eligible);
            const auto of = [&](int64_t row) { return score(table, metric, queries.row(q), row); };
            keep_best(&wanted, 1, of);
            keep_best(&found, 1, of);  // a copy is as good
            best += of(found[0]) >= of(wanted[0]);
        }

        CHECK(best >= n - 2);  // a cluster of rows differs by less than four bits tell
    }
}

}  // namespace

void test_graph() {
    std::mt19937 random(11);
    scenario = "sums over bits";
    for (const Kernels* kernels : tested_kernels()) check_sums(*kernels, random);
    std::vector<float> centre(WIDTH);
    for (float& value : centre) value = uniform(random);
    for (Metric metric : EVERY_METRIC)
        for (int64_t prefix : {0, 16}) {
            const float* middle = prefix ? centre.data() : nullptr;
            const int64_t n = 250, more = 70;
            const Table all = make_table(n + more, WIDTH, DType::F32, random);
            Table table = all;
            table.n = n;
            const Kernels& any = *tested_kernels().front();
            const Database database(table, {prefix, false}, split(n), n, any, 1),
                grown(all, {prefix, false}, {n, more}, n, any, 1);
            std::unique_ptr<Built> first;
            for (const Kernels* kernels : tested_kernels())
                for (int threads : THREADS) {
                    scenario = std::string("graph, ") + kernels->name;
                    std::unique_ptr<Built> built(
                        new Built({*kernels, threads}, database.rows, metric, middle));
                    if (first) {
                        CHECK(built->edges == first->edges);
                        CHECK(built->signs == first->signs);
                        CHECK(built->nibbles == first->nibbles);
                    } else {
                        check_codes(*built, table, middle);
                    }
                    const Run run = {*kernels, threads};
                    check_shortlists(*built, run, table, database.rows, metric, all_rows(n),
                                     random);
                    const Chosen half(database.rows, some_rows(n, n / 2, random));
                    check_shortlists(*built, run, table,
                                     database.rows.restricted(half.words.data()), metric, half.rows,
                                     random);
                    check_shortlists(*built, run, all, grown.rows, metric, all_rows(n + more),
                                     random);
                    if (!first) first = std::move(built);
                }
        }
}
