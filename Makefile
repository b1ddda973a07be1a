# make report    train and test a detector on one class; without more words DRAEM on the built-in class `brick`; METHOD=memory in a minute
# make inspect   RUN=runs/... IMAGES=folder: a trained detector on a folder of new images
# make table     DATA=folder METHODS=draem,padim SEEDS=0,1,2: every class, method, seed and recipe side by side, then the summary; SCHEDULER=tcp://... on a cluster, DRY_RUN=1 the plan only
# make summary   the paper's two tables with the classes of RUNS beside them
# make bench     each fast path against the plain one; runs/bench.json and runs/bench.ipynb
# make gpu       DATA=folder of MVTec AD TEXTURES=folder: what 45 minutes on a GPU can answer, into runs/gpu.json; DRY_RUN=1 on any machine
# make test      everything that is checked
# make test-gpu  the tests that only a GPU can run; without one they are skipped and count as nothing
# make lint      ruff and mypy on the library
# make site      the notebooks with their outputs, the API reference and a gallery of reports as a website in _docs/html
# make mutants   plants faults in a copy of the library, one at a time, and says which of them no test notices
# make torture   kills commands at random moments until 200 kills are done, loads them, and compares bits; more than an hour
# make lowest    the tests with the lowest versions that settings.ini allows, in .venv/lowest; some 6 GB on the disk
# make hashes    requirements-hashed.txt: every package with the sha256 of its files
# make sbom      sbom.json: the same as a software bill of materials
# make readme    README.md from nbs/index.ipynb, and the links at the end of every notebook
# Each makes .venv first, if it is missing or older than what it is made from.

CATEGORY ?= brick
RECIPE ?= demo
METHOD ?=
SEED ?= 0
RUNS ?= runs
# make report CATEGORY=screw DATA=/data/mvtec TEXTURES=/data/dtd/images RECIPE=official OVERRIDES='{"steps": 5000}' RUN=runs/mine
DATA ?=
TEXTURES ?=
OVERRIDES ?=
KINDS ?=
DEVICE ?=
RUN ?=
IMAGES ?=
# make table CATEGORIES=brick,grass SEEDS=0,1,2 RECIPE=demo,official WORKERS=2 THREADS=1 TIME_LIMIT=3600
CATEGORIES ?=
METHODS ?=
SEEDS ?= 0
SCHEDULER ?=
WORKERS ?=
THREADS ?=
TIME_LIMIT ?=
DRY_RUN ?=
# make gpu MORE='{"capsules": "/data/visa"}' MINUTES=45
MORE ?=
MINUTES ?=
PYTHON ?= python3

bin := .venv/bin
made := .venv/made
site_made := .venv/site_made
# $(call option,--name,value): the option where there is a value, else nothing
option = $(if $(2),$(1) '$(2)')

.PHONY: help report inspect table summary bench gpu test test-gpu lint site mutants torture lowest hashes sbom readme
help:
	@sed -n '/^#/!q; s/^# //p' '$(firstword $(MAKEFILE_LIST))'

report: $(made)
	$(bin)/draem_nb category --category '$(CATEGORY)' --recipe '$(RECIPE)' --seed $(SEED) $(call option,--method,$(METHOD)) $(call option,--data-root,$(DATA)) \
	  $(call option,--textures-root,$(TEXTURES)) $(call option,--overrides,$(OVERRIDES)) $(call option,--kinds,$(KINDS)) $(call option,--device,$(DEVICE)) $(call option,--run-dir,$(RUN))

inspect: $(made)
	$(bin)/draem_nb inspect $(call option,--run-dir,$(RUN)) $(call option,--images,$(IMAGES)) $(call option,--device,$(DEVICE))

table: $(made)
	$(bin)/draem_nb table --recipes '$(RECIPE)' --seeds '$(SEEDS)' --runs-dir '$(RUNS)' $(call option,--categories,$(CATEGORIES)) $(call option,--methods,$(METHODS)) $(call option,--data-root,$(DATA)) \
	  $(call option,--textures-root,$(TEXTURES)) $(call option,--overrides,$(OVERRIDES)) $(call option,--device,$(DEVICE)) $(call option,--scheduler,$(SCHEDULER)) \
	  $(call option,--workers,$(WORKERS)) $(call option,--threads,$(THREADS)) $(call option,--time-limit,$(TIME_LIMIT)) $(if $(DRY_RUN),--dry-run)

summary: $(made)
	$(bin)/draem_nb summary --runs-dir '$(RUNS)'

bench: $(made)
	mkdir -p runs
	$(bin)/papermill nbs/30_benchmarks.ipynb runs/bench.ipynb
	@$(bin)/python -c 'import json, pandas; bench = json.load(open("runs/bench.json")); \
	  print(pandas.Series(bench["memory_mib"], name="MiB").round().to_string(), pandas.DataFrame(bench["rows"]).round(2).to_string(index=False), sep="\n\n")'

gpu: $(made)
	mkdir -p runs
	$(bin)/papermill nbs/31_gpu.ipynb runs/gpu$(if $(DRY_RUN),-dry-run).ipynb $(if $(DRY_RUN),-p dry_run True) $(call option,-p data_root,$(DATA)) \
	  $(call option,-p textures_root,$(TEXTURES)) $(call option,-p more,$(MORE)) $(call option,-p minutes,$(MINUTES))

test: $(made)
	$(bin)/python tests/run_all.py

test-gpu: $(made)
	$(bin)/pytest -q -rs -s -p no:cacheprovider tests/test_gpu.py

lint: $(made)
	$(bin)/ruff check
	$(bin)/mypy

site: $(site_made)
	$(bin)/python site/build.py

mutants: $(made)
	$(bin)/python tests/mutants.py

torture: $(made)
	$(bin)/python tests/torture.py

lowest: $(made)
	$(bin)/python tests/lowest.py .venv/lowest

hashes sbom: $(made)
	$(bin)/python tests/lock.py $@

readme: $(made)
	$(bin)/python nbs/make_links.py
	$(bin)/python nbs/make_readme.py

# The stamp comes last: an environment that was interrupted is made anew.
$(made): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo 'Making .venv with the packages of constraints.txt; this takes a minute or more.'
	$(PYTHON) -m venv --clear .venv
	$(bin)/pip install --quiet --constraint constraints.txt setuptools wheel
	$(bin)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

$(site_made): $(made)
	$(bin)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[site]'
	touch $@
