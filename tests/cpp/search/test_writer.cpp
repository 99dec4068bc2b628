// One thread appends rows, removes rows and publishes the states; sixteen search the state that
// they get, and find what it holds.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "search/chains.h"
#include "search/exact.h"
#include "search/growing.h"

namespace {

constexpr int READERS = 16;
constexpr int64_t ROWS_IN_ALL = 1500, WIDE = 26, PREFIX = 10, QUERIES = 5;

// The scores of all rows that there will be.
struct Known {
    Known(const Kernels& kernels, const Table& table, const QueryRows& queries, Metric metric)
        : scores(scores64(table, queries, metric)), chains(kernels, table, queries, metric) {
        for (int64_t dim : {PREFIX, WIDE}) chains.columns(dim);
    }
    const std::vector<double> scores;
    Chains chains;
};

void to_ids(Found* found) {
    for (int64_t& row : found->ids) row = row < 0 ? row : Growing::id_of(row);
}

class Reader {
  public:
    Reader(const Kernels& kernels, const QueryRows& queries, std::vector<Known>& known, bool coded,
           unsigned seed)
        : kernels_(kernels), queries_(queries), known_(known), coded_(coded), random_(seed) {}

    void check(const State& state) {
        std::vector<int64_t> rows;
        for (int64_t row = 0; row < state.rows.count(); ++row)
            if (state.is_live(row)) rows.push_back(row);
        CHECK_EQUAL(state.rows.eligible(), int64_t(rows.size()));
        if (random_() % 2) return check(state.rows, rows);
        // Some of the live rows are allowed.
        std::vector<uint64_t> words = *state.live;
        for (uint64_t& word : words) word &= random_() % 3 ? uint64_t(random_()) << 17 : 1;
        std::vector<int64_t> allowed;
        for (int64_t row : rows)
            if (words[row / TILE] >> row % TILE & 1) allowed.push_back(row);
        check(state.rows.restricted(words.data()), allowed);
    }

  private:
    void check(const Rows& rows, const std::vector<int64_t>& found) {
        const int metric = int(random_() % METRICS.size());
        Known& known = known_[metric];
        switch (random_() % 3) {
            case 0:
                return check_search(rows, found, Metric(metric), known);
            case 1:
                return check_exact(rows, found, Metric(metric), known);
            default:
                return check_range(rows, found, Metric(metric), known);
        }
    }

    void check_search(const Rows& rows, const std::vector<int64_t>& among, Metric metric,
                      Known& known) {
        // Where codes rank first they keep all rows, so that columns alone decide.
        const std::vector<Stage> stages = {{PREFIX, coded_ ? ROWS_IN_ALL : 60}, {WIDE, 7}};
        Found found = room_for(QUERIES, 7), right = known.chains.best(among, stages, nullptr);
        CHECK(search({kernels_, threads()}, rows, queries_.queries, metric, stages,
                     {found.scores.data(), found.ids.data()}) == Status::OK);
        to_ids(&right);
        CHECK_EQUAL(found, right);
    }

    void check_exact(const Rows& rows, const std::vector<int64_t>& among, Metric metric,
                     const Known& known) {
        Found right = brute_force(known.scores, QUERIES, ROWS_IN_ALL, among, 9);
        to_ids(&right);
        Visits visits;
        check_found(find_exact(kernels_, rows, queries_, metric, 9, threads(), &visits), right);
    }

    void check_range(const Rows& rows, const std::vector<int64_t>& among, Metric metric,
                     const Known& known) {
        const double threshold = float(known.scores[random_() % known.scores.size()]);
        const InRange right = rows_in_range(known.scores, QUERIES, ROWS_IN_ALL, among, threshold);
        std::vector<std::vector<Neighbour>> found;
        CHECK(range_search({kernels_, threads()}, rows, queries_.queries, metric, WIDE, threshold,
                           &found) == Status::OK);
        for (int64_t q = 0; q < QUERIES; ++q) {
            CHECK_EQUAL(found[q].size(), right[q].size());
            for (size_t i = 0; i < right[q].size(); ++i)
                CHECK_EQUAL(found[q][i].id, Growing::id_of(right[q][i]));
        }
    }

    int threads() { return 1 + int(random_() % 2); }

    const Kernels& kernels_;
    const QueryRows& queries_;
    std::vector<Known>& known_;
    const bool coded_;
    std::mt19937 random_;
};

void check_layout(bool coded, DType dtype) {
    scenario = coded ? "writer, coded" : "writer";
    std::mt19937 random(10);
    const Kernels& kernels = *tested_kernels().front();
    const Table table = make_table(ROWS_IN_ALL, WIDE, dtype, random);
    const QueryRows queries(table, QUERIES, random);
    std::vector<Known> known;
    known.reserve(METRICS.size());
    for (Metric metric : METRICS) known.emplace_back(kernels, table, queries, metric);
    Growing growing(table, {PREFIX, coded}, kernels);
    std::atomic<bool> over{false};
    std::atomic<int64_t> checks{0};
    std::vector<std::thread> readers;
    for (int i = 0; i < READERS; ++i)
        readers.emplace_back([&, i] {
            Reader reader(kernels, queries, known, coded, i);
            do {
                reader.check(*growing.state());
                ++checks;
            } while (!over);
        });
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    int64_t states = 0;
    for (; std::chrono::steady_clock::now() < end; ++states) growing.step(random);
    over = true;
    for (std::thread& reader : readers) reader.join();
    std::printf("%s: %lld states, %lld searches of them\n", scenario.c_str(), (long long)states,
                (long long)checks.load());
}

}  // namespace

void test_writer() {
    check_layout(false, DType::F32);
    check_layout(true, DType::BF16);
}
