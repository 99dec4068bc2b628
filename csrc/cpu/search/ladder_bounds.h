// Upper bounds on scores by a ladder's codes: of four bits for every row, as a scan's terms, and of
// eight for the rows that these do not drop.
//
// Let q̂ and ŷ be what the codes of p = q − c and of y = x − c stand for. Then
//   ⟨p, y⟩ <= ⟨q̂, ŷ⟩ + ‖p − q̂‖·‖ŷ‖ + ‖p‖·‖y − ŷ‖,
// and Ladder lists the terms that the centre c adds. ‖y − ŷ‖ is a row's own; ‖y‖ plus that of four
// bits, and the norms that rounding is a share of, are as large as the tile's greatest. Of eight
// bits ‖y − ŷ‖ may be larger than of four: ‖p − q̂‖·‖y − ŷ‖ is in the factor of the row's own error,
// too.
#pragma once

#include "cpu/search/listed_codes.h"

namespace mrl {

struct Problem;
struct Final;

class LadderBounds {
  public:
    // Nothing where the problem's codes are no ladder's.
    LadderBounds(const Problem& problem, const std::vector<int64_t>& queries, const Panel& panel);
    // Makes a scan's scores bounds: the terms of the tile that was read last, then their factors.
    void prepare(const TileReader& tiles, Scan* scan);
    void of_group(const Panel::Group& group, Scan* scan) const;
    // Bounds one query's rows by eight bits, and lists those whose bound reaches the gate.
    void bound(size_t i, const Entry* entries, int64_t count, double gate,
               std::vector<Final>* possible);

  private:
    enum Term { ERROR, OWN, INVERSE };
    const Problem& p_;
    const std::vector<int64_t>& queries_;
    int terms_ = 0;
    std::vector<float> scales_, factors_;  // factors: [groups, terms, size]
    std::vector<double> error_, own_, inverse_;
    std::vector<float> of_code_norm_, of_rounded_norm_, bases_;  // [queries]
    float copies_[4][TILE] = {};
    ListedCodes listed_;
};

}  // namespace mrl
