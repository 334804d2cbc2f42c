# Medley's build. `make help` lists the targets.
#
#   make [SAN=address|undefined|thread] [DEBUG=1] [WERROR=1] [CC=clang] [V=1] [SKIP_PACKAGES=1]
#
# Each combination of SAN and DEBUG builds in a folder of its own; any other change of flags
# rebuilds what it touches. Sources are found by folder: adding a file needs no change here.

SAN ?=
DEBUG ?=
WERROR ?=
V ?=
SKIP_PACKAGES ?=
CC := $(if $(filter default,$(origin CC)),gcc,$(CC))

# A line per file, or with V=1 the whole command.
run = @$(if $(V),,printf '%-4s %s\n' $(1) $@;) $(if $(V),set -x;)

B := build$(if $(SAN),/san-$(SAN))$(if $(DEBUG),/debug)

DEPENDENCIES := libmicrohttpd libuv libcjson sqlite3 libsodium nettle libarchive libpcre2-8 libcurl
CPPFLAGS := -I. -D_GNU_SOURCE -DMEDLEY_VERSION='"$(shell cat VERSION)"' $(if $(SAN),-DSANITIZED) $(shell pkg-config --cflags $(DEPENDENCIES) 2>/dev/null)
CFLAGS := -std=c11 -g $(if $(DEBUG),-O0,-O3) -fno-math-errno -ffp-contract=off -pthread \
	-Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wvla \
	-Wno-missing-field-initializers $(if $(WERROR),-Werror) \
	$(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer -fno-sanitize-recover=all)
LDFLAGS := -pthread $(if $(SAN),-fsanitize=$(SAN))
LDLIBS := $(shell pkg-config --libs $(DEPENDENCIES) 2>/dev/null) -lm

