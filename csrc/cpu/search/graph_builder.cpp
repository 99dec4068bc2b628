#include "cpu/search/graph_builder.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/search/scan.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

constexpr int64_t BEAM = 128;       // of a row that looks for near ones
constexpr int64_t CANDIDATES = 96;  // that edges are chosen among: the nearest
// Edges lead in different directions: one is taken where its row is at most so many times as far
// from the source as from the row of any edge taken before; then, where there is room, so much
// more.
constexpr float HIDDEN = 0.9f, WIDER = 1.1f;  // of squared distances
constexpr int64_t BATCHES = 50;               // a batch has at most so large a share of the rows
constexpr int64_t GRAIN = 16;

// Rows in an order in which any first part of them is spread over all.
std::vector<uint32_t> spread(const Rows& rows) {
    std::vector<uint32_t> all;
    const MaskBits mask(rows);
    for (int64_t row = 0; row < rows.count(); ++row)
        if (mask.has(row)) all.push_back(uint32_t(row));
    const int64_t n = all.size();
    int64_t step = std::max<int64_t>(1, int64_t(0.6180339887498949 * double(n)));
    while (std::gcd(step, std::max<int64_t>(n, 1)) != 1) ++step;
    std::vector<uint32_t> order(n);
    for (int64_t i = 0, at = 0; i < n; ++i, at = (at + step) % n) order[i] = all[at];
    return order;
}

// Four bits of each of y's columns, and how well they stand for it: z, of steps from −7.5 to 7.5.
struct Halves {
    float inverse;         // of a step, in y; 0 where all codes are zeros
    double along, square;  // ⟨y, z⟩ and ⟨z, z⟩, in steps of 1
    static float code(float value, float inverse) {
        const float at = value * inverse + 8.0f;
        return float(int(std::min(std::max(at, 0.0f), 15.0f)));
    }
};

Halves halves(const float* y, int64_t width, float inverse) {
    Halves sums = {inverse, 0.0, 0.0};
    constexpr int64_t LANES = 16;
    float along[LANES] = {}, square[LANES] = {};
    for (int64_t c = 0; c < width; ++c) {
        const float z = Halves::code(y[c], inverse) - 7.5f;
        along[c % LANES] += y[c] * z;
        square[c % LANES] += z * z;
    }
    for (int64_t lane = 0; lane < LANES; ++lane) {
        sums.along += along[lane];
        sums.square += square[lane];
    }
    return sums;
}

// The codes that lie along y best: of steep spectra they reach over many deviations, of even ones
// over few. The largest values may lie beyond.
Halves best_halves(const float* y, int64_t width, float largest, double square) {
    Halves best = {};
    if (!(largest >= TINY)) return best;
    const float deviation = float(std::sqrt(square / double(width)));
    for (float deviations : {2.0f, 2.7f, 3.6f, 5.0f, 7.0f, INFINITY}) {
        const float reach = std::min(deviations * deviation, largest);
        const Halves sums = halves(y, width, 8.0f / reach);
        if (sums.along * sums.along * best.square > best.along * best.along * sums.square ||
            best.square == 0.0)
            best = sums;
        if (reach == largest) break;
    }
    return best;
}

}  // namespace

GraphBuilder::GraphBuilder(const Run& run, const Rows& rows, Metric metric, const float* centre,
                           int64_t width, const GraphArrays& to)
    : run_(run), rows_(rows), terms_(terms_of(metric)), centre_(centre), to_(to) {
    rows.check();
    const int64_t count = rows.count(), bytes = query_bytes(width);
    graph_ = {count, width, centre, to.signs, to.nibbles, nullptr, 0, nullptr, SLOTS};
    order_ = spread(rows);
    lists_.assign(count * SLOTS, NO_NODE);
    graph_.edges = lists_.data();
    codes_.assign(count * bytes, 0);
    queries_.resize(count);
    for (std::vector<float>* each : {&norms_, &middles_}) each->assign(count, 0.0f);
    scratch_.resize(run.threads);
    Ranges ranges(order_.size(), 64);
    parallel(run.threads, [&](int) {
        std::vector<float> x(width), y(2 * low_bytes(width));
        for (int64_t i, end; ranges.next(&i, &end);)
            for (; i < end; ++i) code(order_[i], y.data(), &x);
    });
    // An inner product is as near as points are that have one more column, √(M² − ‖x‖²).
    for (uint32_t row : order_) most_ = std::max(most_, double(norms_[row]) * norms_[row]);
    if (terms_.normalized || terms_.squares > 0.0f) return;
    for (uint32_t row : order_) {
        const double more = std::sqrt(std::max(0.0, most_ - double(norms_[row]) * norms_[row]));
        auto* node = const_cast<NodeTerms*>(&graph_.terms(row));
        node->inverse = std::isfinite(more) ? float(more) : 0.0f;
        queries_[row].t = terms_.product * node->inverse;
    }
}

