# One word per task; the work is in scripts/. `make` alone lists the tasks.
.DEFAULT_GOAL := help
.PHONY: help demo install model check test clean

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo:  ## four servers on this machine, one killed mid-answer; PROMPT="..." make demo
	@scripts/install
	@.venv/bin/python scripts/demo

install:  ## make .venv with everything, developer tools included
	@scripts/install --dev

model:  ## download and check the demo model
	@scripts/install
	@.venv/bin/shoal model get smollm2-135m-instruct

check:  ## format, lint, types, imports, fast tests (under two minutes)
	@scripts/install --dev
	@scripts/check

test:  ## everything, real model and real processes included
	@scripts/install --dev
	@scripts/test

clean:  ## remove .venv and caches (the downloaded model stays)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
