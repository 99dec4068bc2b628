// A graph over rows: from each a few edges to near rows that lie in different directions. A search
// follows them from a few entries, by signs, and sees the rows beside its way only.
//
// A node's codes lie row by row, apart from the ladder's tiles: the signs of all columns, by which
// a search goes, and four bits of each, which rank what it found. Both are of y = x − c, c the
// centre. With the terms of a node a score, but for what all rows share, is
//   factor · S + term + inverse · t
// where S is a query's sum over signs, or scale times its sum over four bits in the factor's place.
#pragma once

#include "cpu/search/codes.h"
#include "cpu/search/scan.h"

namespace mrl {

constexpr uint32_t NO_NODE = 0xffffffffu;
constexpr int64_t DEGREE = 32;  // edges of a node, at most

struct NodeTerms {
    float factor, scale;  // of sums over signs and over four bits; products count, and norms divide
    float term;           // ⟨c, x⟩ or −‖y‖², likewise
    float inverse;  // 1 / ‖x‖ where norms divide; of inner products, √(M² − ‖x‖²): see Builder
};

struct Graph {
    int64_t rows, width;     // nodes are rows [0, rows)
    const float* centre;     // [width]; null is 0
    const uint8_t* signs;    // [rows, sign_bytes(width)]: NodeTerms, then a bit a column
    const uint8_t* nibbles;  // [rows, low_bytes(width)]; lie as a ladder's lows
    const uint32_t* entries;
    int64_t entry_count;
    const uint32_t* edges;  // [rows, degree]; after the last one NO_NODE, or what is no row
    int64_t degree = DEGREE;
    const NodeTerms& terms(int64_t row) const;
};

// Of a node's terms and signs: whole cache lines.
inline int64_t sign_bytes(int64_t width) {
    return (sizeof(NodeTerms) + (width + 7) / 8 + 63) / 64 * 64;
}
inline const NodeTerms& Graph::terms(int64_t row) const {
    return *static_cast<const NodeTerms*>(
        static_cast<const void*>(signs + row * sign_bytes(width)));
}

// A query less the centre, in codes of one byte.
struct NodeQuery {
    const int8_t* codes;               // [query_bytes(width)], zeros after the last column
    float scale;                       // the value of a code of 1
    float t;                           // the factor of a node's inverse
    float signs_shift, nibbles_shift;  // added to sums
};
int64_t query_bytes(int64_t width);  // whole vectors
// Codes y [width], which codes have room for.
NodeQuery code_query(const float* y, const Graph& graph, float t, int8_t* codes);

// Scores by four bits, of n nodes.
void score_nodes(const Kernels& kernels, const Graph& graph, const NodeQuery& query,
                 const uint32_t* nodes, int64_t n, float* scores);

// A search of one query at a time. Its order of steps does not depend on threads.
class Walk {
  public:
    struct Node {
        float score;  // by signs
        uint32_t row;
    };
    // Finds the `beam` best nodes that it comes by, best first.
    void run(const Kernels& kernels, const Graph& graph, const NodeQuery& query, int64_t beam);
    const Node* found() const { return found_.data(); }  // [count]
    int64_t count() const { return count_; }
    const std::vector<uint32_t>& passed() const { return passed_; }  // whose edges were followed

  private:
    int64_t insert(float score, uint32_t row);
    void meet(const Kernels& kernels, const Graph& graph, const NodeQuery& query);
    bool is_new(uint32_t row);
    int64_t beam_ = 0, count_ = 0, first_ = 0;  // the edges of all before the first were followed
    std::vector<Node> found_;
    std::vector<uint32_t> passed_, fresh_, seen_;
    std::vector<uint64_t> marks_;  // a bit a row that was seen
    std::vector<const uint8_t*> places_;
    std::vector<float> sums_;
};

// Where each row's bit of a mask lies, and whether it is set: whether the row may be found.
class MaskBits {
  public:
    explicit MaskBits(const Rows& rows);
    std::pair<int64_t, int> place(int64_t row) const;  // word, bit
    bool has(int64_t row) const {
        if (!rows_.mask) return true;
        const auto [word, bit] = place(row);
        return rows_.mask[word] >> bit & 1;
    }
    // The bits of rows [first, end) that may be found: a word a tile.
    std::vector<uint64_t> within(int64_t first, int64_t end) const;

  private:
    const Rows& rows_;
    std::vector<int64_t> starts_;  // [spans + 1]: tiles before each span
};

// Finds each query's shortlist: of the beam of a walk the stage's `keep` best by four bits, and as
// many of the rows that came after the graph. Writes counts[q] entries to out[q, :], of
// [n, 2 · keep].
Status graph_shortlist(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                       const Graph& graph, Stage stage, Entry* out, int64_t* counts);

}  // namespace mrl
