# `make train_vqa` and `make test` set everything up by themselves: .venv, from requirements.lock; on a GPU machine
# Transformer Engine too. Without a network: make WHEELS=/folder/of/wheels.
# Any target of the workflow works: `make data_X`, `make train_X ARGS="--config lr=5e-6"`, …; `make` lists them.

SHELL := bash
# What a failed recipe says is to be the last on the terminal. make, which would add a line of its own, says nothing when it is
# told to quit (SIGQUIT) and the recipe seems well; its exit code is then 1. Only where make is seen to catch that signal, or it
# would be 0: a script's `make … &` ignores it. With -k or -i make goes on, and says its line. The sleep: gone before make
# waits for it, a recipe would be missed aloud.
# After Ctrl-C make is to die of that signal, or the shell that called it would go on with its loop: make, which has it too,
# waits for all recipes first. SIGTERM, which make hands to this shell alone, is passed on and the recipe's end waited for.
.SHELLFLAGS := -euo pipefail -c ' \
  signals() { set -- $$(sed -n "s/^Sig\(Blk\|Cgt\)://p" /proc/$$PPID/status) && blocked=0x$$1 caught=0x$$2; }; \
  tell() { kill -$$1 $$PPID; sleep 0.2; exit 0; }; \
  end() { local code=$$? left; { read -r left < /proc/$$$$/task/$$$$/children; } 2>/dev/null || true; \
    if [[ $$left ]]; then kill $$left 2>/dev/null || true; while kill -0 $$left; do sleep 0.2; done 2>/dev/null; fi; \
    if [[ $$code == 0 ]] || ! signals; then return; fi; \
    if [[ $$cut ]]; then (( blocked & 2 )) && exit 0 || tell INT; fi; \
    if [[ "$${MAKEFLAGS%% *}" != *[ik]* ]] && (( caught & 4 && !(blocked & 4) )); then tell QUIT; fi; }; \
  cut=; trap "cut=INT; exit 130" INT; trap end EXIT; eval "$$0"'
VENV := .venv
READY := $(VENV)/.ready
STEPS := data inspect preflight train export evaluate report

# Megatron takes a quarter of a minute to import when its bytecode cannot be kept.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: targets setup gpu doctor wheels tensorboard chat test test-slurm test-faults test-consumers soak checks format figures lock clean experiment runs compare schema
.DEFAULT_GOAL := targets

targets: $(READY)
	@$(VENV)/bin/snakemake --quiet all

