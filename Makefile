# Two commands that need only Python (3.11 or newer) and make:
#
#   make demo    trains on procedural shapes, draws every class, writes runs/demo/index.html
#   make test    format, lint, tests; make test-all: those that compile long, too;
#                make test-page: those of the page in a browser alone; make page-env: what
#                they need, installed
#
# Each makes its environment when it is missing or when pyproject.toml or constraints.txt changed.
# PYTHON=python3.12 uses an environment of its own. OUT= is the folder of the demo; ARGS= goes to
# `tokgen demo` or to pytest. Plain enough for the GNU make 3.81 of macOS and for BSD make.

PYTHON ?= python3
OUT ?= runs/demo
ARGS ?=

# Says the environment's name, which contains the Python version, or why there is none.
NAME = import sys; v = sys.version_info[:2]; \
	v < (3, 11) and sys.exit("tokgen needs Python 3.11 or newer; $(PYTHON) is %d.%d; " \
	"remedy: make $@ PYTHON=python3.12" % v); sys.stdout.write(".venv-%d.%d" % v)

# The line below gives it its value: a makefile cannot ask a shell in the same words everywhere.
ENV = .venv
# Two workers of pytest-xdist: each begins with a half of the files, so that fixtures of a file, and
# what it compiles, are made once. Test by test, as is the default, takes an eighth longer.
SHARED = -n 2 --dist worksteal
PIP = $(ENV)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt

.PHONY: demo test test-all test-page page-env \
	demo-in-env test-in-env test-all-in-env test-page-in-env page-env-in-env
.NOTPARALLEL:

# A stamp is the last thing written. `unfinished` outlives an interrupted installation, whose
# environment is then made anew: pip cannot tell a half-written package from a whole one.
demo test test-all test-page page-env:
	@name=`$(PYTHON) -c '$(NAME)'` || exit 1; \
	if [ -e "$$name/unfinished" ]; then rm -rf "$$name"; fi; \
	$(MAKE) -s ENV="$$name" $@-in-env

demo-in-env: $(ENV)/demo.stamp
	$(ENV)/bin/tokgen demo --overwrite --out "$(OUT)" $(ARGS)

test-in-env: $(ENV)/test.stamp
	$(ENV)/bin/ruff format --check .
	$(ENV)/bin/ruff check .
	$(ENV)/bin/python -m pytest $(SHARED) $(ARGS)

test-all-in-env: $(ENV)/browser.stamp $(ENV)/notebooks.stamp
	$(ENV)/bin/python -m pytest $(SHARED) -m "" $(ARGS)

test-page-in-env: $(ENV)/browser.stamp
	$(ENV)/bin/python -m pytest -m "" tests/app $(ARGS)

page-env-in-env: $(ENV)/browser.stamp

$(ENV)/demo.stamp: pyproject.toml constraints.txt
	@echo "installing tokgen into $(ENV) (some minutes the first time)"
	@mkdir -p $(ENV) && touch $(ENV)/unfinished
	$(PYTHON) -m venv $(ENV)
	$(PIP) --upgrade pip
	$(PIP) -e .
	@rm $(ENV)/unfinished
	@touch $@

$(ENV)/test.stamp: $(ENV)/demo.stamp
	@echo "installing what the tests need into $(ENV)"
	@touch $(ENV)/unfinished
	$(PIP) --group test --group lint
	@rm $(ENV)/unfinished
	@touch $@

$(ENV)/browser.stamp: $(ENV)/test.stamp
	@echo "installing what the tests of the page need into $(ENV)"
	@$(PIP) --dry-run --group browser # where it cannot be had, the environment stays as it is
	@touch $(ENV)/unfinished
	$(PIP) --group browser
	@rm $(ENV)/unfinished
	@touch $@

$(ENV)/notebooks.stamp: $(ENV)/test.stamp
	@echo "installing what runs notebooks into $(ENV)"
	@touch $(ENV)/unfinished
	$(PIP) --group notebooks
	@rm $(ENV)/unfinished
	@touch $@
