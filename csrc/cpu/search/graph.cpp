#include "cpu/search/graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu/threads.h"

namespace mrl {
namespace {

constexpr int64_t AT_ONCE = 4;       // rows that kernels sum at once
constexpr int64_t AT_A_STEP = 2;     // nodes that a walk leaves
constexpr uint32_t LEFT = 1u << 31;  // in a row's number: its edges were followed

}  // namespace

int64_t query_bytes(int64_t width) { return (width + 63) / 64 * 64; }

NodeQuery code_query(const float* y, const Graph& graph, float t, int8_t* codes) {
    const float scale = quantize(y, graph.width, TINY, codes);
    std::fill(codes + graph.width, codes + query_bytes(graph.width), int8_t(0));
    const float sum = float(std::accumulate(codes, codes + graph.width, 0));
    return {codes, scale, t, -sum, -7.5f * sum};
}

void score_nodes(const Kernels& kernels, const Graph& graph, const NodeQuery& query,
                 const uint32_t* nodes, int64_t n, float* scores) {
    constexpr int64_t MOST = 16;
    const int64_t bytes = low_bytes(graph.width);
    const uint8_t* places[MOST];
    for (int64_t begin = 0; begin < n; begin += MOST) {
        const int64_t count = std::min(MOST, n - begin);
        for (int64_t i = 0; i < (count + 3) / AT_ONCE * AT_ONCE; ++i) {
            places[i] = graph.nibbles + nodes[begin + std::min(i, count - 1)] * bytes;
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(places[i] + byte);
        }
        float sums[MOST];
        kernels.dot_halves(places, count, query.codes, bytes, sums);
        for (int64_t i = 0; i < count; ++i) {
            const NodeTerms& node = graph.terms(nodes[begin + i]);
            scores[begin + i] = node.scale * (query.scale * (sums[i] + query.nibbles_shift)) +
                                (node.term + node.inverse * query.t);
        }
    }
}

// Whether a row was not seen yet; from now on it was.
bool Walk::is_new(uint32_t row) {
    uint64_t& word = marks_[row / 64];
    const uint64_t bit = uint64_t(1) << row % 64;
    if (word & bit) return false;
    seen_.push_back(row);
    word |= bit;
    return true;
}

// Puts a row where it belongs among the best; where that is.
int64_t Walk::insert(float score, uint32_t row) {
    if (count_ == beam_) --count_;
    Node* nodes = found_.data();
    int64_t at = 0;  // how many are not below it; found without a branch that could be mistaken
    for (int64_t left = count_; left > 0;) {
        const int64_t half = (left + 1) / 2;
        at += nodes[at + half - 1].score >= score ? half : 0;
        left -= half;
    }
    std::memmove(nodes + at + 1, nodes + at, (count_ - at) * sizeof(Node));
    nodes[at] = {score, row};
    ++count_;
    return at;
}

// Scores the fresh rows by signs, and keeps the best.
void Walk::meet(const Kernels& kernels, const Graph& graph, const NodeQuery& query) {
    const int64_t n = fresh_.size(), bytes = sign_bytes(graph.width);
    if (n == 0) return;
    const int64_t whole = (n + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    places_.resize(whole);
    sums_.resize(whole);
    for (int64_t i = 0; i < whole; ++i)
        places_[i] = graph.signs + fresh_[std::min(i, n - 1)] * bytes + sizeof(NodeTerms);
    kernels.sum_bits(places_.data(), n, query.codes, graph.width, sums_.data());
    for (int64_t i = 0; i < n; ++i) {
        const NodeTerms& node = graph.terms(fresh_[i]);
        const float sum = 2.0f * sums_[i] + query.signs_shift,
                    score =
                        node.factor * (query.scale * sum) + (node.term + node.inverse * query.t);
        // NaN, of rows whose squares no fp32 holds, is below all others.
        if (count_ == beam_ && !(score > found_[count_ - 1].score)) continue;
        first_ = std::min(first_, insert(score == score ? score : -INFINITY, fresh_[i]));
        const uint32_t* edges = graph.edges + int64_t(fresh_[i]) * graph.degree;
        __builtin_prefetch(edges);
        __builtin_prefetch(edges + 16);
    }
    fresh_.clear();
}

void Walk::run(const Kernels& kernels, const Graph& graph, const NodeQuery& query, int64_t beam) {
    const int64_t bytes = sign_bytes(graph.width);
    for (uint32_t row : seen_) marks_[row / 64] = 0;  // of the walk before, even if it was cut off
    seen_.clear();
    beam_ = std::min(beam, graph.rows);
    count_ = 0;
    passed_.clear();
    fresh_.clear();
    marks_.resize(std::max<size_t>(marks_.size(), graph.rows / 64 + 1));
    found_.resize(std::max<size_t>(found_.size(), beam_ + 1));
    const auto see = [&](uint32_t row) {
        if (!is_new(row)) return;
        fresh_.push_back(row);
        const uint8_t* place = graph.signs + row * bytes;
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(place + byte);
    };
    for (int64_t i = 0; i < graph.entry_count; ++i)
        if (graph.entries[i] < graph.rows) see(graph.entries[i]);
    meet(kernels, graph, query);
    for (first_ = 0;; meet(kernels, graph, query)) {
        // Some at once, so that their reads wait for memory together.
        if (passed_.size() % 256 < AT_A_STEP) poll();
        int64_t left = 0;
        for (int64_t i = first_; i < count_ && left < AT_A_STEP; ++i) {
            Node& node = found_[i];
            if (node.row & LEFT) {
                first_ += i == first_;
                continue;
            }
            const uint32_t* edges = graph.edges + int64_t(node.row) * graph.degree;
            passed_.push_back(node.row);
            node.row |= LEFT;
            first_ += i == first_;
            ++left;
            for (int64_t e = 0; e < graph.degree && edges[e] < graph.rows; ++e) see(edges[e]);
        }
        if (left == 0) break;
    }
    for (int64_t i = 0; i < count_; ++i) found_[i].row &= ~LEFT;
}

}  // namespace mrl
