# A new user needs two commands: make demo, make test. The others: make help.

PART ?= 1
PYTHON ?= python3.11
DATA ?= data/nails
WORK_DIR ?= work_dir
ARGS ?=

SHELL := /bin/bash
.DEFAULT_GOAL := help

DIR := $(firstword $(wildcard part$(PART)_*))
TF_PARTS := $(wildcard part1_* part2_*)
PT_PARTS := $(wildcard part3_* part4_* part5_* part6_* part7_*)
# TensorFlow and torch crash in one process, so each has an environment of its own.
VENV = $(if $(filter $(DIR),$(PT_PARTS)),.venv-pt,.venv-tf)
RUN = $(VENV)/bin/python

UV := $(or $(shell command -v uv),.venv-uv/bin/uv)
COMPILE := $(UV) pip compile --quiet --python-version 3.11 --no-annotate --no-header
# The lock is for GPUs too; TensorFlow's CUDA (2.7 GB) is left out where there is no NVIDIA driver.
LEFT_OUT := $(if $(shell command -v nvidia-smi),^$$,-cu12==)
SIZE = $(if $(filter .venv-tf,$(VENV)),$(if $(LEFT_OUT:^$$=),0.8 GB to download and 2.9 GB on disk,3.5 GB to download and 7 GB on disk),6 GB)
# Two busy OpenMP threads on two busy cores are slower than one, and no test may reach for the network.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

.PHONY: help demo test setup install mmcv data train bench lint format lock copies conda-update pip-tools audit check-part check-python

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PART=1 (a part), DATA=data/nails, WORK_DIR=work_dir and ARGS=\"flags of train.py\" go with some of them"

# --- what a reader wants -----------------------------------------------------------------------

# A small network that starts from scratch: what two cores can train in five minutes.
DEMO := --encoder_weights none --image_size 128
# Half the bits are nearly twice the speed, but only on a CPU that can multiply them.
BF16 := $(if $(shell grep -s -m1 -o -w -e avx512_bf16 -e amx_bf16 /proc/cpuinfo),--mixed_precision True)
DEMO_1 := $(DEMO) $(BF16) --encoder resnet18 --batch_size 8 --epochs 18 --optimizer adamw --learning_rate 3e-3 --cache memory

DEMO_2 := $(DEMO_1)
DEMO_5 := $(DEMO) $(BF16) --encoder resnet18 --batch_size 8 --epochs 24 --loss dice_bce --learning_rate 2e-3
DEMO_3 := $(DEMO_5) --cache memory
DEMO_4 := $(DEMO_3)
# SegFormer's logits have a quarter of the height and width, so it gets more pixels, and takes longer.
DEMO_6 := --encoder_weights none --image_size 192 $(BF16) --batch_size 8 --epochs 24 --loss dice_bce --learning_rate 1.5e-3 --cache memory
# One box and one mask for each nail; MMEngine has no half precision on a CPU.
DEMO_7 := $(DEMO) --config part7_mmdetection/configs/nail_mask_rcnn_small.py --encoder resnet18 --batch_size 4 --epochs 6 --learning_rate 4e-3
DEMO_TIME = $(if $(filter 7,$(PART)),6,$(if $(filter 6,$(PART)),$(if $(BF16),11,16),$(if $(BF16),5,$(if $(filter $(DIR),$(PT_PARTS)),12,20))))

DEMO_DIR := $(WORK_DIR)/demo$(PART)