// Writes a row's terms and codes, and what it needs as a query. y has room for whole bytes.
void GraphBuilder::code(int64_t row, float* y, std::vector<float>* room) {
    const int64_t width = graph_.width, bytes = low_bytes(width);
    float* x = room->data();
    columns_of(run_.kernels, rows_, row, width, x);
    centred(x, centre_, width, y);
    std::fill(y + width, y + 2 * bytes, 0.0f);
    float largest = 0.0f;
    double along = 0.0;
    for (int64_t c = 0; c < width; ++c) {
        const float size = std::abs(y[c]);
        largest = std::max(largest, size);
        along += size;
    }
    const Kernels& kernels = run_.kernels;
    const double square = kernels.dot64(x, x, width), beside = kernels.dot64(y, y, width),
                 norm = std::sqrt(square),
                 unit = !terms_.normalized ? 1.0
                        : norm > 0.0       ? 1.0 / norm
                                           : 0.0,
                 of_centre = centre_ ? kernels.dot64(centre_, x, width) : 0.0;
    const Halves best = best_halves(y, width, largest, beside);
    NodeTerms node = {};
    node.factor = float(along > 0.0 ? terms_.product * unit * beside / along : 0.0);
    // So that the codes' part along y is y: scores are not too small, however much they lose.
    node.scale = float(best.along > 0.0 ? terms_.product * unit * beside / best.along : 0.0);
    node.term =
        float(terms_.squares > 0.0f ? -terms_.squares * beside : terms_.product * unit * of_centre);
    node.inverse = terms_.normalized ? float(unit) : 0.0f;
    uint8_t* signs = to_.signs + row * sign_bytes(width);
    std::fill_n(signs, sign_bytes(width), uint8_t(0));
    *static_cast<NodeTerms*>(static_cast<void*>(signs)) = node;
    signs += sizeof node;
    for (int64_t c = 0; c < width; ++c) signs[c / 8] |= uint8_t(y[c] > 0.0f) << c % 8;
    uint8_t* nibbles = to_.nibbles + row * bytes;
    const auto four = [&](int64_t c) { return uint8_t(Halves::code(y[c], best.inverse)); };
    for (int64_t c = 0; c < bytes; ++c) nibbles[c] = uint8_t(four(c) | four(bytes + c) << 4);
    norms_[row] = float(norm);
    middles_[row] = centre_ ? float(kernels.dot64(y, centre_, width)) : 0.0f;
    const float t = terms_.normalized ? terms_.product * middles_[row] : 0.0f;
    queries_[row] = code_query(y, graph_, t, codes_.data() + row * query_bytes(width));
}

// The distance of a row to another, whose score it has.
float GraphBuilder::distance(uint32_t from, float score) const {
    if (terms_.squares > 0.0f) return std::max(0.0f, -score - graph_.terms(from).term);
    if (!terms_.normalized)
        return std::max(0.0f, float(most_) - middles_[from] - score / terms_.product);
    return norms_[from] > 0.0f ? std::max(0.0f, 1.0f - score / (terms_.product * norms_[from]))
                               : 1.0f;
}

// The distances of a row to n others.
void GraphBuilder::measure(uint32_t from, const uint32_t* rows, int64_t n, float* distances) const {
    score_nodes(run_.kernels, graph_, queries_[from], rows, n, distances);
    for (int64_t i = 0; i < n; ++i) distances[i] = distance(from, distances[i]);
}

