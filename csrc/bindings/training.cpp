// Bindings of training: folds of nested scores, the scores themselves, and gradients.
#include "bindings/bindings.h"
#include "cpu/training/nested.h"

namespace py = pybind11;

namespace mrl {
namespace {

// Reads a struct's fields from a dict. A field that is missing is 0, or null for an address, unless
// a default is given.
class Fields {
  public:
    explicit Fields(const py::dict& fields) : fields_(fields) {}
    template <class T>
    T get(const char* name, T otherwise = T()) const {
        return fields_.contains(name) ? fields_[name].cast<T>() : otherwise;
    }
    template <class T>
    T* at(const char* name) const {
        return get<Address<T>>(name);
    }

  private:
    const py::dict& fields_;
};

Scores scores_of(const py::kwargs& named) {
    const Fields fields(named);
    Scores s = {};
    s.x = {fields.at<float>("x"), fields.get<int64_t>("x_stride")};
    s.w = {fields.at<float>("w"), fields.get<int64_t>("w_stride")};
    s.rows = fields.get<int64_t>("rows");
    s.cols = fields.get<int64_t>("cols");
    s.dims = fields.get<std::vector<int64_t>>("dims");
    s.bias = fields.at<float>("bias");
    s.row_scale = fields.at<float>("row_scale");
    s.col_scale = fields.at<float>("col_scale");
    s.cols_apart = fields.get<int64_t>("cols_apart");
    s.target = fields.at<int64_t>("target");
    s.first_col = fields.get<int64_t>("first_col");
    s.period = fields.get<int64_t>("period", 1);
    s.exclude_own = fields.get<bool>("exclude_own");
    s.own_boost = fields.get<float>("own_boost", 1.0f);
    s.other_boost = fields.get<float>("other_boost", 1.0f);
    s.soft = fields.at<float>("soft");
    s.soft_stride = fields.get<int64_t>("soft_stride");
    s.mask = fields.at<uint8_t>("mask");
    s.mask_stride = fields.get<int64_t>("mask_stride");
    s.sigmoid = fields.get<bool>("sigmoid");
    return s;
}

Given given_of(const py::dict& named) {
    const Fields fields(named);
    Given given = {};
    given.row_max = fields.at<float>("row_max");
    given.row_log = fields.at<float>("row_log");
    given.d_row = fields.at<float>("d_row");
    given.d_hit = fields.at<float>("d_hit");
    given.d_soft = fields.at<float>("d_soft");
    given.col_max = fields.at<float>("col_max");
    given.col_log = fields.at<float>("col_log");
    given.d_col = fields.at<float>("d_col");
    given.soft_total = fields.at<float>("soft_total");
    given.grad = fields.at<float>("grad");
    given.grad_apart = fields.get<int64_t>("grad_apart");
    given.grad_stride = fields.get<int64_t>("grad_stride");
    return given;
}

FoldOutput fold_output_of(const py::dict& named) {
    const Fields fields(named);
    FoldOutput out = {};
    out.row_max = fields.at<float>("row_max");
    out.row_sum = fields.at<double>("row_sum");
    out.labels = fields.at<int64_t>("labels");
    out.soft_sum = fields.at<double>("soft_sum");
    out.hit = fields.at<float>("hit");
    out.col_max = fields.at<float>("col_max");
    out.col_sum = fields.at<double>("col_sum");
    return out;
}

GradientOutput gradient_output_of(const py::dict& named) {
    const Fields fields(named);
    GradientOutput out = {};
    out.dx = fields.at<float>("dx");
    out.dx_stride = fields.get<int64_t>("dx_stride");
    out.dw = fields.at<float>("dw");
    out.dw_stride = fields.get<int64_t>("dw_stride");
    out.d_row_scale = fields.at<float>("d_row_scale");
    out.d_col_scale = fields.at<float>("d_col_scale");
    out.db = fields.at<float>("db");
    return out;
}

}  // namespace

void bind_training(py::module_& m) {
    m.attr("ROWS") = ROWS;
    m.attr("GROUP_ROWS") = GROUP_ROWS;
    // Fields as in nested.h; period and the two boosts are 1 by default.
    py::class_<Scores>(m, "Scores").def(py::init(&scores_of));
    m.def("fold", [](const Scores& scores, const RunFields& how, const py::dict& out) {
        const Run run = run_of(how);
        const FoldOutput to = fold_output_of(out);
        py::gil_scoped_release unlocked;
        fold(run, scores, to);
    });
    m.def("store_scores", [](const Scores& scores, const RunFields& how, Address<float> out,
                             int64_t out_apart, int64_t out_stride) {
        const Run run = run_of(how);
        py::gil_scoped_release unlocked;
        store_scores(run, scores, out, out_apart, out_stride);
    });
    m.def("gradients", [](const Scores& scores, const RunFields& how, const py::dict& given,
                          int64_t workspace_bytes, const py::dict& out) {
        const Run run = run_of(how);
        const Given from = given_of(given);
        const GradientOutput to = gradient_output_of(out);
        py::gil_scoped_release unlocked;
        gradients(run, scores, from, workspace_bytes, to);
    });
}

}  // namespace mrl
