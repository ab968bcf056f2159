# make demo: watch a video and answer questions.  make test: every check that runs on a CPU.
# PIP_INDEX_URL, PIP_FIND_LINKS and pip's own configuration are honoured. PYTHON names another interpreter.
PYTHON ?= python3
PIP = -m pip --disable-pip-version-check install
# transformers and what is released with it; everything else stays pinned in .venv-newest
FREE = ^(transformers|tokenizers|huggingface_hub|hf-xet)==

.PHONY: demo test test-newest test-gpu soak lint clean

demo: .venv/.has-synth
	.venv/bin/python demo/run.py

test: lint
	.venv/bin/python -m pytest

lint: .venv/.has-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy src

# The newest 5.x is asked for at every run, since a stamp would not notice a release.
test-newest: .venv-newest/bin/python
	grep -Ev '$(FREE)' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python $(PIP) --upgrade -c .venv-newest/constraints.txt 'transformers<6' -e '.[dev]'
	.venv-newest/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	.venv-newest/bin/python -m pytest tests/hf

# Needs a CUDA device; the kernels' tests alone also run in Triton's interpreter, where triton is installed.
test-gpu: .venv/.has-dev .venv/.has-gpu
	.venv/bin/python -m pytest tests/gpu -m "gpu or not gpu"

soak: .venv/.has-synth
	.venv/bin/python experiments/soak/run.py

clean:
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache .mypy_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra: installed again only when the requirements change.
.venv/.has-%: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python $(PIP) -c constraints.txt -e '.[$*]'
	@touch $@

# Checked before anything is made: venv leaves half an environment where ensurepip is missing.
.venv/bin/python .venv-newest/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) not found: install Python 3.11 or newer, or run make PYTHON=path'; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.exit(0 if sys.version_info >= (3, 11) else \
	  "$(PYTHON) is Python " + v + ", but 3.11 or newer is needed: run make PYTHON=path/to/a/newer/python3")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make environments (no ensurepip): on Debian and Ubuntu run apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv --clear $(@:/bin/python=)
