// Builds a graph, a batch of rows at a time: each row of a batch searches the graph of the rows
// before it for near ones, and keeps some in different directions; then edges lead back. Batches
// depend on the number of rows only, so that any threads build the same graph.
#pragma once

#include "cpu/search/graph.h"

namespace mrl {

// The arrays of a graph, to be written.
struct GraphArrays {
    uint32_t* edges;  // [rows, DEGREE]
    uint8_t *signs, *nibbles;
    uint32_t* entries;  // [ENTRIES]
};

class GraphBuilder {
  public:
    // Codes the rows that may be found; no other becomes a node.
    GraphBuilder(const Run& run, const Rows& rows, Metric metric, const float* centre,
                 int64_t width, const GraphArrays& to);
    // Adds the next batch; false where there was none left.
    bool add();
    int64_t added() const { return added_; }
    int64_t count() const { return order_.size(); }
    // Writes the edges, with some that lead to rows that none led to. Returns how many entries.
    int64_t finish();

  private:
    struct Candidate {
        float distance;
        uint32_t row;
    };
    struct Scratch {
        Walk walk;
        std::vector<Candidate> candidates;
        std::vector<uint32_t> rows, kept;
        std::vector<float> distances, hidden;
        std::vector<uint64_t> edges;  // target, source
    };
    void code(int64_t row, float* y, std::vector<float>* room);
    float distance(uint32_t from, float score) const;
    void measure(uint32_t from, const uint32_t* rows, int64_t n, float* distances) const;
    void prune(uint32_t row, Scratch& scratch) const;
    void find(uint32_t row, Scratch& scratch);
    void find_all(int64_t n);
    void choose(uint32_t row, Scratch& scratch) const;
    void lead_back(const uint64_t* begin, const uint64_t* end, Scratch& scratch);
    void reach_all();
    uint32_t* list(uint32_t row) { return lists_.data() + int64_t(row) * SLOTS; }

    static constexpr int64_t SLOTS = 64;  // edges while it is built: pruned when there are more
    const Run run_;
    const Rows& rows_;
    const MetricTerms& terms_;
    const float* const centre_;
    const GraphArrays to_;
    Graph graph_;  // as far as it is built
    std::vector<uint32_t> order_, lists_, entries_;
    std::vector<int8_t> codes_;           // [rows, query_bytes(width)]
    std::vector<NodeQuery> queries_;      // each row as a query
    std::vector<float> norms_, middles_;  // ‖x‖, ⟨y, c⟩
    std::vector<Scratch> scratch_;
    double most_ = 0.0;  // M², the largest ‖x‖²
    int64_t added_ = 0;
};

constexpr int64_t ENTRIES = 64;

}  // namespace mrl
