// Queries side by side, as a scan broadcasts them.
#include <algorithm>
#include <cstring>

#include "cpu/search/scan.h"

namespace mrl {

bool finite(const Queries& queries, int64_t dim) {
    constexpr int LANES = 16;
    float checks[LANES] = {}, check = 0.0f;  // become NaN on the first value that is not finite
    for (int64_t q = 0; q < queries.n; ++q) {
        const float* query = queries.data + q * queries.stride;
        int64_t c = 0;
        for (; c + LANES <= dim; c += LANES)
            for (int i = 0; i < LANES; ++i) checks[i] += query[c + i] * 0.0f;
        for (; c < dim; ++c) check += query[c] * 0.0f;
    }
    for (float each : checks) check += each;
    return check == 0.0f;
}

template <class Fn>
void Panel::group(int64_t count, int64_t bytes_a_query, const Fn& fill) {
    data_.reset(new char[count * bytes_a_query + 1]);
    const int64_t groups = (count + MAX_GROUP - 1) / MAX_GROUP;
    int64_t first = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t size = count / groups + (g < count % groups);
        char* data = data_.get() + first * bytes_a_query;
        for (int64_t q = 0; q < size; ++q) fill(first + q, data, size, q);
        groups_.push_back({first, size, data});
        first += size;
    }
}

Panel::Panel(const Queries& queries, int64_t dim) {
    group(queries.n, dim * sizeof(float), [&](int64_t q, char* data, int64_t size, int64_t at) {
        const float* query = queries.data + q * queries.stride;
        float* columns = reinterpret_cast<float*>(data);
        for (int64_t c = 0; c < dim; ++c) columns[c * size + at] = query[c];
    });
}

Panel::Panel(const std::vector<CodedQuery>& coded) {
    const int64_t bytes = coded.empty() ? 1 : coded[0].step_bytes;
    const int64_t steps = coded.empty() ? 0 : int64_t(coded[0].steps.size()) / bytes;
    for (const CodedQuery& query : coded) {
        offsets_.push_back(query.offset);
        shifts_.push_back(query.shift);
    }
    group(coded.size(), steps * bytes, [&](int64_t q, char* data, int64_t size, int64_t at) {
        for (int64_t i = 0; i < steps; ++i)
            std::memcpy(data + (i * size + at) * bytes, coded[q].steps.data() + i * bytes, bytes);
    });
}

}  // namespace mrl
