// Rows that lie in a few tight clusters, as near-duplicates of some vectors do. A ball around each
// bounds the scores of its rows, so that a query has to see only few of the clusters.
#pragma once

#include "cpu/search/projected.h"

namespace mrl {

class Clusters {
  public:
    // `rows` are the problem's, as `project` sorts them, at least one. There are no clusters where
    // they lie in fewer than two tight ones, or in too many.
    Clusters(const Problem& p, const std::vector<Projected>& rows, int threads);
    // Raises each query's θ to what the balls prove, and finds the queries that have to see each
    // cluster. True if that leaves a small share of all pairs of a query and a row to be scored.
    bool narrow(Problem& p, const std::vector<int64_t>& which);
    // Appends each query's k best among the clusters that it has to see.
    Status search(Problem& p, int threads, std::vector<std::vector<Final>>* best) const;

  private:
    struct Cluster {
        int64_t first, count;  // its rows' range in order_
        std::vector<float> centre;
        double radius = 0.0;
        std::vector<int64_t> queries = {};  // those that have to see it
    };
    struct Range {
        double lower, upper;
    };
    static Range scores(const Problem& p, int64_t q, const Cluster& cluster);
    void enclose(const Problem& p, int threads);

    std::vector<int64_t> order_;  // bits of the mask, by cluster
    std::vector<Cluster> clusters_;
};

}  // namespace mrl