// Leaves in `kept` those of the candidates, best first, that edges lead to.
void GraphBuilder::prune(uint32_t row, Scratch& scratch) const {
    std::vector<Candidate>& near = scratch.candidates;
    std::vector<uint32_t>&kept = scratch.kept, &others = scratch.rows;
    std::vector<float>&hidden = scratch.hidden, &distances = scratch.distances;
    const auto itself = [&](const Candidate& candidate) { return candidate.row == row; };
    near.erase(std::remove_if(near.begin(), near.end(), itself), near.end());
    std::sort(near.begin(), near.end(), [](const Candidate& a, const Candidate& b) {
        return a.distance < b.distance || (a.distance == b.distance && a.row < b.row);
    });
    const int64_t n = std::min<int64_t>(near.size(), CANDIDATES), most = std::min(n, DEGREE);
    others.clear();
    for (int64_t i = 0; i < n; ++i) others.push_back(near[i].row);
    hidden.assign(n, 0.0f);  // NaN of those that were taken
    kept.clear();
    for (float limit = HIDDEN, next; int64_t(kept.size()) < most;
         limit = std::max(limit * WIDER, next)) {
        next = INFINITY;
        for (int64_t i = 0; i < n; ++i) {
            if (hidden[i] > limit) next = std::min(next, hidden[i]);
            if (!(hidden[i] <= limit)) continue;
            hidden[i] = NAN;
            kept.push_back(others[i]);
            if (int64_t(kept.size()) == most) break;
            const int64_t after = n - i - 1;
            measure(others[i], others.data() + i + 1, after, distances.data());
            const Candidate* farther = near.data() + i + 1;
            float* ratios = hidden.data() + i + 1;
            for (int64_t j = 0; j < after; ++j)  // infinite of what is at the same place
                ratios[j] = std::max(ratios[j], (farther[j].distance + TINY) / distances[j]);
        }
    }
}

// Leaves in `kept` the edges to the best of the scratch's rows.
void GraphBuilder::choose(uint32_t row, Scratch& scratch) const {
    const int64_t n = scratch.rows.size();
    scratch.distances.resize(n);
    measure(row, scratch.rows.data(), n, scratch.distances.data());
    scratch.candidates.clear();
    for (int64_t i = 0; i < n; ++i)
        scratch.candidates.push_back({scratch.distances[i], scratch.rows[i]});
    prune(row, scratch);
}

// Searches for the edges of a new row, which no other thread reads yet.
void GraphBuilder::find(uint32_t row, Scratch& scratch) {
    scratch.walk.run(run_.kernels, graph_, queries_[row], BEAM);
    scratch.rows.assign(scratch.walk.passed().begin(), scratch.walk.passed().end());
    std::sort(scratch.rows.begin(), scratch.rows.end());
    choose(row, scratch);
    std::copy(scratch.kept.begin(), scratch.kept.end(), list(row));
    for (uint32_t target : scratch.kept) scratch.edges.push_back(uint64_t(target) << 32 | row);
}

// Adds the edges back from one row to the sources of those that lead to it.
void GraphBuilder::lead_back(const uint64_t* begin, const uint64_t* end, Scratch& scratch) {
    const uint32_t row = uint32_t(*begin >> 32);
    uint32_t* edges = list(row);
    std::vector<uint32_t>& rows = scratch.rows;
    rows.assign(edges, std::find(edges, edges + SLOTS, NO_NODE));
    for (const uint64_t* edge = begin; edge < end; ++edge) rows.push_back(uint32_t(*edge));
    if (int64_t(rows.size()) > SLOTS) {
        choose(row, scratch);
        rows = scratch.kept;
    }
    std::fill(std::copy(rows.begin(), rows.end(), edges), edges + SLOTS, NO_NODE);
}

bool GraphBuilder::add() {
    const int64_t all = order_.size(), most = std::max<int64_t>(1000, all / BATCHES),
                  n = std::min({std::max<int64_t>(added_, 1), most, all - added_});
    if (n <= 0) return false;
    if (added_ > 0) find_all(n);
    added_ += n;
    // The first rows are spread over all.
    entries_.assign(order_.begin(), order_.begin() + std::min(ENTRIES, added_));
    graph_.entries = entries_.data();
    graph_.entry_count = entries_.size();
    return true;
}

// Finds the edges of the next n rows in the graph of those before, and leads edges back.
void GraphBuilder::find_all(int64_t n) {
    for (Scratch& scratch : scratch_) scratch.edges.clear();
    Ranges sources(n, GRAIN);
    parallel(run_.threads, [&](int thread) {
        for (int64_t i, end; sources.next(&i, &end);)
            for (; i < end; ++i) find(order_[added_ + i], scratch_[thread]);
    });
    std::vector<uint64_t> edges;
    for (const Scratch& scratch : scratch_)
        edges.insert(edges.end(), scratch.edges.begin(), scratch.edges.end());
    std::sort(edges.begin(), edges.end());
    std::vector<size_t> starts;
    for (size_t i = 0; i < edges.size(); ++i)
        if (i == 0 || edges[i] >> 32 != edges[i - 1] >> 32) starts.push_back(i);
    starts.push_back(edges.size());
    Ranges targets(starts.size() - 1, GRAIN);
    parallel(run_.threads, [&](int thread) {
        for (int64_t i, end; targets.next(&i, &end);)
            for (; i < end; ++i)
                lead_back(edges.data() + starts[i], edges.data() + starts[i + 1], scratch_[thread]);
    });
}

int64_t GraphBuilder::finish() {
    Ranges ranges(order_.size(), GRAIN);
    parallel(run_.threads, [&](int thread) {
        Scratch& scratch = scratch_[thread];
        for (int64_t i, end; ranges.next(&i, &end);)
            for (; i < end; ++i) {
                uint32_t* edges = list(order_[i]);
                std::vector<uint32_t>& rows = scratch.rows;
                rows.assign(edges, std::find(edges, edges + SLOTS, NO_NODE));
                if (int64_t(rows.size()) <= DEGREE) continue;
                choose(order_[i], scratch);
                std::fill(std::copy(scratch.kept.begin(), scratch.kept.end(), edges), edges + SLOTS,
                          NO_NODE);
            }
    });
    for (int64_t row = 0; row < graph_.rows; ++row)
        std::copy_n(list(uint32_t(row)), DEGREE, to_.edges + row * DEGREE);
    std::copy(entries_.begin(), entries_.end(), to_.entries);
    reach_all();
    return entries_.size();
}

// Leads an edge to each row that no path from the entries leads to: from a row near it where that
// has one to spare, or else from the first that has. An edge is spared where no row was reached by
// it first.
void GraphBuilder::reach_all() {
    std::vector<char> reached(graph_.rows, 0), used(graph_.rows * DEGREE, 0);
    std::vector<uint32_t> waiting;
    const auto follow = [&] {
        while (!waiting.empty()) {
            const int64_t row = waiting.back();
            waiting.pop_back();
            if (waiting.size() % 1024 == 0) poll();
            for (int64_t e = row * DEGREE; e < (row + 1) * DEGREE; ++e) {
                const uint32_t next = to_.edges[e];
                if (next == NO_NODE || reached[next]) continue;
                reached[next] = used[e] = 1;
                waiting.push_back(next);
            }
        }
    };
    // Leads an edge from one row to another, if it has one to spare: the last, the longest.
    const auto lead = [&](int64_t from, uint32_t to) {
        const uint32_t* edges = to_.edges + from * DEGREE;
        int64_t e = std::find(edges, edges + DEGREE, NO_NODE) - edges;
        if (e == DEGREE)
            while (--e >= 0 && used[from * DEGREE + e]) continue;
        if (e < 0) return false;
        to_.edges[from * DEGREE + e] = to;
        used[from * DEGREE + e] = reached[to] = 1;
        waiting.push_back(to);
        return true;
    };
    for (uint32_t row : entries_) reached[row] = 1;
    waiting = entries_;
    follow();
    int64_t host = 0;  // all before it have no edge to spare
    for (uint32_t row : order_) {
        if (reached[row]) continue;
        bool led = false;
        for (int64_t e = 0; e < DEGREE && !led; ++e) {
            const uint32_t near = to_.edges[int64_t(row) * DEGREE + e];
            led = near != NO_NODE && reached[near] && lead(near, row);
        }
        while (!led && host < graph_.rows) {
            led = reached[host] && lead(host, row);
            host += !led;
        }
        follow();
    }
}

}  // namespace mrl