# Instruction sets are allowed by folder only; the rest runs on any x86-64 (or other) machine.
ISA_AVX2 := -mavx2 -mfma -mf16c
ISA_AVX512 := $(ISA_AVX2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
ISA_$(B)/kernels/avx2 := $(ISA_AVX2)
ISA_$(B)/kernels/avxvnni := $(ISA_AVX2) -mavxvnni
ISA_$(B)/kernels/avx512 := $(ISA_AVX512)

X86_FOLDERS := $(if $(filter x86_64,$(shell uname -m)),kernels/avx2 kernels/avxvnni kernels/avx512)
FOLDERS := base kernels kernels/cpu kernels/reference $(X86_FOLDERS) adapters engine training api server
SOURCES := $(filter-out server/main.c,$(wildcard $(FOLDERS:%=%/*.c)))
OBJECTS := $(SOURCES:%.c=$(B)/%.o)
UNIT_TESTS := $(patsubst %.c,$(B)/%,$(wildcard tests/unit/test_*.c))
KERNEL_TEST_OBJECTS := $(patsubst %.c,$(B)/%.o,$(wildcard tests/kernels/*.c))
FUZZERS := $(patsubst %.c,$(B)/%,$(wildcard tests/fuzz/fuzz_*.c))
BENCHES := $(patsubst %.c,$(B)/%,$(wildcard tests/bench/bench_*.c))
# An archive, so that a test links only the helpers it uses and what those need.
TEST_HELPERS := $(B)/libsupport.a

.DEFAULT_GOAL := all
.PHONY: all tests serve test bench bench-train reproduce soak packages packages-test python model format help clean FORCE
all: $(B)/medley
tests: all $(UNIT_TESTS) $(B)/tests/kernels/checkkernels $(FUZZERS) $(BENCHES)

$(B)/medley: $(B)/server/main.o $(B)/libmedley.a
	$(call run,LD) $(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(B)/libmedley.a: $(OBJECTS)
	@rm -f $@
	$(call run,AR) ar rcs $@ $^

$(B)/libsupport.a: $(patsubst %.c,$(B)/%.o,$(wildcard tests/support/*.c))
	@rm -f $@
	$(call run,AR) ar rcs $@ $^

$(B)/tests/unit/%: $(B)/tests/unit/%.o $(TEST_HELPERS) $(B)/libmedley.a
	$(call run,LD) $(CC) $(LDFLAGS) -o $@ $^ -lcmocka $(LDLIBS)

$(B)/tests/fuzz/%: $(B)/tests/fuzz/%.o $(TEST_HELPERS) $(B)/libmedley.a
	$(call run,LD) $(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(B)/tests/bench/%: $(B)/tests/bench/%.o $(B)/libmedley.a
	$(call run,LD) $(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

# The AVX-VNNI and AVX-512 tables once more, their intrinsics emulated, so that any machine can check them. Sanitizers
# multiply such an emulation's code: less optimised, it compiles in half a minute. No kernel knows of threads.
EMULATED_kernels/avx512 := -Wno-psabi $(if $(SAN),-O1) $(if $(filter thread,$(SAN)),-fno-sanitize=all)
$(B)/emulated/%.o: %.c $(B)/.flags
	@mkdir -p $(@D)
	$(call run,CC) $(CC) $(CPPFLAGS) $(CFLAGS) $(ISA_AVX2) $(EMULATED_$(patsubst %/,%,$(dir $<))) -DKERNELS_EMULATE -MMD -MP -c -o $@ $<

$(B)/tests/kernels/checkkernels: $(KERNEL_TEST_OBJECTS) $(TEST_HELPERS) \
		$(patsubst %.c,$(B)/emulated/%.o,$(if $(X86_FOLDERS),$(wildcard kernels/avxvnni/*.c kernels/avx512/*.c))) $(B)/libmedley.a
	$(call run,LD) $(CC) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(B)/%.o: %.c $(B)/.flags
	@mkdir -p $(@D)
	$(call run,CC) $(CC) $(CPPFLAGS) $(CFLAGS) $(ISA_$(patsubst %/,%,$(dir $@))) -MMD -MP -c -o $@ $<

# Rewritten only when the flags differ from the last run's.
FLAGS_NOW := $(CC) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS) $(LDLIBS)
$(B)/.flags: FORCE
	@mkdir -p $(@D)
	@printf '%s\n' '$(subst ','\'',$(FLAGS_NOW))' | cmp -s - $@ || printf '%s\n' '$(subst ','\'',$(FLAGS_NOW))' > $@

# ---- the main jobs -------------------------------------------------------------------------

# Each step runs make anew, since the libraries it asks pkg-config for may just have come.
PARALLEL := $(MAKE) --no-print-directory -j$(shell nproc)
SERVE_ARGS ?=

serve: packages
	@$(PARALLEL) all
	@$(MAKE) --no-print-directory model
	@exec $(B)/medley serve --model "$$(python3 deploy/fetch_model.py --print-path)" $(SERVE_ARGS)

test: packages-test
	@$(MAKE) --no-print-directory python model
	@$(PARALLEL) tests
	@$(PARALLEL) SAN=address tests
	@$(PARALLEL) SAN=undefined tests
	@$(PARALLEL) SAN=thread tests
	@build/venv/bin/python tests/run.py

# The peer is built from source, for this machine.
BENCH_ARGS ?=
bench: packages
	@$(MAKE) --no-print-directory model build/venv-bench/.ready
	@$(PARALLEL) all $(BENCHES)
	@build/venv-bench/bin/python tests/bench/bench.py $(BENCH_ARGS)
build/venv-bench/.ready: tests/bench/requirements.txt
	python3 -m venv build/venv-bench
	CMAKE_ARGS=-DGGML_NATIVE=on build/venv-bench/bin/pip install -q -r tests/bench/requirements.txt
	@touch $@

# The peer of training: PyTorch and PEFT.
bench-train: packages
	@$(MAKE) --no-print-directory model build/venv-bench-train/.ready
	@$(PARALLEL) $(B)/tests/bench/bench_train
	@build/venv-bench-train/bin/python tests/bench/train_bench.py $(BENCH_ARGS)
build/venv-bench-train/.ready: tests/bench/requirements-train.txt
	python3 -m venv build/venv-bench-train
	build/venv-bench-train/bin/pip install -q -r tests/bench/requirements-train.txt
	@touch $@

# Hours on two cores; resumable. REPRODUCE_ARGS="--seeds 0" does less.
REPRODUCE_ARGS ?= --document docs/moelora.md
reproduce: packages
	@$(MAKE) --no-print-directory model build/venv-reproduce/.ready
	@$(PARALLEL) all
	@build/venv-reproduce/bin/python tests/reproduce/reproduce.py $(REPRODUCE_ARGS)
build/venv-reproduce/.ready: tests/reproduce/requirements.txt
	python3 -m venv build/venv-reproduce
	build/venv-reproduce/bin/pip install -q -r tests/reproduce/requirements.txt
	@touch $@

# tests/soak/many_adapters.py is run by hand: it writes 4 GB.
SECONDS ?= 120
soak: packages
	@$(PARALLEL) all
	@$(MAKE) --no-print-directory model
	@python3 tests/soak/swap.py --model "$$(python3 deploy/fetch_model.py --print-path)" --seconds $(SECONDS)

packages:
	@$(if $(SKIP_PACKAGES),,deploy/install-packages.sh run)
packages-test:
	@$(if $(SKIP_PACKAGES),,deploy/install-packages.sh test)

# A Python environment for the tests; remade when its list changes.
python: build/venv/.ready
build/venv/.ready: tests/requirements.txt
	python3 -m venv build/venv
	build/venv/bin/pip install -q -r tests/requirements.txt
	@touch $@

model:
	@test -e "$$(python3 deploy/fetch_model.py --print-path)" || { \
		mkdir -p build && python3 -m venv build/venv-model && \
		build/venv-model/bin/python deploy/fetch_model.py > /dev/null; }

format:
	clang-format -i $$(git ls-files '*.c' '*.h')

help:
	@echo 'make                build $(B)/medley'
	@echo 'make serve          install what is missing, build, fetch the default model, serve on 127.0.0.1:8080'
	@echo '                    (SERVE_ARGS="--threads 2 ..." passes options to medley serve)'
	@echo 'make test           all tests, also under the address, undefined and thread sanitizers'
	@echo 'make tests          build the tests only;  tests/run.py --help  runs some of them'
	@echo 'make bench          speed next to llama.cpp on this machine'
	@echo 'make bench-train    training speed next to PyTorch'
	@echo 'make reproduce      MoELoRA against LoRA on six task families: hours, resumable (REPRODUCE_ARGS=...)'
	@echo 'make soak           adapters replaced under 32 streams (SECONDS=120)'
	@echo 'make model          fetch the default model'
	@echo 'make format         clang-format over the tree'
	@echo 'make clean          remove build/'
	@echo
	@echo 'Options: SAN=address|undefined|thread  DEBUG=1  WERROR=1  CC=clang  V=1  SKIP_PACKAGES=1'

clean:
	rm -rf build

-include $(shell find $(B) -name '*.d' 2>/dev/null)
.SECONDARY:
