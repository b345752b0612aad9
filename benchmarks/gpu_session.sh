#!/usr/bin/env bash
# All that wants a GPU, in stages of under 10 minutes. From the repository's root:
#
#   MNIST_DIR=data CIFAR_DIR=cifar10-jpg bash benchmarks/gpu_session.sh all      # or some stages by name
#
# A finished stage leaves STAGE.done in the session's folder and is skipped from then on. One that reaches its time
# limit, or is killed, goes on where it stopped when it is called again. Exit code: 0 when all that was asked for is
# done or lacks its data, else 1.
#
#   tests           tests/test_cuda.py
#   bench           every benchmark
#   train           MNIST T-Shirt with the published UNet
#   retrain         the same steps without the T-shirt: the oracle
#   unlearn         every method, each evaluated, beside the base and, if it is there, the retrained model
#   cifar_train     CIFAR-10's training images
#   cifar_unlearn   one of them forgotten, evaluated before and after
#   results         what is worth keeping, without weights, and the GPU's name, in results/
#
# CIFAR_DIR holds torchvision's cifar-10-batches-py: then the papers' image 10000 is forgotten, which is number 20000
# in torchvision's order. Or it holds pictures in a folder per class: their names do not tell which one that is, so the
# picture at index 10000 of the sorted names is forgotten, of the third class (bird). Its figures are not the papers'.
#
# Settings, by environment: SESSION the folder; MNIST_DIR and CIFAR_DIR the data (see README.md); LIMIT seconds a
# stage; SECONDS_TO_TRAIN what the steps of a training are chosen to fill, or STEPS and CIFAR_STEPS themselves; SAMPLES
# an evaluated model; SEEDS. TINY=1 runs everything in a few minutes on a CPU, on the embedded digits.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
session=${SESSION:-runs/gpu_session}
mkdir -p "$session" && session=$(cd "$session" && pwd)
mnist_dir=$(realpath -m "${MNIST_DIR:-data}") cifar_dir=$(realpath -m "${CIFAR_DIR:-cifar10-jpg}")
limit=${LIMIT:-570}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if [ -n "${TINY:-}" ]; then
  mnist=(--dataset digits-tshirt) cifar=(--dataset digits-tshirt --forget 1000)
  steps=${STEPS:-4} cifar_steps=${CIFAR_STEPS:-4} samples=${SAMPLES:-70}
  train=(--batch-size 4 --warmup 1 --save-every 1 --log-every 1) evaluate=(--sampler-steps 2 --nll-tolerance 0.1)
  unlearn=(--steps 1 --batch-size 4) options=:steps=1,batch-size=4
  bench=(--turns 1 --steps 1 --batch-size 2) cases=(digits-tshirt) compile=()
else
  mnist=(--dataset mnist-tshirt --data-dir "$mnist_dir")
  cifar=(--dataset folder --data-dir "$cifar_dir" --size 32 --forget 10000)
  if [ -d "$cifar_dir/cifar-10-batches-py" ]; then cifar=(--dataset cifar10 --data-dir "$cifar_dir" --forget 20000); fi
  steps=${STEPS:-} cifar_steps=${CIFAR_STEPS:-} samples=${SAMPLES:-10000}
  train=(--batch-size 128 --warmup 500) evaluate=()
  unlearn=(--steps 60 --batch-size 128 --accumulate 1 --lr 2e-5 --lam 0.02) options= # published
  bench=(--turns 5 --steps 20 --batch-size 128) cases=(digits-tshirt mnist-tshirt cifar10) compile=(--compile)
fi

skip() { # stop this stage with one line, without failing
  echo "$1"
  exit 77
}

need() { [ -e "$session/$1.done" ] || skip "waits for stage $1"; }

need_data() { # FOLDER NAME
  [ -n "${TINY:-}" ] || [ -d "$1" ] || skip "no $1: set $2 (README.md says to what)"
}

run() { # a command, from within the session's folder, in what is left of the stage's time
  local left=$((deadline - SECONDS))
  [ "$left" -gt 0 ] || return 124
  printf '%q ' "${@/#$root\//}" >>commands.txt
  echo >>commands.txt
  timeout --foreground --kill-after=30 "$left" "$@"
}

