# make demo   real images -> shards -> pretraining -> evaluation -> export -> a report, in one go
# make test   all tests        make check  lint, types, layers, spelling        make bench  benchmarks
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# a folder of your own images; empty takes the images that scikit-image ships
DATA   ?=
# how often each random fault of `make soak` is repeated
SOAK_REPEATS ?= 20

.PHONY: setup demo test check bench soak constraints launch-files clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("frepa needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: setup
	$(BIN)/python tools/demo.py $(if $(DATA),--data '$(DATA)')

# tests wait more than they compute, so four run at once, of one thread each
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder --durations=10

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: setup
	$(BIN)/python tools/bench_hf.py
	$(BIN)/python tools/bench_codecs.py
	$(BIN)/python tools/bench_build.py
	$(BIN)/python tools/bench_order.py
	$(BIN)/python tools/bench_loader.py
	$(BIN)/python tools/bench_plan.py
	$(BIN)/python tools/bench_s3.py
	$(BIN)/python tools/bench_train.py
	$(BIN)/python tools/bench_checkpoint.py
	$(BIN)/python tools/bench_telemetry.py
	$(BIN)/python tools/bench_corruption.py
	$(BIN)/python tools/bench_losses.py
	$(BIN)/python tools/bench_backbones.py
	$(BIN)/python tools/bench_volume.py
	$(BIN)/python tools/bench_leakage.py

soak: setup
	FREPA_SOAK_REPEATS=$(SOAK_REPEATS) $(BIN)/python -m pytest -m soak

# from an empty environment, the newest versions that pyproject.toml allows
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --disable-pip-version-check --quiet '.[demo,dev,kuberay]'
	{ echo '# Versions that `make setup` installs and CI tests; `make constraints` writes this file anew.'; \
	  build/constraints/bin/python -m pip freeze | grep -vE '^(frepa|pip|setuptools|wheel)[= @]'; } > constraints.txt

# what cluster/templates gives with the default settings
launch-files: setup
	for target in slurm kubernetes docker; do $(BIN)/frepa launch render --target $$target --out cluster/$$target; done
	$(BIN)/frepa launch render --target kuberay --out cluster/kubernetes/kuberay

clean:
	rm -rf $(VENV) build dist runs
