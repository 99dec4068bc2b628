"""Which tests the make targets run: chosen here by file and by case, and marked by conftest.py."""

from fnmatch import fnmatch

# `make quick`, and the short form of `make test-processors`: tables, properties, budgets and bad
# input, on cpp and reference.
QUICK = (
    "tests/house/test_shape.py",
    "tests/house/test_suite.py",
    "tests/house/test_testing.py",
    "tests/search/test_exact.py",
    "tests/search/test_ops.py",
    "tests/training/test_cascade.py",
    "tests/training/test_cross_entropy.py",
    "tests/training/test_logits.py",
    "tests/training/test_sigmoid_distill.py",
)

# Files with tests of half a minute go first, so that the last ones to run are short.
FIRST = (
    "tests/house/test_gpu_run.py",
    "tests/house/test_static_gates.py",
    "tests/house/test_imports.py",
    "tests/experiments/test_reproduce.py",
    "tests/stress/test_kills.py",
    "tests/integrations/test_sentence_transformers_training.py",
)

# Of these tests `make test` runs the cases that match, where there is no GPU and kernels are
# interpreted; `make test-slow` runs the others.
SHORT = {
    "tests/house/test_gpu_run.py::test_a_command_launches_what_it_is_for": ("memcheck low",),
    "tests/house/test_static_gates.py::test_every_kernel_on_every_architecture": (),
    "tests/house/test_static_gates.py::test_limits": ("sm_90",),
    "tests/house/test_static_gates.py::test_half_precision_scans_take_five_instructions_a_score": (
        "sm_90",
    ),
    "tests/house/test_static_gates.py::test_limits_are_seen_to_be_broken": ("sm_90*",),
    "tests/experiments/test_reproduce.py::test_report": (),
    "tests/experiments/test_reproduce.py::test_what_has_to_agree": (),
    "tests/experiments/test_reproduce.py::test_goes_on_where_it_was_stopped": (),
    "tests/kernels/test_topk.py::test_a_score_depends_on_nothing_but_the_pair": ("ip",),
    "tests/kernels/test_topk.py::test_chunks_of_queries_that_alone_would_take_another_shape": (
        "l2",
    ),
    "tests/kernels/test_losses.py::test_chunks_of_rows_and_classes": ("plain",),
    "tests/training/test_sigmoid_distill.py::test_distill_error_budget": (
        "*-cpp", "*-reference", "0.05-pair-triton",
    ),
    "tests/training/test_torch_state.py::test_the_same_by_kernels": ("*-bfloat16",),
    "tests/training/test_training.py::test_no_score_matrix_is_held": (
        "8192-8192-33-1", "2-20000-1024-0",
    ),
    "tests/search/test_device_index.py::test_ops_do_not_wait": ("ip",),
    "tests/stress/test_fork.py::test_children_work": ("child", "another*", "while*"),
    "tests/stress/test_interrupts.py::test_interrupts": (
        "exact search", "add", "cross-entropy, backward", "tune",
    ),
    "tests/kernels/test_certified.py::test_exact": ("True-ip", "True-cosine", "False-l2"),
    "tests/kernels/test_certified.py::test_bounds_that_are_the_scores": ("ip-1", "l2-3"),
    "tests/kernels/test_certified.py::test_a_bound_that_is_too_low_shows": ("cosine",),
    "tests/kernels/test_scan.py::test_scan_is_exact": ("*-(5, 1421, 19)", "ip-*", "l2-(3, 700, 1)"),
    "tests/kernels/test_scan.py::test_scan_of_eight_bits": ("ip-*", "cosine-*int8", "l2-*float8*"),
    "tests/kernels/test_scan.py::test_sums_of_a_scan_are_within_its_margin": (
        "*float32-positive-*", "*bfloat16-signs-*", "*.float16-spike-*", "*int8-*",
        "*float8*-positive-*",
    ),
    "tests/kernels/test_scan.py::test_errors_of_the_scan_within_its_margin_change_nothing": (
        "4-ip",
    ),
    "tests/kernels/test_scan.py::test_margins_leave_few_rows_to_be_scored_again": (
        "*float8*-ip-*-768", "*float32-l2-100-256",
    ),
    "tests/search/test_ops.py::test_against_float64": (
        "cpp-*", "triton-*float32-(7, *", "triton-ip-*bfloat16-(8, *",
    ),
}  # fmt: skip


def test_of(nodeid: str) -> str:
    return nodeid.split("[")[0]


def case_of(nodeid: str) -> str:
    return nodeid.partition("[")[2].removesuffix("]")


def is_slow(nodeid: str) -> bool:
    cases = SHORT.get(test_of(nodeid))
    return cases is not None and not any(fnmatch(case_of(nodeid), case) for case in cases)


def is_quick(nodeid: str) -> bool:
    return nodeid.split("::")[0] in QUICK and "triton" not in case_of(nodeid)


def place(nodeid: str) -> int:
    file = nodeid.split("::")[0]
    return FIRST.index(file) if file in FIRST else len(FIRST)
