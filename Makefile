# `make run` and `make test` each set themselves up on a fresh machine: Python 3.11 or newer is enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test check sky cluster-test bench clean

run: .venv/run                      ## two cents: train a GPT on tiny Shakespeare, print its receipt
	$(BIN)/tuppence run

test: .venv/dev                     ## every test that this machine can run, two files at a time; less cluster-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/test_cluster.py $(ARGS)

check: .venv/dev                    ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

sky: .venv/run                      ## SkyPilot, where `tuppence launch` looks for it; prints its Python
	$(BIN)/python -c 'from tuppence.cloud import sky; print(sky.environment())'

cluster-test: .venv/dev             ## launches for real: SkyPilot, on a Slurm of this machine's own (root, ten minutes)
	$(if $(CLUSTER_FOLDER),CLUSTER_FOLDER=$(CLUSTER_FOLDER)) SKY_PYTHON=$${SKY_PYTHON:-$$($(BIN)/python -c 'from tuppence.cloud import sky; print(sky.environment())')} \
	  $(BIN)/python -m pytest tests/test_cluster.py $(ARGS)

bench: .venv/dev                    ## figures of docs/BENCHMARKS.md; NANOGPT=, NANOCHAT= add peers
	$(BIN)/python bench/quickstart.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python bench/prepare.py $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(LLMC),--llmc $(LLMC)) $(if $(CORPUS),--corpus $(CORPUS) --memory)
	$(if $(CORPUS),$(BIN)/python bench/prepare_kills.py --corpus $(CORPUS) --kills 30)
	$(if $(CORPUS),$(BIN)/python bench/vocabularies.py $(CORPUS))
	$(BIN)/python bench/loader.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python bench/packing.py $(if $(CORPUS),--corpus $(CORPUS))
	$(if $(LLMC),$(if $(NANOGPT),$(BIN)/python bench/interchange.py --nanogpt $(NANOGPT) --llmc $(LLMC)))
	$(BIN)/python bench/budget_sweep.py
	$(BIN)/python bench/contention.py
	$(BIN)/python bench/reliability.py --kills 20
	$(BIN)/python bench/planner_accuracy.py
	$(BIN)/python bench/fit_throughput.py --leave-out shape
	$(BIN)/python bench/fit_throughput.py --leave-out framework
	$(BIN)/python bench/fit_loss.py --leave-out size
	$(BIN)/python bench/this_machine.py
	$(BIN)/python bench/looped.py
	$(BIN)/python bench/receipt.py
	$(BIN)/python bench/watching.py
	$(BIN)/python bench/early_stop.py
	$(BIN)/python bench/time_to_loss.py $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(NANOCHAT),--nanochat $(NANOCHAT))
	$(if $(CORPUS),$(BIN)/python bench/families.py --corpus $(CORPUS) $(if $(NANOCHAT),--nanochat $(NANOCHAT)))

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/run

clean:
	rm -rf .venv build *.egg-info
