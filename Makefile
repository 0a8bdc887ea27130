# Everything runs inside .venv, made from requirements.txt on first use. PYTHON picks the
# interpreter (3.11–3.13). On Windows, or without make: the same steps are in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements-installed
# PyTorch's own index of CPU builds. Where it cannot be reached, pip takes what it finds.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# The kernel uses local sockets: no port is opened, and nbconvert prints no warning.
NBCONVERT := $(BIN)/jupyter nbconvert --log-level=WARN --KernelManager.transport=ipc

.PHONY: run test test-fast lab demo bench check lint clean

run: $(STAMP)
	@echo "Running pixart.ipynb, which takes a few minutes …"
	@$(NBCONVERT) --to notebook --execute --output-dir build pixart.ipynb
	@$(NBCONVERT) --to markdown build/pixart.ipynb
	@echo "The executed notebook: build/pixart.ipynb"
	@echo "Its images:            build/pixart_files/"

# nbval runs a copy: models left in models/ by an earlier run would shorten the progress bars.
test: check
	@$(BIN)/python -m pytest tests
	@rm -rf build/nbval
	@$(BIN)/python -m benchmarks notebook --copy-to build/nbval
	@cd build/nbval && $(CURDIR)/$(BIN)/python -m pytest --nbval \
	  --nbval-sanitize-with $(CURDIR)/tests/nbval_sanitize.cfg pixart.ipynb

test-fast: check
	@$(BIN)/python -m pytest tests -m "not slow"

lab: $(STAMP)
	@$(BIN)/jupyter lab pixart.ipynb

demo: $(STAMP)
	@$(BIN)/python gradio_helper.py

# BENCH_CASES=… BENCH_ENGINES=… choose, QUICK=1 ends within five minutes, FRESH=1 starts anew.
is_on = $(filter-out 0 no false,$(1))
bench: $(STAMP)
	@$(BIN)/python -m benchmarks speed --cases="$(BENCH_CASES)" --engines="$(BENCH_ENGINES)" \
	  $(if $(call is_on,$(QUICK)),--quick) $(if $(call is_on,$(FRESH)),--fresh)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lint: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf build models

# CPU-only PyTorch first: the default Linux build would bring several GB of CUDA libraries along.
# JupyterLab's announcements plugin asks whether it may fetch news from the internet: off.
$(STAMP): requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --no-deps --retries 1 --extra-index-url $(TORCH_CPU_INDEX) \
	  "$$(grep -o '^torch==[^ ]*' requirements.txt)"
	@$(BIN)/pip install -q -r requirements.txt
	@$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements \
	  >/dev/null 2>&1 || echo "JupyterLab may ask whether to fetch news."
	@touch $@
