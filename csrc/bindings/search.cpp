// Bindings of search: the rows that are searched, and the searches.
#include <pybind11/native_enum.h>

#include "bindings/bindings.h"
#include "cpu/search/graph_builder.h"

namespace py = pybind11;

namespace mrl {
namespace {

// A span's fields in their order; see search.h.
using SpanFields = std::tuple<int64_t, int64_t, Address<float>, Address<uint8_t>, Address<void>,
                              int64_t, Address<float>, int64_t, Address<int64_t>, Address<uint8_t>,
                              Address<uint8_t>, Address<uint8_t>, Address<float>>;
using LadderFields = std::tuple<std::vector<int64_t>, Address<float>, int, Address<float>>;

Rows rows_of(const std::vector<SpanFields>& spans, int64_t packed_dim, int64_t code_dim, int dtype,
             const std::vector<int64_t>& levels, const LadderFields& ladder, int64_t width) {
    const auto& [dims, centre, metric, signs] = ladder;
    Rows rows = {{},           packed_dim, code_dim,
                 DType(dtype), levels,     {dims, centre, Metric(metric), signs},
                 width};
    for (const SpanFields& fields : spans) rows.spans.push_back(made_of<Span>(fields));
    return rows;
}

using QueriesFields = std::tuple<Address<float>, int64_t, int64_t>;
using ResultsFields = std::tuple<Address<float>, Address<int64_t>, Address<double>>;
using CandidatesFields = std::tuple<Address<int64_t>, int64_t>;
using StageFields = std::tuple<int64_t, int64_t, int64_t>;
using NewRowsFields = std::tuple<Address<void>, DType, int64_t, int64_t, int64_t>;
using GraphFields = std::tuple<int64_t, int64_t, Address<float>, Address<uint8_t>, Address<uint8_t>,
                               Address<uint32_t>, int64_t, Address<uint32_t>>;
using GraphArraysFields =
    std::tuple<Address<uint32_t>, Address<uint8_t>, Address<uint8_t>, Address<uint32_t>>;
using SpanArraysFields =
    std::tuple<Address<float>, Address<uint8_t>, Address<float>, int64_t, Address<void>, int64_t,
               Address<uint8_t>, Address<uint8_t>, Address<uint8_t>, Address<float>>;

// The problem with the vectors, in the words that Python expects; empty for OK.
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
    void write(Address<float> scores, Address<int64_t> ids, Address<double> scores64) const {
        for (const auto& mine : neighbours)
            for (const Neighbour& neighbour : mine) {
                *scores.at++ = neighbour.score;
                *ids.at++ = neighbour.id;
                if (scores64.at) *scores64.at++ = neighbour.score64;
            }
    }
};

void bind_types(py::module_& m) {
    py::native_enum<DType>(m, "DType", "enum.IntEnum")
        .value("F32", DType::F32)
        .value("F16", DType::F16)
        .value("BF16", DType::BF16)
        .value("I8", DType::I8)
        .finalize();
    py::class_<MetricTerms>(m, "MetricTerms")
        .def_property_readonly("number",
                               [](const MetricTerms& terms) { return int(&terms - METRIC_TERMS); })
        .def_property_readonly(
            "differences",
            [](const MetricTerms& terms) { return terms.source == Source::DIFFERENCE; })
        .def_readonly("product", &MetricTerms::product)
        .def_readonly("squares", &MetricTerms::squares)
        .def_readonly("normalized", &MetricTerms::normalized);
    py::dict metrics;  // by name
    for (const MetricTerms& terms : METRIC_TERMS)
        metrics[terms.name] = py::cast(&terms, py::return_value_policy::reference);
    m.attr("METRICS") = metrics;
    py::native_enum<Stat>(m, "Stat", "enum.IntEnum")
        .value("PREFIX_NORM", PREFIX_NORM)
        .value("CODE_SCALE", CODE_SCALE)
        .value("CODE_ERROR", CODE_ERROR)
        .value("TAIL_NORM", TAIL_NORM)
        .value("SIGN_FACTOR", SIGN_FACTOR)
        .finalize();
    py::native_enum<TileStat>(m, "TileStat", "enum.IntEnum")
        .value("CODE_NORM", CODE_NORM)
        .value("ROUNDED_NORM", ROUNDED_NORM)
        .value("TILE_STATS", TILE_STATS)
        .finalize();
    py::class_<Rows>(m, "Rows")
        .def(py::init(&rows_of))
        .def("restricted",
             [](const Rows& rows, Address<uint64_t> mask) { return rows.restricted(mask); })
        .def("numbered", &Rows::numbered)
        .def("name",
             [](const Rows& rows, Address<int64_t> numbers, int64_t count, Address<int64_t> ids) {
                 for (int64_t i = 0; i < count; ++i)
                     ids.at[i] = numbers.at[i] < 0 ? -1 : id_of(rows, numbers.at[i]);
             })
        .def_property_readonly("eligible", &Rows::eligible);
    py::class_<RangeFound>(m, "RangeFound")
        .def_readonly("problem", &RangeFound::problem)
        .def_property_readonly("counts", &RangeFound::counts)
        .def("write", &RangeFound::write);
}

void bind_funnel(py::module_& m) {
    m.def("search", [](const Rows& rows, const QueriesFields& queries, int metric,
                       const std::vector<StageFields>& stages, const RunFields& how,
                       const ResultsFields& results, const Graph* graph) {
        const Run run = run_of(how);
        std::vector<Stage> list;
        for (const StageFields& stage : stages) list.push_back(made_of<Stage>(stage));
        py::gil_scoped_release unlocked;
        return message(search(run, rows, made_of<Queries>(queries), Metric(metric), list,
                              made_of<Results>(results), graph));
    });
    m.def("rerank", [](const Rows& rows, const QueriesFields& queries, int metric,
                       const CandidatesFields& candidates, const StageFields& stage,
                       const RunFields& how, const ResultsFields& results) {
        const Run run = run_of(how);
        py::gil_scoped_release unlocked;
        return message(rerank(run, rows, made_of<Queries>(queries), Metric(metric),
                              made_of<Candidates>(candidates), made_of<Stage>(stage),
                              made_of<Results>(results)));
    });
}

void bind_graph(py::module_& m) {
    py::class_<Graph>(m, "Graph").def(py::init([](const GraphFields& fields) {
        return made_of<Graph>(fields);
    }));
    m.attr("DEGREE") = DEGREE;
    m.attr("ENTRIES") = ENTRIES;
    m.def("node_bytes", [](int64_t width) {
        return std::pair<int64_t, int64_t>(sign_bytes(width), low_bytes(width));
    });
    py::class_<GraphBuilder>(m, "GraphBuilder")
        .def(py::init([](const Rows& rows, int metric, Address<float> centre, int64_t width,
                         const RunFields& how, const GraphArraysFields& to) {
            const Run run = run_of(how);
            py::gil_scoped_release unlocked;
            return std::unique_ptr<GraphBuilder>(new GraphBuilder(run, rows, Metric(metric), centre,
                                                                  width, made_of<GraphArrays>(to)));
        }))
        .def("add", &GraphBuilder::add, py::call_guard<py::gil_scoped_release>())
        .def("finish", &GraphBuilder::finish, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("added", &GraphBuilder::added)
        .def_property_readonly("count", &GraphBuilder::count);
}

void bind_exact(py::module_& m) {
    m.def("exact_search", [](const Rows& rows, const QueriesFields& queries, int metric,
                             const StageFields& stage, const RunFields& how,
                             const ResultsFields& results, Address<int64_t> touched) {
        const Run run = run_of(how);
        py::gil_scoped_release unlocked;
        return message(exact_search(run, rows, made_of<Queries>(queries), Metric(metric),
                                    made_of<Stage>(stage), made_of<Results>(results), touched));
    });
    m.def("set_seed_columns", [](int64_t columns) { seed_columns = columns; });
    m.def("range_search", [](const Rows& rows, const QueriesFields& queries, int metric,
                             int64_t dim, double threshold, const RunFields& how) {
        const Run run = run_of(how);
        std::unique_ptr<RangeFound> found(new RangeFound);
        {
            py::gil_scoped_release unlocked;
            found->problem =
                message(range_search(run, rows, made_of<Queries>(queries), Metric(metric), dim,
                                     threshold, &found->neighbours));
        }
        return found;
    });
}

void bind_store(py::module_& m) {
    m.def("pack_flags", [](Address<uint8_t> flags, int64_t count, Address<uint64_t> words) {
        pack_flags(flags, count, words);
    });
    m.def("store", [](const Rows& rows, const NewRowsFields& vectors, int64_t begin,
                      const RunFields& how, const SpanArraysFields& to) {
        const Run run = run_of(how);
        py::gil_scoped_release unlocked;
        return message(store(run, rows, made_of<NewRows>(vectors), begin, made_of<SpanArrays>(to)));
    });
}

}  // namespace

void bind_search(py::module_& m) {
    bind_types(m);
    bind_funnel(m);
    bind_exact(m);
    bind_graph(m);
    bind_store(m);
}

}  // namespace mrl
