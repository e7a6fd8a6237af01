# make test sets up .venv on its own; see CONTRIBUTING.md.
PYTHON_BIN := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
# Some processes at once, each with whole files of tests, so that a file's models are loaded once,
# and with one thread for torch, which otherwise wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest --numprocesses=auto --maxprocesses=4 \
    --dist=loadfile --no-loadscope-reorder

.PHONY: setup test test-slow test-all parity faults faults-rows faults-serving faults-ray clients-on-ray many-rows soak lists fuzz bench check format clean

setup:
	tools/set_up.sh dev

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m "slow and not long and not tpu_compiler and not gpu"

test-all: setup
	$(PYTEST) -m "not tpu_compiler and not gpu"

# Every scheduler and variation beside diffusers; takes some 30 minutes on one core.
parity: setup
	PARITY_TABLE=docs/parity.md $(PYTHON_BIN) -m pytest -m "" $(addprefix tests/parity/test_, \
	    schedulers_equal_diffusers.py init_latents_equal_diffusers.py \
	    pictures_equal_diffusers.py edits_equal_diffusers.py)

# Two hundred kills and a hundred other signals; takes some 40 minutes on two cores.
faults: setup
	$(PYTHON_BIN) tests/faults/kill_stages.py --kills 200 --signals 100

# The same sixty times where a changed list takes what is there.
faults-rows: setup
	$(PYTHON_BIN) tests/faults/kill_stages.py --kills 60 --signals 0 --case "a changed list" \
	    --case "a list, streamed"

# A changed list of five hundred prompts, and a run of ten thousand pictures; some 15 minutes.
lists: setup
	$(PYTHON_BIN) benchmarks/lists.py
	$(PYTHON_BIN) benchmarks/large_run.py

# A hundred kills of a server and its stages under load; takes some 40 minutes on two cores.
faults-serving: setup
	$(PYTHON_BIN) tests/faults/kill_servers.py --kills 100

# Two thousand rows by Ray on two nodes, with twenty random deaths; some 10 minutes on two cores.
faults-ray: setup
	$(PYTHON_BIN) tests/faults/kill_ray.py --rows 2000 --faults 20

# The three clients' tests of the server against replicas of Ray Serve; some 5 minutes.
clients-on-ray: setup
	SERVER_BY_RAY=1 $(PYTHON_BIN) -m pytest -m "" tests/serving/test_openai_api.py \
	    tests/serving/test_a1111_api.py tests/serving/test_vae_api.py

# Fifty thousand rows by Ray, and the memory of each node; some 15 minutes on two cores.
many-rows: setup
	$(PYTHON_BIN) tests/faults/many_rows.py --rows 50000 --beside 5000

# Twenty minutes of all that a server takes: memory and compiled programs stay as they are.
soak: setup
	$(PYTHON_BIN) tests/faults/soak_server.py --minutes 20

# Twenty thousand damaged and hostile files, two hundred whole processes; some 20 minutes.
fuzz: setup
	JAX_PLATFORMS=cpu $(PYTHON_BIN) tests/fuzz/fuzz.py --cases 20000 --processes 200

# The tables of docs/performance.md, some 20 minutes on two cores with nothing else running.
bench: setup
	$(PYTHON_BIN) benchmarks/side_by_side.py --load demo --batch 1
	$(PYTHON_BIN) benchmarks/side_by_side.py --load demo --batch 8
	$(PYTHON_BIN) benchmarks/side_by_side.py --load mid
	$(PYTHON_BIN) benchmarks/side_by_side.py --load mid --dtype bfloat16
	$(PYTHON_BIN) benchmarks/cold_start.py

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
