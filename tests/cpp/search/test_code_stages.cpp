// Stages that rank a shortlist by four bits or eight, against scores made of each code by itself.
#include "cpu/search/scan.h"
#include "search/chains.h"
#include "search/ladder.h"

namespace {

struct Case {
    const Setup& setup;
    const Table& table;
    const Database& database;
    const QueryRows& queries;
    Metric metric() const { return setup.ladder.metric; }
};

// One query's scores by codes: [n], rounded to fp32 as they are compared.
UNWATCHED std::vector<float> code_scores(const Case& c, int64_t q, int bits) {
    const MetricTerms& terms = terms_of(c.metric());
    const float* query = c.queries.row(q);
    std::vector<float> less(WIDTH);
    centred(query, c.setup.ladder.centre, WIDTH, less.data());
    rotate(c.setup.ladder, WIDTH, less.data());
    const Codes coded = encode(less.data(), WIDTH);
    double unit = terms.product, of_centre = 0.0;
    if (terms.normalized) unit *= query_scale(query, WIDTH);
    for (int64_t i = 0; i < WIDTH; ++i)
        of_centre += (query[i] - c.setup.of(i)) * c.setup.of(i);  // ⟨q, c⟩ − ‖c‖²
    const int64_t dims = DIMS.size(), own = SIGN_FACTOR + 2 * dims - 1;
    std::vector<float> scores;
    for (const Span& span : c.database.rows.spans)
        for (int64_t row = 0; row < span.rows; ++row) {
            const Database::Block& block = c.database.blocks[&span - c.database.rows.spans.data()];
            const auto stat = [&](int64_t which) {
                return double(span.stats[which * span.stats_stride + row]);
            };
            double sum = 0.0;
            for (int64_t i = 0; i < WIDTH; ++i) {
                const Code code = code_of(block, row, i);
                sum += coded.codes[i] *
                       (code.nibble - 7.5 + (bits == 8 ? (code.low - 7.5) / 16 : 0.0));
            }
            double score = unit * coded.scale * sum * stat(CODE_SCALE);
            if (terms.squares > 0.0f)
                score -= terms.squares * stat(own);
            else if (c.setup.ladder.centre)
                score += unit * stat(own);
            if (terms.normalized && c.setup.ladder.centre)
                score += unit * of_centre * stat(own + dims);
            scores.push_back(float(score));
        }
    return scores;
}

// The rows that the first stage keeps, by the scan itself, which other tests check.
std::vector<std::vector<int64_t>> shortlists(const Case& c, const Run& run, const Rows& rows,
                                             Stage first) {
    const int64_t count = c.queries.queries.n, keep = std::min(first.keep, rows.eligible());
    std::vector<Entry> entries(count * keep);
    std::vector<int64_t> counts(count);
    CHECK(scan_all(
              run, rows, c.queries.queries,
              {c.metric(), first.bits == 1 ? Source::SIGNS : Source::NIBBLES, first.dim, keep, 1},
              entries.data(), counts.data()) == Status::OK);
    std::vector<std::vector<int64_t>> lists(count);
    for (int64_t q = 0; q < count; ++q)
        for (int64_t i = 0; i < counts[q]; ++i)
            lists[q].push_back(row_of(entries[q * keep + i].key));
    return lists;
}

void check_stages(const Case& c, const Run& run, const Rows& rows, Chains* chains,
                  const std::vector<Stage>& stages) {
    const int64_t count = c.queries.queries.n, n = c.table.n, k = stages.back().keep;
    Found right = none(count, k), found = room_for(count, k);
    std::vector<std::vector<int64_t>> lists = shortlists(c, run, rows, stages[0]);
    for (int64_t q = 0; q < count; ++q) {
        std::vector<float> scores;
        for (size_t s = 1; s < stages.size(); ++s) {
            const float* columns = chains->columns(stages[s].dim).data() + q * n;
            scores.assign(columns, columns + n);
            if (stages[s].bits) scores = code_scores(c, q, int(stages[s].bits));
            keep_best(&lists[q], stages[s].keep, [&](int64_t row) { return scores[row]; });
        }
        for (size_t i = 0; i < lists[q].size(); ++i) {
            right.ids[q * k + i] = lists[q][i];
            right.scores[q * k + i] = scores[lists[q][i]];
        }
    }
    CHECK(search(run, rows, c.queries.queries, c.metric(), stages,
                 {found.scores.data(), found.ids.data()}) == Status::OK);
    CHECK_EQUAL(found, right);
}

void check_case(const Case& c, const Kernels& kernels, const std::vector<uint64_t>& mask) {
    const std::vector<std::vector<Stage>> searches = {
        {{9, 1000, 1}, {WIDTH, 9, 8}, {WIDTH, 5}},  // keeps every row
        {{32, 300, 1}, {WIDTH, 60, 4}, {WIDTH, 17, 8}, {9, 12}, {WIDTH, 5}},
        {{WIDTH, 200, 1}, {WIDTH, 33, 4}, {32, 5}},
        {{WIDTH, 100, 4}, {WIDTH, 21, 8}, {WIDTH, 20}},
        {{WIDTH, 1000, 4}, {WIDTH, 1000, 8}, {WIDTH, 1000}},
    };
    Chains chains(kernels, c.table, c.queries, c.metric());
    const std::string name = scenario;
    for (int threads : THREADS)
        for (bool masked : {false, true})
            for (const std::vector<Stage>& stages : searches) {
                scenario = name + ", " + std::to_string(threads) + " threads" +
                           (masked ? ", masked, " : ", ") + std::to_string(stages.size()) +
                           " stages of " + std::to_string(stages[0].dim);
                const Rows rows =
                    masked ? c.database.rows.restricted(mask.data()) : c.database.rows;
                check_stages(c, {kernels, threads}, rows, &chains, stages);
            }
}

// Where few rows may be found their columns are read, whatever ranks first.
void check_gathered(const Case& c, const Kernels& kernels) {
    std::vector<uint64_t> mask(9);
    for (int64_t tile : {0, 4}) mask[tile] = 5;
    const Rows rows = c.database.rows.restricted(mask.data());
    CHECK_EQUAL(rows.gathered_rows.size(), 4u);
    Chains chains(kernels, c.table, c.queries, c.metric());
    for (const std::vector<Stage>& stages :
         {std::vector<Stage>{{32, 3, 1}, {WIDTH, 3, 8}, {WIDTH, 2}},
          std::vector<Stage>{{WIDTH, 3, 1}, {9, 2}, {WIDTH, 2}}}) {
        Found found = room_for(c.queries.queries.n, 2);
        CHECK(search({kernels, 1}, rows, c.queries.queries, c.metric(), stages,
                     {found.scores.data(), found.ids.data()}) == Status::OK);
        std::vector<Stage> columns = stages;
        for (Stage& stage : columns) stage.bits = 0;
        CHECK_EQUAL(found, chains.best(rows.gathered_rows, columns, nullptr));
    }
}

}  // namespace

void test_code_stages() {
    std::mt19937 random(31);
    for (Metric metric : EVERY_METRIC)
        for (const Frame& frame : FRAMES) {
            const Setup setup(metric, frame, random);
            const Table table = rows_beside(setup, 430, random);
            const QueryRows queries(table, 7, random);
            std::vector<uint64_t> mask(9);  // of the spans' tiles
            for (uint64_t& word : mask) word = uint64_t(random()) << 32 | random();
            for (const Kernels* kernels : tested_kernels()) {
                scenario = std::string("code stages, ") + kernels->name + ", metric " +
                           std::to_string(int(metric));
                const Database database(table, {0, false}, split(table.n), 77, *kernels, 1,
                                        setup.ladder);
                const Case c = {setup, table, database, queries};
                std::vector<uint64_t> live = mask;
                size_t tile = 0;
                for (const Span& span : database.rows.spans)
                    for (int64_t first = 0; first < span.rows; first += TILE, ++tile)
                        if (span.rows - first < TILE)
                            live[tile] &= ~uint64_t(0) >> (TILE - (span.rows - first));
                check_case(c, *kernels, live);
                check_gathered(c, *kernels);
            }
        }
}
