// Memory of large arrays.
#pragma once

#include <cstddef>

namespace mrl {

constexpr size_t HUGE_PAGE = 2 << 20;

// Asks for huge pages, which the system need not give, where whole ones lie inside: page walks cost
// up to a fifth of a scan.
void advise_huge_pages(void* begin, size_t bytes);

}  // namespace mrl
