# make demo | quick | test | test-slow | test-processors | fuzz | bench | reproduce | lint | gates |
# gpu-cache; each sets up .venv first if it has to. make sanitize needs a C++ compiler only.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.ready
CXX_FILES := 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/cpp/*.cpp' 'tests/cpp/*.h'

.PHONY: demo quick test test-slow test-processors fuzz lint format bench reproduce gates gpu-cache sanitize clean

demo: $(READY)
	$(BIN)/mrl-fast demo --out demo-out

# On all cores; threads that wait must not spin where others could run. A worker begins with half of
# the tests, in order, and takes some of another's when it has none left.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist worksteal

# A verdict within a minute: lint, what has to be compiled anew, tables, properties, bad input.
quick: $(READY)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CXX_FILES))
	changed=$$(git diff --name-only --diff-filter=d HEAD -- 'mrl_fast/*.py' 'benchmarks/*.py'; \
		git ls-files --others --exclude-standard -- 'mrl_fast/*.py' 'benchmarks/*.py'); \
	test -z "$$changed" || $(BIN)/pyright $$changed
	$(PYTEST) -q -m quick

test: lint sanitize
	$(PYTEST) -m 'not slow' --durations=25
	MRL_FAST_ISA=portable OMP_NUM_THREADS=1 $(HELD_default) $(PYTEST) -q -m quick

# What make test leaves out where there is no GPU: more cases of kernels in Triton's interpreter.
test-slow: $(READY)
	$(PYTEST) -m slow --durations=25

# The suite as on other processors: our kernels on each instruction set that this one has, on one
# thread with MKL and ATen held to AVX2, on two with both held to what every processor has. (An AMD
# takes MKL_CBWR, but not MKL_ENABLE_INSTRUCTIONS.)
HELD_avx2 := MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=avx2
HELD_default := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default
ISAS = $(shell $(BIN)/python -c 'from mrl_fast import _C; print(*_C.available())')
ELSEWHERE := --ignore tests/stress --ignore tests/house -m 'not slow'
test-processors: $(READY)
	set -e; for isa in $(ISAS); do \
		MRL_FAST_ISA=$$isa OMP_NUM_THREADS=1 $(HELD_avx2) $(PYTEST) $(ELSEWHERE); \
		MRL_FAST_ISA=$$isa OMP_NUM_THREADS=2 $(HELD_default) $(PYTEST) $(ELSEWHERE); \
	done

# What the tests do at random for seconds, for half an hour: damaged files, threads, kills.
FUZZ ?= 40
fuzz: $(READY)
	MRL_FAST_FUZZ=$(FUZZ) $(BIN)/pytest -s tests/stress

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CXX_FILES))
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CXX_FILES))

bench: $(READY)
	$(BIN)/pytest benchmarks

# The paper's claims on DATA's Fashion-MNIST and banking77 and a synthetic set, in 40 minutes; goes on
# where it was stopped.
DATA ?= $(MRL_FAST_DATA)
reproduce: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[reproduce]'
	$(BIN)/mrl-fast reproduce --out reproduce-out $(if $(DATA),--data $(DATA))

gates: $(READY)
	$(BIN)/python -m benchmarks.gates.static

# What benchmarks.gpu.run launches, compiled for sm_90 without a GPU: build/gpu-cache.tar.xz travels
# with the checkout. In 20 minutes of two cores.
gpu-cache: $(READY)
	$(BIN)/python -m benchmarks.gpu.cache make --jobs $(JOBS) --report benchmarks/results/gpu_launches.md

# csrc/cpu with tests/cpp: under AddressSanitizer with UndefinedBehaviorSanitizer, under
# ThreadSanitizer, and plain (make cpp). FILTER=words runs tests whose names contain one of them.
#
# Left out, as it costs most of the time and finds nothing more:
# - UndefinedBehaviorSanitizer in the tests' own code, and its checks of null pointers, object sizes
#   and pointer sums, which double a build: AddressSanitizer stops where such a pointer is used;
# - under ThreadSanitizer all kernels but the portable ones, as threads share the same memory in all
#   of them, and the cases that one thread does (RACES_ONLY in tests/cpp).
CPP_TESTED := $(wildcard csrc/cpu/*.cpp csrc/cpu/*/*.cpp tests/cpp/*.cpp tests/cpp/*/*.cpp)
FILTER ?=
flags_of_address := -g1 -fsanitize=address
csrc_flags_of_address := -fsanitize=undefined -fno-sanitize=null,object-size,vptr,pointer-overflow
links_of_address := -fsanitize=address,undefined
flags_of_thread := -g1 -fsanitize=thread -DMRL_PORTABLE_ONLY
links_of_thread := -fsanitize=thread
left_out_of_thread := csrc/cpu/simd/kernels_avx% csrc/cpu/simd/kernels_neon%

sanitize:
	$(MAKE) -j$(JOBS) --no-print-directory cpp-address cpp-thread

.PHONY: cpp
cpp: cpp-plain

objects_of = $(patsubst %.cpp,build/cpp/$(1)/%.o,$(filter-out $(left_out_of_$(1)),$(CPP_TESTED)))

define CPP_TESTS
.PHONY: cpp-$(1)
cpp-$(1): build/cpp/$(1)/run
	UBSAN_OPTIONS=print_stacktrace=1 $$< $$(FILTER)

build/cpp/$(1)/run: $(call objects_of,$(1))
	$$(CXX) $$(links_of_$(1)) -pthread $$^ -ldl -o $$@

build/cpp/$(1)/%.o: %.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(flags_of_$(1)) $$(if $$(filter csrc/%,$$<),$$(csrc_flags_of_$(1))) \
		-fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS -std=c++17 -O1 -fno-omit-frame-pointer \
		-Wall -Wextra -Wno-maybe-uninitialized -DMRL_TEST_METRICS -Icsrc -Itests/cpp -pthread -MMD -MP -c $$< -o $$@

-include $(patsubst %.o,%.d,$(call objects_of,$(1)))
endef
$(foreach name,address thread plain,$(eval $(call CPP_TESTS,$(name))))

# Python sources are used in place. The extension is compiled anew from what changed: setup.py.
$(READY): $(INSTALLED) $(shell find csrc -name '*.cpp' -o -name '*.h')
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(INSTALLED): pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info mrl_fast/*.so demo-out reproduce-out
