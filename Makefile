# make demo | test | fuzz | bench | reproduce | lint | gates; each sets up .venv first if it has to.
# make sanitize needs a C++ compiler only.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CXX_FILES := 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/cpp/*.cpp' 'tests/cpp/*.h'

.PHONY: demo test fuzz lint format bench reproduce gates sanitize clean

demo: $(READY)
	$(BIN)/mrl-fast demo --out demo-out

# Files of tests at once on all cores; threads that wait must not spin where others could run.
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
test: lint sanitize
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

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

# The engine with tests/cpp, under AddressSanitizer with UndefinedBehaviorSanitizer, and under
# ThreadSanitizer.
SANITIZED := $(wildcard csrc/cpu/*.cpp csrc/cpu/*/*.cpp tests/cpp/*.cpp tests/cpp/*/*.cpp)
checks_of_address := address,undefined
checks_of_thread := thread

sanitize:
	$(MAKE) -j$(JOBS) --no-print-directory sanitize-address sanitize-thread

define SANITIZER
.PHONY: sanitize-$(1)
sanitize-$(1): build/sanitize/$(1)/run
	UBSAN_OPTIONS=print_stacktrace=1 $$<

build/sanitize/$(1)/run: $(SANITIZED:%.cpp=build/sanitize/$(1)/%.o)
	$$(CXX) -fsanitize=$(checks_of_$(1)) -pthread $$^ -ldl -o $$@

build/sanitize/$(1)/%.o: %.cpp
	@mkdir -p $$(@D)
	$$(CXX) -fsanitize=$(checks_of_$(1)) -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS \
		-std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Wno-maybe-uninitialized \
		-Icsrc -Itests/cpp -pthread -MMD -MP -c $$< -o $$@

-include $(SANITIZED:%.cpp=build/sanitize/$(1)/%.d)
endef
$(foreach name,address thread,$(eval $(call SANITIZER,$(name))))

# Rebuilt when what is installed changes; Python sources are used in place.
$(READY): pyproject.toml constraints.txt setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info mrl_fast/*.so demo-out reproduce-out