demo: check-part  ## install, draw data, prepare it, train part PART on it and predict
	@$(MAKE) -s setup PART=$(PART)
	@echo "== 1/4 draw 480 photographs: half a minute"
	@$(RUN) sample_data.py --data_root data/demo --images 480
	@echo "== 2/4 prepare them: seconds"
	@$(RUN) $(DIR)/data_preparation.py --data_root data/demo
	@echo "== 3/4 train: about $(DEMO_TIME) minutes on 2 cores, and most of the first one before the first step"
	@if ls "$(DEMO_DIR)"/*/training_curves.png >/dev/null 2>&1; then echo "done already; to train again: rm -r $(DEMO_DIR)"; \
	else $(RUN) $(DIR)/train.py --data_root data/demo --work_dir "$(DEMO_DIR)" $(DEMO_$(PART)) $(ARGS) \
	$$(ls "$(DEMO_DIR)"/*/config.json >/dev/null 2>&1 && echo --resume); fi
	@echo "== 4/4 predict: seconds"
	@$(RUN) $(DIR)/predict.py --weights "$(DEMO_DIR)"/*/weights/best.* --images data/demo/valid

test:  ## install what is missing, and run all tests
	@$(MAKE) -s setup
	@$(TEST_ENV) .venv-tf/bin/python -m pytest -n auto --dist loadfile $(ARGS)

data: check-part  ## draw the sample data into DATA and prepare it with part PART
	@$(MAKE) -s setup PART=$(PART)
	@$(RUN) sample_data.py --data_root "$(DATA)"
	@$(RUN) $(DIR)/data_preparation.py --data_root "$(DATA)"

train: check-part  ## train part PART on DATA: make train PART=1 ARGS="--epochs 20 --device 0"
	@$(MAKE) -s setup PART=$(PART)
	@$(RUN) $(DIR)/train.py --data_root "$(DATA)" --work_dir "$(WORK_DIR)" $(ARGS)

check-part:
	@test -d "$(DIR)" || { echo "error: there is no part $(PART) here; the parts are: $(TF_PARTS) $(PT_PARTS)" >&2; exit 2; }

# --- environments ------------------------------------------------------------------------------

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo "error: $(PYTHON) is" \
	"not Python 3.11, the last that tensorflow-addons is made for: install it, on Debian and Ubuntu as python3.11" \
	"and python3.11-venv, or say where it is: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }

.venv-uv/bin/uv: | check-python
	@echo "fetching uv, which installs the packages: 25 MB into .venv-uv"
	@$(PYTHON) -m venv .venv-uv
	@.venv-uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.8

setup: check-part check-python $(UV)  ## the environments of all parts; with PART=n that of one part
	@for dir in $(if $(filter file,$(origin PART)),$(TF_PARTS) $(PT_PARTS),$(DIR)); do $(MAKE) -s install DIR=$$dir || exit; done

# Without --compile-bytecode, a first import of TensorFlow takes two to three times as long; every one, where Python cannot
# write what it compiles.
install:
	@test -x $(VENV)/bin/python || $(UV) venv --quiet --python "$(PYTHON)" $(VENV)
	@sort -u $(DIR)/requirements.txt tests/requirements.txt | grep -v -e '$(LEFT_OUT)' > $(VENV)/wanted.txt
	@cmp -s $(VENV)/wanted.txt $(VENV)/$(DIR).txt || { \
	echo "installing what $(DIR) needs and $(VENV) has not yet: up to $(SIZE), a few minutes" && \
	$(UV) pip install --quiet --no-deps --compile-bytecode --python $(VENV)/bin/python -r $(VENV)/wanted.txt && \
	mv $(VENV)/wanted.txt $(VENV)/$(DIR).txt; }

# mmcv has no wheels, only source. Its setup.py wants old setuptools, and torch in sight, without which it makes a package
# that has no operators and does not say so: hence no isolation, and the import at the end.
MMCV_BUILD := $(CURDIR)/.venv-mmcv
mmcv: check-python $(UV)  ## part 7: compile the full mmcv, with all operators, and put it in the place of mmcv-lite
	@$(MAKE) -s setup PART=7
	@echo "compiling mmcv: about 5 minutes on 2 cores, and much longer where there is nvcc, for GPUs"
	@$(UV) pip install --quiet --target "$(MMCV_BUILD)" pip 'setuptools<81' wheel ninja
	@PYTHONPATH="$(MMCV_BUILD)" MMCV_WITH_OPS=1 FORCE_CUDA=$(if $(shell command -v nvidia-smi >/dev/null && command -v nvcc),1,0) CFLAGS="-O1 -g0" \
	.venv-pt/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --no-binary mmcv \
	--wheel-dir "$(MMCV_BUILD)" mmcv==2.1.0
	@$(UV) pip uninstall --quiet --python .venv-pt/bin/python mmcv-lite mmcv
	@$(UV) pip install --quiet --no-deps --python .venv-pt/bin/python "$(MMCV_BUILD)"/mmcv-*.whl
	@.venv-pt/bin/python -c "import mmcv.ops; print('mmcv has all operators; those for CUDA:', mmcv.ops.get_compiling_cuda_version())"

lock: $(UV)  ## compile all requirements.txt anew; ARGS=--upgrade takes the newest versions
	@$(COMPILE) requirements.in -o requirements.txt $(ARGS)
	@for dir in $(TF_PARTS) $(PT_PARTS) tests benchmarks; do \
	$(COMPILE) $$dir/requirements.in -c requirements.txt -o $$dir/requirements.txt || exit; done

conda-update:  ## as in the articles: conda environments segmentation-tf and segmentation-pt
	conda env update --name segmentation-tf --file environment.yml
	conda env update --name segmentation-pt --file environment.yml

pip-tools: lock  ## as in the articles: lock, then install into the conda environment that is active
	@case "$$CONDA_DEFAULT_ENV" in \
	segmentation-tf) dirs="$(TF_PARTS)";; segmentation-pt) dirs="$(PT_PARTS)";; \
	*) echo "error: first conda activate segmentation-tf (or segmentation-pt), which make conda-update makes" >&2; exit 2;; \
	esac; \
	$(UV) pip install --python "$$CONDA_PREFIX/bin/python" $$(printf -- '-r %s/requirements.txt ' $$dirs)

# --- what a developer wants --------------------------------------------------------------------

bench:  ## measure anew what benchmarks/README.md tells, on a machine that does nothing else
	@$(MAKE) -s setup
	@$(UV) pip install --quiet --no-deps --python .venv-pt/bin/python -r benchmarks/requirements.txt
	@for name in loaders steps choices growth processes training; do \
	echo "== $$name" && $(filter-out OMP_NUM_THREADS=%,$(TEST_ENV)) .venv-pt/bin/python benchmarks/$$name.py || exit; done

lint:  ## ruff and mypy
	@$(MAKE) -s setup
	@.venv-tf/bin/ruff check --quiet . && .venv-tf/bin/ruff format --quiet --check .
	@for dir in $(TF_PARTS) $(PT_PARTS); do (cd $$dir && ../.venv-tf/bin/mypy --config-file ../pyproject.toml .) || exit; done
	@.venv-tf/bin/mypy sample_data.py

audit: $(UV)  ## look for known vulnerabilities of what the lock names (needs the network)
	@$(UV) tool run pip-audit==2.9.0 --strict --no-deps --disable-pip -r requirements.txt

format:  ## let ruff mend what it can
	@.venv-tf/bin/ruff check --fix . ; .venv-tf/bin/ruff format .

copies:  ## copy the files that parts share from the earliest part that has them
	@.venv-tf/bin/python tests/test_copies.py
