# `make demo` and `make test` need Python 3.11, gcc and CMake; everything else comes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt
NATIVE := src/tersenet/_terse.so

.PHONY: demo test quick check wheel bench docs clean

demo: .venv/demo $(NATIVE)
	$(BIN)/python examples/digits.py

test: .venv/test $(NATIVE)
	$(BIN)/python -m pytest -n logical --dist loadfile

quick: .venv/test $(NATIVE)
	$(BIN)/python -m pytest -n logical --dist loadfile -m "not slow"

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# dist/ gets an sdist and, made from that, a wheel for this platform; ls fails where no compiler made the C core of it.
# On Linux auditwheel then says how old a C library may be (manylinux), since indices take no wheel for linux_x86_64.
wheel: .venv/release
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	@for wheel in dist/*-linux_*.whl; do test ! -e $$wheel || \
	    { PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist $$wheel && rm $$wheel; } || exit 1; done
	@ls dist/*.tar.gz dist/*-py3-none-[!a]*.whl

# A table of bench/, run by hand: make bench NAME=codecs
bench: .venv/bench $(NATIVE)
	$(BIN)/python bench/$(NAME).py

# The documentation as a site in site/; the page of Python names is made from the docstrings.
docs: .venv/docs $(NATIVE)
	$(BIN)/python bench/api.py docs/api.md
	$(BIN)/zensical build --clean --strict

# torch goes first and by its exact version, so that nothing pulls another build.
.venv/pip: constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	touch $@

.venv/%: .venv/pip pyproject.toml
	$(INSTALL) --editable ".[$*]"
	touch $@

$(NATIVE): native/*.c native/*.h CMakeLists.txt .venv/pip
	cmake -S . -B build/make -DSKBUILD_STATE=editable -DCMAKE_BUILD_TYPE=Release > build.log && cmake --build build/make >> build.log || (cat build.log; exit 1)
	@rm -f build.log && touch $@

clean:
	rm -rf .venv build dist site docs/api.md $(NATIVE)
