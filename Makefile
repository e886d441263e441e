# What there is to do here: `make help` lists it. It needs Node.js 20 or later, and make.

.DEFAULT_GOAL := help
.PHONY: help install check test test-versions soak demo dev bench build

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: node_modules/.package-lock.json ## install the npm packages

node_modules/.package-lock.json: package.json package-lock.json
	@npm ci >&2
	@touch $@

check: install ## type check and lint
	@npm run -s check

test: install ## run the tests on real servers; ARGS='cache' runs the files of tests/ with cache in their path, DATABASE_URL=… uses that server
	@npm run -s test -- $(ARGS)

test-versions: install ## run the tests on PostgreSQL 15, 16 and 18 as well (npm has them)
	for version in 15 16 18; do PG_VERSION=$$version npm run -s test -- $(ARGS) || exit; done

soak: install ## run 100,000 random operations against a model (OPERATIONS=… as many); SEED=… and PATH_TO=… repeat a failure
	@npm run -s soak

demo: install ## replay an hour of LLM traffic and prove every cent; ARGS='--help' lists the options
	@npm run -s demo -- $(ARGS)

dev: install ## run all servers with a small world until Ctrl-C, and print where they are
	@node --import tsx scripts/dev.ts $(ARGS)

bench: install ## measure against the baselines; ARGS picks some
	@npm run -s bench -- $(ARGS)

build: install ## compile src/ to dist/
	@npm run -s build
