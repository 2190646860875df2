# Two commands set everything up: `make demo` and `make test`. Everything else uses the same environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# an nvcc from pip where CUDA kernels are wanted and none is installed
GROUPS := --group dev $(if $(filter ON 1,$(KFAC_CUDA)),$(if $(shell command -v nvcc),,--group cuda))
CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h')

.PHONY: setup build demo test lint format bench bench-quick bench-report bench-peers rivals hard sanitize sanitize-address sanitize-thread zoo zoo-quick gpu-check gpu-bench cuda-report clean test-thorough test-types test-zoo wheel wheels docs

setup: $(READY)

# pip 25.1 is the first that reads [dependency-groups]
$(READY): pyproject.toml setup.py CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'pip>=25.1'
	$(BIN)/pip install --quiet $(GROUPS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --editable ".[all]"
	touch $@

# after a change to a C++ file
build: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/*-cpython-*/ --target _C

demo: setup
	$(BIN)/flatprune run --data digits --model mlp --target-params 0.1 --epochs 200 --compare-dense --compare-no-flatness --measure-latency --out runs/demo --overwrite

# a process for each core; a file of tests stays in one, with what its tests share
test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# more networks and larger sizes of the same, minutes
test-thorough: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m thorough

# what pyright, too, says of examples and README's code
test-types: setup
	$(BIN)/pip install --quiet --group types
	$(BIN)/python -m pytest -m thorough tests/examples/test_types.py

# the site, with the API page from docstrings; warnings and broken links are errors -> build/site
docs: setup
	$(BIN)/pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# the sdist, and for each of PYTHONS a wheel built from it in isolation, repaired for other machines, and tried where nothing
# but it and torch is installed -> build/wheels
PYTHONS ?= $(PYTHON)
TORCH ?= torch==2.13.0
wheel: setup
	$(BIN)/pip install --quiet --group wheel
	rm -rf build/sdist build/wheels && mkdir -p build/wheels
	$(BIN)/python -m build --sdist --outdir build/sdist .
	set -e; for python in $(PYTHONS); do \
		rm -rf build/bare && $$python -m venv build/bare; \
		build/bare/bin/pip wheel --quiet --no-deps --wheel-dir build/bare/built build/sdist/*.tar.gz; \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir build/bare/repaired build/bare/built/*.whl; \
		build/bare/bin/pip install --quiet "$(TORCH)" build/bare/repaired/*.whl; \
		(cd build/bare && bin/python ../../tests/smoke.py); \
		mv build/bare/repaired/*.whl build/wheels; \
	done

# the same for all Pythons and older systems, in containers
wheels: setup
	$(BIN)/pip install --quiet cibuildwheel
	$(BIN)/cibuildwheel --output-dir build/wheels

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# every case, for half an hour and more; what is measured is in bench/results at once, also if you stop it
bench: setup
	$(BIN)/python -m pytest bench --capture=no --bench-fresh

bench-quick: setup
	$(BIN)/python -m pytest bench --capture=no --bench-fresh --quick

# docs/benchmarks.md and .png, and the tables of a GPU in docs/kernels.md, from the newest full results
bench-report: setup
	$(BIN)/python -m bench.report

# the other libraries, to be measured beside; torchvision's wheel, which two of them ask for, breaks a CPU-only torch
bench-peers: setup
	$(BIN)/pip install --quiet --group bench
	$(BIN)/pip uninstall --quiet --yes torchvision

# the whole method against other whole methods, with images from the folder DATA: days on one core, goes on where it was
# stopped -> build/rivals, docs/results.md; RIVALS="--tasks fashion --seeds 3 --minutes 60" for a part of it
DATA ?= data
RIVALS ?=
rivals: setup
	$(BIN)/pip install --quiet --group rivals
	$(BIN)/python -m bench.rivals --data-dir $(DATA) $(RIVALS); status=$$?; test $$status -eq 0 -o $$status -eq 3
	$(BIN)/python -m bench.rivals --report $(RIVALS)

# random and hostile calls, damaged files, kills: one table of what came of them; HARD="--size full" for a night
HARD ?=
hard: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.hard $(HARD)

# the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer, each in a build folder of its
# own: programs of tests/native, then random and hostile calls; SANITIZE="--cases 5000" for more than a thousand
SANITIZE ?=
sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench.hard.sanitize $(@:sanitize-%=%) $(SANITIZE)

# networks that people train, in an environment of their own, two gigabytes large: what of each can be pruned, and is a cut
# what masking is -> bench/results/zoo.json, docs/networks.md; hours, goes on where it was stopped; ZOO="--fresh" begins anew
ZOO ?=
ZOO_READY := .venv-zoo/.ready
RUN_ZOO = PYTHONPATH="$(CURDIR):$(CURDIR)/python" OMP_NUM_THREADS=1 .venv-zoo/bin/python -m bench.zoo $(ZOO)

$(ZOO_READY): pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/pip install --quiet 'pip>=25.1'
	.venv-zoo/bin/pip install --quiet --group zoo
	touch $@

zoo: setup $(ZOO_READY)
	$(RUN_ZOO) --write docs/networks.md

# a dozen of them, in minutes, beside the committed results
zoo-quick: setup $(ZOO_READY)
	$(RUN_ZOO) --fresh --results build/zoo/quick.json --quick

# inside trainers that only the zoo's environment has
test-zoo: setup $(ZOO_READY)
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" .venv-zoo/bin/python -m pytest tests/integrations/test_ultralytics.py tests/integrations/test_timm.py

# on a machine with a GPU, in a Python that has torch with CUDA, without network: builds, tests and sanitizes in 5 minutes,
# measures in 6 -> build/gpu (or the folder $OUT): gpu-check.json, gpu-bench.json, logs; GPU="--dry" tries them on the CPU
GPU ?=
gpu-check gpu-bench:
	$(PYTHON) -m bench.gpu $(@:gpu-%=%) $(GPU)

# registers, spills and shared memory of the CUDA kernels, from the last build, into docs/kernels.md
cuda-report: setup
	$(BIN)/python -m bench.gpu.compiled --write docs/kernels.md

clean:
	rm -rf $(VENV) .venv-zoo build runs *.egg-info kfac_ext/*.so
