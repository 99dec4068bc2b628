// mrl_fast._C: raw pointers and sizes, as integers; the callers own the arrays and have checked
// them.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/memory.h"
#include "cpu/search/search.h"
#include "cpu/simd/kernels.h"
#include "cpu/threads.h"
#include "cpu/training/nested.h"

namespace py = pybind11;
using namespace mrl;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
T get(const py::dict& fields, const char* name, T otherwise = T()) {
    return fields.contains(name) ? fields[name].cast<T>() : otherwise;
}

const Kernels& kernels_named(const std::string& name) {
    const std::vector<const Kernels*> available = available_kernels();
    if (name.empty()) return *available.front();
    for (const Kernels* kernels : available)
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("isa: this processor has no " + name);
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

// What a range search found, of a size that is known only now.
struct RangeFound {
    std::string problem;
    std::vector<std::vector<Neighbour>> neighbours;  // [queries]
    std::vector<int64_t> counts() const {
        std::vector<int64_t> counts;
        for (const auto& mine : neighbours) counts.push_back(mine.size());
        return counts;
    }
    void write(float* scores, int64_t* ids) const {
        for (const auto& mine : neighbours)
            for (const Neighbour& neighbour : mine) {
                *scores++ = neighbour.score;
                *ids++ = neighbour.id;
            }
    }
};

// Whether a signal's handler raised: that is then this thread's error.
bool signal_raised() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    stop_where(signal_raised);
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            std::rethrow_exception(error);
        } catch (const Interrupted&) {
            // `signal_raised` has set the error.
        }
    });
    m.attr("TILE") = TILE;
    m.attr("ROWS") = ROWS;
    m.attr("GROUP_ROWS") = GROUP_ROWS;
    py::native_enum<DType>(m, "DType", "enum.IntEnum")
        .value("F32", DType::F32)
        .value("F16", DType::F16)
        .value("BF16", DType::BF16)
        .finalize();
    py::native_enum<Metric>(m, "Metric", "enum.IntEnum")
        .value("IP", Metric::IP)
        .value("COSINE", Metric::COSINE)
        .value("L2", Metric::L2)
        .finalize();
    py::native_enum<Stat>(m, "Stat", "enum.IntEnum")
        .value("PREFIX_NORM", PREFIX_NORM)
        .value("CODE_SCALE", CODE_SCALE)
        .value("CODE_ERROR", CODE_ERROR)
        .value("TAIL_NORM", TAIL_NORM)
        .finalize();
    m.def("use_openmp", [](const std::string& library) { return use_openmp(library.c_str()); });
    m.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available_kernels()) names.push_back(kernels->name);
        return names;
    });
    m.def("advise_huge_pages",
          [](uintptr_t begin, size_t bytes) { advise_huge_pages(at<void>(begin), bytes); });
    // Spans are tuples (first, rows, packed, codes, tail, stride, stats, stats_stride, ids) in
    // order.
    py::class_<Rows>(m, "Rows")
        .def(py::init(
            [](const std::vector<std::tuple<int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                                            int64_t, uintptr_t, int64_t, uintptr_t>>& spans,
               int64_t packed_dim, int64_t code_dim, int dtype,
               const std::vector<int64_t>& levels) {
                Rows rows = {{}, packed_dim, code_dim, DType(dtype), levels};
                for (const auto& [first, n, packed, codes, tail, stride, stats, stats_stride, ids] :
                     spans)
                    rows.spans.push_back({first, n, at<float>(packed), at<uint8_t>(codes),
                                          at<void>(tail), stride, at<float>(stats), stats_stride,
                                          at<int64_t>(ids)});
                return rows;
            }))
        .def("restricted",
             [](const Rows& rows, uintptr_t mask) { return rows.restricted(at<uint64_t>(mask)); })
        .def_property_readonly("eligible", &Rows::eligible);
    m.def("pack_flags", [](uintptr_t flags, int64_t count, uintptr_t words) {
        pack_flags(at<uint8_t>(flags), count, at<uint64_t>(words));
    });
    m.def("search", [](const Rows& rows, uintptr_t queries, int64_t num_queries,
                       int64_t query_stride, int metric,
                       const std::vector<std::pair<int64_t, int64_t>>& stages, int threads,
                       const std::string& isa, uintptr_t scores, uintptr_t ids) {
        const Kernels& kernels = kernels_named(isa);
        std::vector<Stage> list;
        for (const auto& [dim, keep] : stages) list.push_back({dim, keep});
        py::gil_scoped_release unlocked;
        return message(search(kernels, rows, {at<float>(queries), num_queries, query_stride},
                              Metric(metric), list, threads, at<float>(scores), at<int64_t>(ids)));
    });
    m.def("exact_search", [](const Rows& rows, uintptr_t queries, int64_t num_queries,
                             int64_t query_stride, int metric, int64_t dim, int64_t k, int threads,
                             const std::string& isa, uintptr_t scores, uintptr_t ids,
                             uintptr_t touched) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        return message(exact_search(kernels, rows, {at<float>(queries), num_queries, query_stride},
                                    Metric(metric), dim, k, threads, at<float>(scores),
                                    at<int64_t>(ids), at<int64_t>(touched)));
    });
    m.def("range_search", [](const Rows& rows, uintptr_t queries, int64_t num_queries,
                             int64_t query_stride, int metric, int64_t dim, double threshold,
                             int threads, const std::string& isa) {
        const Kernels& kernels = kernels_named(isa);
        std::unique_ptr<RangeFound> found(new RangeFound);
        {
            py::gil_scoped_release unlocked;
            found->problem =
                message(range_search(kernels, rows, {at<float>(queries), num_queries, query_stride},
                                     Metric(metric), dim, threshold, threads, &found->neighbours));
        }
        return found;
    });
    py::class_<RangeFound>(m, "RangeFound")
        .def_readonly("problem", &RangeFound::problem)
        .def_property_readonly("counts", &RangeFound::counts)
        .def("write", [](const RangeFound& found, uintptr_t scores, uintptr_t ids) {
            found.write(at<float>(scores), at<int64_t>(ids));
        });
    m.def("rerank",
          [](const Rows& rows, uintptr_t queries, int64_t num_queries, int64_t query_stride,
             int metric, uintptr_t candidates, int64_t count, int64_t dim, int64_t k, int threads,
             const std::string& isa, uintptr_t scores, uintptr_t ids) {
              const Kernels& kernels = kernels_named(isa);
              py::gil_scoped_release unlocked;
              return message(rerank(kernels, rows, {at<float>(queries), num_queries, query_stride},
                                    Metric(metric), at<int64_t>(candidates), count, dim, k, threads,
                                    at<float>(scores), at<int64_t>(ids)));
          });
    m.def("store", [](const Rows& rows, uintptr_t data, int dtype, int64_t stride, int64_t dim,
                      int64_t begin, int64_t n, int threads, const std::string& isa,
                      uintptr_t packed, uintptr_t codes, uintptr_t stats, int64_t stats_stride,
                      uintptr_t tail, int64_t tail_stride) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        return message(store(kernels, rows, at<void>(data), DType(dtype), stride, dim, begin, n,
                             threads, at<float>(packed), at<uint8_t>(codes), at<float>(stats),
                             stats_stride, at<void>(tail), tail_stride));
    });
    // Fields as in nested.h; an address that is not named is null, a factor 1, a flag false.
    py::class_<Scores>(m, "Scores").def(py::init([](const py::kwargs& fields) {
        Scores s = {};
        s.x = {at<float>(get<uintptr_t>(fields, "x")), get<int64_t>(fields, "x_stride")};
        s.w = {at<float>(get<uintptr_t>(fields, "w")), get<int64_t>(fields, "w_stride")};
        s.rows = get<int64_t>(fields, "rows");
        s.cols = get<int64_t>(fields, "cols");
        s.dims = fields["dims"].cast<std::vector<int64_t>>();
        s.bias = at<float>(get<uintptr_t>(fields, "bias"));
        s.row_scale = at<float>(get<uintptr_t>(fields, "row_scale"));
        s.col_scale = at<float>(get<uintptr_t>(fields, "col_scale"));
        s.cols_apart = get<int64_t>(fields, "cols_apart");
        s.target = at<int64_t>(get<uintptr_t>(fields, "target"));
        s.first_col = get<int64_t>(fields, "first_col");
        s.period = get<int64_t>(fields, "period", 1);
        s.exclude_own = get<bool>(fields, "exclude_own");
        s.own_boost = get<float>(fields, "own_boost", 1.0f);
        s.other_boost = get<float>(fields, "other_boost", 1.0f);
        s.soft = at<float>(get<uintptr_t>(fields, "soft"));
        s.soft_stride = get<int64_t>(fields, "soft_stride");
        s.mask = at<uint8_t>(get<uintptr_t>(fields, "mask"));
        s.mask_stride = get<int64_t>(fields, "mask_stride");
        s.sigmoid = get<bool>(fields, "sigmoid");
        return s;
    }));
    m.def("fold", [](const Scores& scores, int threads, const std::string& isa, uintptr_t row_max,
                     uintptr_t row_sum, uintptr_t labels, uintptr_t soft_sum, uintptr_t hit,
                     uintptr_t col_max, uintptr_t col_sum) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        fold(kernels, scores, threads, at<float>(row_max), at<double>(row_sum), at<int64_t>(labels),
             at<double>(soft_sum), at<float>(hit), at<float>(col_max), at<double>(col_sum));
    });
    m.def("store_scores", [](const Scores& scores, int threads, const std::string& isa,
                             uintptr_t out, int64_t out_apart, int64_t out_stride) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        store_scores(kernels, scores, threads, at<float>(out), out_apart, out_stride);
    });
    m.def("gradients",
          [](const Scores& scores, int threads, const std::string& isa, const py::dict& given,
             int64_t workspace_bytes, uintptr_t dx, int64_t dx_stride, uintptr_t dw,
             int64_t dw_stride, uintptr_t d_row_scale, uintptr_t d_col_scale, uintptr_t db) {
              const Kernels& kernels = kernels_named(isa);
              const auto array = [&](const char* name) {
                  return at<const float>(get<uintptr_t>(given, name));
              };
              const Given from = {array("row_max"),
                                  array("row_log"),
                                  array("d_row"),
                                  array("d_hit"),
                                  array("d_soft"),
                                  array("col_max"),
                                  array("col_log"),
                                  array("d_col"),
                                  array("soft_total"),
                                  array("grad"),
                                  get<int64_t>(given, "grad_apart"),
                                  get<int64_t>(given, "grad_stride")};
              py::gil_scoped_release unlocked;
              gradients(kernels, scores, from, threads, workspace_bytes, at<float>(dx), dx_stride,
                        at<float>(dw), dw_stride, at<float>(d_row_scale), at<float>(d_col_scale),
                        at<float>(db));
          });
}