# `make train_vqa lr=1e-3` is `--config lr=1e-3`; values as they were typed, a quote or a $ among them.
QUOTE := '
OWN := ARGS NAME PYTHON RUN RUNS VENV WHEELS SHELL
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
SETTINGS = $(if $(filter-out $(OWN),$(GIVEN)),--config $(foreach name,$(filter-out $(OWN),$(GIVEN)),'$(name)=$(subst $(QUOTE),'\'',$(value $(name)))'))

define STEP
$(1)_%: $(READY)
	@$(VENV)/bin/snakemake $$@ $$(ARGS) $$(SETTINGS)
endef
$(foreach step,$(STEPS),$(eval $(call STEP,$(step))))

setup: $(READY)

# No such target here: Snakemake makes it, or says what is near.
.DEFAULT:
	@$(MAKE) --no-print-directory --silent setup
	@$(VENV)/bin/snakemake $@ $(ARGS) $(SETTINGS)

# Questions to what a run has learned: make chat RUN=output/stage2_sft_vqa, ARGS="--web" for a page.
chat: $(READY)
	@$(VENV)/bin/python workflow_scripts/chat.py "$(RUN)" $(ARGS)

# A file of tests is run by one of two processes; ARGS="-n 0": one after the other.
test: checks
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Eight ranks; nodes without Slurm; time limits, scancel, a dead node, a killed Snakemake on a real Slurm (root; slurm-wlm, munge): half an hour.
test-slurm: $(READY)
	$(VENV)/bin/python -m pytest -m long tests/test_layouts.py tests/test_nodes.py tests/test_slurm.py $(ARGS)

# Every fault of docs/faults.md in the real chain: about an hour; full disks as root only. `make soak`: random faults for another.
test-faults: $(READY)
	$(VENV)/bin/python -m pytest -m long --timeout 0 tests/faults $(ARGS)

soak: $(READY)
	PYTHONPATH=tests:benchmarks $(VENV)/bin/python -m faults.soak $(ARGS)

# vLLM, lmms-eval, PEFT and others from the package index, each in an environment of its own, against an export: half an hour,
# 17 GB. ARGS="--only vLLM", "--environments /scratch/programs".
test-consumers: $(READY)
	$(MAKE) export_vqa ARGS=
	PYTHONPATH=tests:benchmarks $(VENV)/bin/python -m programs $(ARGS)

checks: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/snakefmt --check --compact-diff Snakefile rules
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/snakefmt Snakefile rules

# A Python ≥ 3.12: PYTHON if set, else the first on PATH, else one that pyenv has installed. Shims of pyenv stand on
# PATH for versions that are not active, so each candidate has to prove itself.
$(READY): requirements.lock pyproject.toml
	@is_new() { "$$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }; \
	python=""; \
	for candidate in $(PYTHON) python3.12 python3.13 python3.14 python3 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python3; do \
	  if is_new "$$candidate"; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.12 or newer found (on PATH, or installed by pyenv)" >&2; \
	  echo "  fix: install one (Debian and Ubuntu: apt install python3 python3-venv; pyenv: pyenv install 3.12)," >&2; \
	  echo "       or name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; \
	fi; \
	echo "setting up $(VENV) with $$("$$python" --version) ($$python)"; \
	[ -x $(VENV)/bin/python ] && is_new $(VENV)/bin/python || { rm -rf $(VENV); "$$python" -m venv $(VENV); }
	@$(VENV)/bin/python workflow_scripts/set_up.py $(if $(WHEELS),--wheels "$(WHEELS)")
	@touch $@

# Transformer Engine, which `make` installs where it finds a GPU: again, after what it lacked has been mended.
gpu: $(READY)
	@$(VENV)/bin/python workflow_scripts/set_up.py --engine $(if $(WHEELS),--wheels "$(WHEELS)")

# What this machine has for training and what it lacks; exit code 1: training cannot run.
doctor: $(READY)
	@$(VENV)/bin/python workflow_scripts/doctor.py $(ARGS)

# For a machine without a network: everything that `make` installs, as wheels, but transformer-engine-torch, which is
# compiled (docs/hardware.md). There: make WHEELS=folder
wheels: FOLDER := $(or $(WHEELS),wheels)
wheels: $(READY)
	$(VENV)/bin/python -m pip download --no-deps --require-hashes -r requirements.lock -d "$(FOLDER)"
	printf '%s\n' uv wheel 'transformer-engine[core-cu13]>=2.20.2,<3' nvidia-cudnn-frontend nvdlfw-inspect onnx onnxscript einops \
	  "nvidia-cuda-nvcc==$$(sed -nE 's/^nvidia-cuda-runtime==([0-9]+\.[0-9]+).*/\1/p' requirements.lock).*" nvidia-cuda-crt | \
	  $(VENV)/bin/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url -c requirements.lock -o "$(FOLDER)/gpu.txt" -
	$(VENV)/bin/python -m pip download --no-deps -r "$(FOLDER)/gpu.txt" -d "$(FOLDER)"

# Curves of all runs while they train, at port 6006: make tensorboard, RUN=output/stage2_sft_vqa for one.
tensorboard: $(READY)
	$(VENV)/bin/tensorboard --logdir "$(or $(RUN),$(exp_dir),output)" $(ARGS)

# A new experiment from the template: make experiment NAME=mydata
experiment:
	@[[ "$${NAME-}" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$$ && $$NAME != *.y*ml ]] || { echo "error: NAME=$${NAME-}: letters, digits, . _ -, at most 100, beginning with a letter, a digit or _, without .yaml"; \
	  echo "  fix: make experiment NAME=mydata"; exit 1; } >&2
	@! [ -e config/experiments/$(NAME).yaml ] || { echo "error: config/experiments/$(NAME).yaml is there already" >&2; exit 1; }
	@sed '/^# Copy to /d; s/NAME/$(NAME)/g; s/<name>/$(NAME)/g' config/experiments/TEMPLATE.yaml > config/experiments/$(NAME).yaml
	@echo "config/experiments/$(NAME).yaml: edit its paths, then make train_$(NAME)"

# State, loss, accuracy and settings of every run, and the command that goes on with it.
runs: $(READY)
	@$(VENV)/bin/python workflow_scripts/list_runs.py $(if $(exp_dir),"$(exp_dir)") $(ARGS)

# One page with runs side by side: make compare RUNS=stage2_sft_a,stage2_sft_b
compare: $(READY)
	@$(VENV)/bin/python workflow_scripts/compare_runs.py "$(RUNS)" $(if $(exp_dir),--exp-dir "$(exp_dir)") $(ARGS)

schema: $(READY)
	$(VENV)/bin/python workflow_scripts/write_schema.py

# All measured figures, goal beside value, shortfalls first.
figures: $(READY)
	@$(VENV)/bin/python benchmarks/results.py

# Pins with hashes; no package server's address in it.
lock: $(READY)
	$(VENV)/bin/uv pip compile --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.12 --extra dev \
	  --upgrade pyproject.toml --output-file requirements.lock --quiet

# What the embedded experiment made, and caches. Your own experiments' output stays.
clean:
	@[ ! -x $(VENV)/bin/python ] || $(VENV)/bin/python workflow_scripts/make_demo_vqa.py --clean $(ARGS)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
