// Bindings of search: the rows that are searched, and the searches.
#include "cpu/search/search.h"

#include <pybind11/native_enum.h>

#include <tuple>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace mrl {
namespace {

// A span's fields in their order; see search.h.
using SpanFields = std::tuple<int64_t, int64_t, Address<float>, Address<uint8_t>, Address<void>,
                              int64_t, Address<float>, int64_t, Address<int64_t>>;

Rows rows_of(const std::vector<SpanFields>& spans, int64_t packed_dim, int64_t code_dim, int dtype,
             const std::vector<int64_t>& levels) {
    Rows rows = {{}, packed_dim, code_dim, DType(dtype), levels};
    for (const SpanFields& fields : spans)
        rows.spans.push_back(
            std::apply([](const auto&... values) { return Span{values...}; }, fields));
    return rows;
}

// Empty where all went well, else what is wrong with the vectors.
std::string message(Status status) {
    switch (status) {
        case Status::NOT_FINITE:
            return "not finite";
        case Status::OVERFLOW_:
            return "overflow";
        case Status::QUERY_NOT_FINITE:
            return "query not finite";
        default:
            return "";
    }
}

// The results of a range search, whose number is known only after it.
struct RangeFound {
    std::string problem;
    std::vector<std::vector<Neighbour>> neighbours;  // [queries]
    std::vector<int64_t> counts() const {
        std::vector<int64_t> counts;
        for (const auto& mine : neighbours) counts.push_back(mine.size());
        return counts;
    }
    void write(Address<float> scores, Address<int64_t> ids) const {
        for (const auto& mine : neighbours)
            for (const Neighbour& neighbour : mine) {
                *scores.at++ = neighbour.score;
                *ids.at++ = neighbour.id;
            }
    }
};

void bind_types(py::module_& m) {
    py::native_enum<DType>(m, "DType", "enum.IntEnum")
        .value("F32", DType::F32)
        .value("F16", DType::F16)
        .value("BF16", DType::BF16)
        .finalize();
    py::dict metrics;  // a metric's number by its name
    for (const MetricTerms& terms : METRIC_TERMS) metrics[terms.name] = int(&terms - METRIC_TERMS);
    m.attr("METRICS") = metrics;
    py::native_enum<Stat>(m, "Stat", "enum.IntEnum")
        .value("PREFIX_NORM", PREFIX_NORM)
        .value("CODE_SCALE", CODE_SCALE)
        .value("CODE_ERROR", CODE_ERROR)
        .value("TAIL_NORM", TAIL_NORM)
        .finalize();
    py::class_<Rows>(m, "Rows")
        .def(py::init(&rows_of))
        .def("restricted",
             [](const Rows& rows, Address<uint64_t> mask) { return rows.restricted(mask); })
        .def_property_readonly("eligible", &Rows::eligible);
    py::class_<RangeFound>(m, "RangeFound")
        .def_readonly("problem", &RangeFound::problem)
        .def_property_readonly("counts", &RangeFound::counts)
        .def("write", &RangeFound::write);
}

void bind_funnel(py::module_& m) {
    m.def("search",
          [](const Rows& rows, Address<float> queries, int64_t num_queries, int64_t query_stride,
             int metric, const std::vector<std::pair<int64_t, int64_t>>& stages, int threads,
             const std::string& isa, Address<float> scores, Address<int64_t> ids) {
              const Run run = {kernels_named(isa), threads};
              std::vector<Stage> list;
              for (const auto& [dim, keep] : stages) list.push_back({dim, keep});
              py::gil_scoped_release unlocked;
              return message(search(run, rows, {queries, num_queries, query_stride}, Metric(metric),
                                    list, {scores, ids}));
          });
    m.def("rerank",
          [](const Rows& rows, Address<float> queries, int64_t num_queries, int64_t query_stride,
             int metric, Address<int64_t> candidates, int64_t count, int64_t dim, int64_t k,
             int threads, const std::string& isa, Address<float> scores, Address<int64_t> ids) {
              const Run run = {kernels_named(isa), threads};
              py::gil_scoped_release unlocked;
              return message(rerank(run, rows, {queries, num_queries, query_stride}, Metric(metric),
                                    {candidates, count}, {dim, k}, {scores, ids}));
          });
}

void bind_exact(py::module_& m) {
    m.def("exact_search",
          [](const Rows& rows, Address<float> queries, int64_t num_queries, int64_t query_stride,
             int metric, int64_t dim, int64_t k, int threads, const std::string& isa,
             Address<float> scores, Address<int64_t> ids, Address<int64_t> touched) {
              const Kernels& kernels = kernels_named(isa);
              py::gil_scoped_release unlocked;
              return message(exact_search(kernels, rows, {queries, num_queries, query_stride},
                                          Metric(metric), dim, k, threads, scores, ids, touched));
          });
    m.def("range_search", [](const Rows& rows, Address<float> queries, int64_t num_queries,
                             int64_t query_stride, int metric, int64_t dim, double threshold,
                             int threads, const std::string& isa) {
        const Kernels& kernels = kernels_named(isa);
        std::unique_ptr<RangeFound> found(new RangeFound);
        {
            py::gil_scoped_release unlocked;
            found->problem =
                message(range_search(kernels, rows, {queries, num_queries, query_stride},
                                     Metric(metric), dim, threshold, threads, &found->neighbours));
        }
        return found;
    });
}

void bind_store(py::module_& m) {
    m.def("pack_flags", [](Address<uint8_t> flags, int64_t count, Address<uint64_t> words) {
        pack_flags(flags, count, words);
    });
    m.def("store", [](const Rows& rows, Address<void> data, int dtype, int64_t stride, int64_t dim,
                      int64_t begin, int64_t n, int threads, const std::string& isa,
                      Address<float> packed, Address<uint8_t> codes, Address<float> stats,
                      int64_t stats_stride, Address<void> suffix, int64_t suffix_stride) {
        const Run run = {kernels_named(isa), threads};
        py::gil_scoped_release unlocked;
        return message(store(run, rows, {data, DType(dtype), stride, n, dim}, begin,
                             {packed, codes, stats, stats_stride, suffix, suffix_stride}));
    });
}

}  // namespace

void bind_search(py::module_& m) {
    bind_types(m);
    bind_funnel(m);
    bind_exact(m);
    bind_store(m);
}

}  // namespace mrl
