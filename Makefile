PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin

.PHONY: help install serve chat test coverage lint types bench clean

help:                          ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: .venv/serve.done      ## the command in .venv/bin (EXTRAS=bench,train,bitsandbytes for more)
	$(if $(EXTRAS),$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]')
	@echo 'Now run: source .venv/bin/activate'

serve: .venv/serve.done        ## the built-in model at http://127.0.0.1:8000 (MODEL=... for another)
	$(BIN)/manyheads serve $(MODEL) --port $(PORT)

chat: .venv/serve.done         ## the built-in model in this terminal
	$(BIN)/manyheads chat $(MODEL)

# a test process more than cores, for a third of the time tests wait for others; threads that wait must not spin
test: lint types               ## everything that a change must pass
	GOMP_SPINCOUNT=1000 $(BIN)/pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal

coverage: .venv/test.done      ## which lines the tests run; takes half as long again
	GOMP_SPINCOUNT=1000 $(BIN)/pytest -n auto --cov=manyheads --cov-report=term:skip-covered

lint: .venv/test.done          ## style, and that imports point down only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: .venv/test.done         ## type hints
	$(BIN)/mypy

bench: .venv/bench.done        ## a load test of the built-in model, with its report in bench-report/ (BENCH=... for options)
	$(BIN)/manyheads bench users --users 1,2,4,8,16 --hold 15 -o bench-report $(BENCH)

clean:                         ## removes .venv and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/python.done:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

.venv/serve.done: .venv/python.done pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/bench.done: .venv/python.done pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

.venv/test.done: .venv/python.done pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