train() { # FOLDER STEPS FLAGS...: train_ddpm.py, going on from its last checkpoint
  local folder=$1 steps=$2
  shift 2
  if [ -z "$steps" ]; then # as many as fill SECONDS_TO_TRAIN at the speed of the first ones; chosen once
    [ -e "$folder.steps" ] || {
      run python3 "$root/train_ddpm.py" "$@" "${train[@]}" --warmup 1 --steps 300 --save-every 100 \
        --out "$folder-speed" --overwrite
      python3 - "$folder-speed/log.jsonl" "${SECONDS_TO_TRAIN:-480}" >"$folder.steps.new" <<'PYTHON'
import json, sys
speeds = sorted(json.loads(line)["images_per_s"] for line in open(sys.argv[1]))
print(int(speeds[len(speeds) // 2] / 128 * float(sys.argv[2])))
PYTHON
      mv "$folder.steps.new" "$folder.steps"
    }
    steps=$(cat "$folder.steps")
  fi
  local how=--overwrite
  if [ -e "$folder/state.json" ]; then how=--resume; fi
  run python3 "$root/train_ddpm.py" "$@" "${train[@]}" --steps "$steps" --out "$folder" "$how"
}

stage_tests() { run python3 -m pytest -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests/test_cuda.py"; }

benchmark() { # NAME CASE FLAGS...: unless its JSON is there
  local name=$1 case=$2
  shift 2
  [ -e "${name}_$case.json" ] ||
    run python3 "$root/benchmarks/$name.py" --cases "$case" "${bench[@]}" "$@" --out "${name}_$case.json"
}

stage_bench() {
  local case
  for case in "${cases[@]}"; do
    benchmark bench_unet "$case" "${compile[@]}"
    benchmark bench_methods "$case"
    benchmark bench_posterior "$case"
  done
}

stage_train() {
  need_data "$mnist_dir/MNIST" MNIST_DIR
  train mnist/base "$steps" "${mnist[@]}" --keep 3 # for vdu
}

stage_retrain() {
  need train
  local chosen=$steps
  if [ -e mnist/base.steps ]; then chosen=$(cat mnist/base.steps); fi
  train mnist/compare/retrain/seed-0 "$chosen" "${mnist[@]}" --remain-only
}

stage_unlearn() {
  need train
  local labels
  labels=$(python3 -c 'from tiny_retrack.lab.spec import method_names; print(*method_names())')
  labels=${labels% retrain} # it has a stage of its own
  labels=$(printf "%s$options " $labels)
  if [ -e retrain.done ]; then labels="$labels retrain"; fi
  run python3 "$root/evaluate.py" compare "${mnist[@]}" --base mnist/base --out mnist/compare --methods $labels \
    --seeds ${SEEDS:-0} --num-samples "$samples" "${evaluate[@]}"
}

stage_cifar_train() {
  need_data "$cifar_dir" CIFAR_DIR
  train cifar/base "$cifar_steps" "${cifar[@]}"
}

stage_cifar_unlearn() {
  need cifar_train
  run python3 "$root/unlearn.py" "${cifar[@]}" --checkpoint cifar/base --out cifar/retrack "${unlearn[@]}" --overwrite
  run python3 "$root/evaluate.py" cifar/base cifar/retrack "${cifar[@]}" --num-samples "$samples" \
    --sampler-steps 50 "${evaluate[@]}"
}

stage_results() {
  rm -rf results results.new && mkdir results.new
  python3 -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' >machine.txt
  find . -path './results*' -prune -o -type f -size -1024k -regex '.*\.\(jsonl?\|md\|png\|log\|txt\)' \
    -exec cp --parents -t results.new {} +
  mv results.new results
}

stages=(tests bench train retrain unlearn cifar_train cifar_unlearn results)
if [ $# -eq 0 ]; then
  echo "usage: $0 all | STAGE ...    stages: ${stages[*]}" >&2
  exit 2
fi
if [ "$1" != all ]; then stages=("$@"); fi
failed=0
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" >/dev/null; then
    echo "no stage '$stage'" >&2
    exit 2
  fi
  if [ -e "$session/$stage.done" ] && [ "$stage" != results ]; then
    echo "== $stage: done before"
    continue
  fi
  echo "== $stage"
  (
    set -e
    cd "$session"
    deadline=$((SECONDS + limit))
    "stage_$stage"
  ) 2>&1 | tee -a "$session/$stage.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) touch "$session/$stage.done" ;;
    77) ;;
    124) echo "== $stage: stopped after $limit s, call it again to go on" && failed=1 ;;
    *) echo "== $stage: failed ($code), see $session/$stage.log" && failed=1 ;;
  esac
done
exit $failed
