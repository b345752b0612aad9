#!/usr/bin/env bash
# What wants a GPU, for one H100 or H200 that is held for 13 minutes in all. From the repository's root:
#
#   BUDGET=585 MNIST_TAR=mnist.tar.gz CIFAR_TAR=cifar.tar.gz KEEP=figures bash benchmarks/gpu_session.sh all
#   BUDGET=150 MNIST_TAR=mnist.tar.gz CIFAR_TAR=cifar.tar.gz KEEP=figures bash benchmarks/gpu_session.sh all  # goes on
#
# | stage     | seconds | what                                                                                         |
# | --------- | ------- | -------------------------------------------------------------------------------------------- |
# | tests     |      75 | tests/test_cuda.py; meanwhile torch.compile fills its cache for `speed`                      |
# | speed     |     110 | training steps against diffusers' and the card's peak, compiled ones, ReTrack's targets      |
# | train     |     140 | MNIST T-Shirt, the published UNet: as many steps as fit                                      |
# | unlearn   |     170 | the methods, seed 0, each evaluated beside the base                                          |
# | narrow    |      90 | MNIST T-Shirt, a UNet of 1.06 M weights, the same in small                                   |
# | cifar     |     150 | CIFAR-10, the published UNet, one image that the training holds 500 times; its unlearning    |
# | ancestral |      60 | the base of `train` by the papers' sampler                                                   |
# | seeds     |     300 | the methods of `unlearn` with more seeds                                                     |
# | retrain   |     400 | two networks like the base that never saw the T-shirt, and all models held against them      |
# | compile   |     150 | the CIFAR-10 UNet, compiled                                                                  |
#
# The first six take 735 s; `all` takes what of the list fits into BUDGET, in this order. The seconds are limits:
# LIMIT_train=600 sets one. A stage that does not end in what is left of BUDGET is cut short, or skipped with a line.
#
# A finished stage leaves STAGE.done in the session's folder and is not done again. One that reaches its limit, or is
# killed, goes on where it stopped when it is called again. A training that reaches its limit is taken as it is. After
# each stage, all figures so far are in results/ and packed into KEEP. Exit code: 0 when all that was asked for is done,
# or lacks its data or its time; else 1.
#
# Settings, by environment:
#   BUDGET                 seconds for all stages of this call (default: no limit)
#   SESSION                the folder of the session (default: runs/gpu_session)
#   KEEP                   where the archives go (default: SESSION/keep): results.tar.gz, and float16 weights of the
#                          narrow model and, in parts of 15 MB, of the published UNet
#   MNIST_DIR, MNIST_TAR   the data, as a folder or packed (README.md says how)
#   CIFAR_DIR, CIFAR_TAR   likewise; CIFAR_DIR with torchvision's cifar-10-batches-py, or a folder of pictures per class
#   STEPS, NARROW_STEPS, CIFAR_STEPS    of the trainings, in place of as many as fit
#   BATCH                  images a step of the trainings (default: 128)
#   METHODS, SEEDS, SAMPLES, JOBS       of `unlearn` and `seeds`: methods, seeds, samples a model, models at a time
#   EVALUATE               more flags of every evaluation (default: --sampler-steps 50)
#   TINY=1                 everything in a few minutes on a CPU, on the embedded digits
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
session=${SESSION:-runs/gpu_session}
mkdir -p "$session" && session=$(cd "$session" && pwd)
keep=$(realpath -m "${KEEP:-$session/keep}")
mnist_dir=$(realpath -m "${MNIST_DIR:-data}") cifar_dir=$(realpath -m "${CIFAR_DIR:-cifar10-jpg}")
if [ -n "${MNIST_TAR:-}" ]; then mnist_dir=$session/data/mnist mnist_tar=$(realpath -m "$MNIST_TAR"); fi
if [ -n "${CIFAR_TAR:-}" ]; then cifar_dir=$session/data/cifar cifar_tar=$(realpath -m "$CIFAR_TAR"); fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10

stages=(tests speed train unlearn narrow cifar ancestral seeds retrain compile)
declare -A limits=([tests]=75 [speed]=110 [train]=140 [unlearn]=170 [narrow]=90 [cifar]=150 [ancestral]=60 [seeds]=300
  [retrain]=400 [compile]=150)
# With less than this left of BUDGET a stage is not begun: it would end before its first figure.
declare -A least=([tests]=30 [speed]=45 [train]=60 [unlearn]=60 [narrow]=70 [cifar]=125 [ancestral]=35 [seeds]=60
  [retrain]=90 [compile]=60)
reserve=12 # seconds of BUDGET for the report and the archives

if [ -n "${TINY:-}" ]; then
  mnist=(--dataset digits-tshirt) narrow=(--dataset digits-tshirt) cifar=(--dataset digits-tshirt --forget 1000)
  mnist_case=digits-tshirt narrow_case=digits-tshirt cifar_case=digits-tshirt cases=(digits-tshirt)
  batch=${BATCH:-4} train=(--log-every 1) fill=1 samples=${SAMPLES:-70} cifar_samples=${SAMPLES:-70}
  evaluate=(${EVALUATE:---sampler-steps 2 --nll-tolerance 0.5})
  methods=(${METHODS:-retrack-knn:steps=1,batch-size=4 siss:steps=2,batch-size=2}) cifar_methods=("${methods[@]:0:1}")
  turns=(--turns 1 --steps 1 --batch-size 2) posterior=(--images 200 --naive-images 50) compiled=()
  seeds=(${SEEDS:-0 1}) jobs=${JOBS:-2}
  for stage in "${stages[@]}"; do limits[$stage]=570; done
else
  mnist=(--dataset mnist-tshirt --data-dir "$mnist_dir") narrow=("${mnist[@]}" --preset small-mnist)
  # Of folders, the picture at index 10000 of the sorted names is forgotten, a bird: they do not tell which one is the
  # papers' image 10000, so the figures are not the papers'. In torchvision's order that image is number 20000.
  folder=(--dataset folder --data-dir "$cifar_dir" --size 32 --forget 10000)
  batches=(--dataset cifar10 --data-dir "$cifar_dir" --forget 20000)
  mnist_case=mnist-tshirt narrow_case=small-mnist cifar_case=cifar10 cases=(mnist-tshirt cifar10 small-mnist)
  batch=${BATCH:-128} train=(--log-every 50) fill= samples=${SAMPLES:-5000} cifar_samples=${SAMPLES:-2000}
  evaluate=(${EVALUATE:---sampler-steps 50})
  landing=snr-cap=1,lam=0.1,lr=5e-4,decay=cosine # of docs/results/study.md; all else is published
  methods=(${METHODS:-retrack-knn siss:steps=300,batch-size=64 vanilla erasediff retrack-exact retrack-generalizing
    "retrack-generalizing:$landing"})
  cifar_methods=(retrack-knn "retrack-generalizing:$landing")
  turns=(--turns 3 --steps 20 --batch-size 128) posterior=() compiled=(--compile default reduce-overhead)
  seeds=(${SEEDS:-0 1 2}) jobs=${JOBS:-3}
fi

skip() { # stop this stage with one line, without failing
  echo "$1"
  exit 77
}

need_model() { [ -e "$1/run.json" ] || skip "waits for stage $2"; } # FOLDER STAGE

need_data() { # PATH NAME FOLDER ARCHIVE: unpacked into FOLDER if there is an archive and that was not done
  if [ -n "${TINY:-}" ]; then return; fi
  if [ -e "$4" ] && [ ! -d "$3" ]; then
    rm -rf "$3.new" && mkdir -p "$3.new"
    tar -xzf "$4" -C "$3.new"
    mv "$3.new" "$3"
  fi
  [ -e "$1" ] || skip "no $1: set $2_DIR or $2_TAR (README.md says to what)"
}

need_mnist() { need_data "$mnist_dir/MNIST/raw" MNIST "$mnist_dir" "${mnist_tar:-}"; }

need_cifar() {
  need_data "$cifar_dir" CIFAR "$cifar_dir" "${cifar_tar:-}"
  if [ -n "${TINY:-}" ]; then return; fi
  cifar=("${folder[@]}")
  if [ -d "$cifar_dir/cifar-10-batches-py" ]; then cifar=("${batches[@]}"); fi
}

run() { # a command, from within the session's folder, in what is left of the stage's time
  local left=$((deadline - SECONDS))
  [ "$left" -gt 0 ] || return 124
  printf '%q ' "${@/#$root\//}" >>commands.txt
  echo >>commands.txt
  timeout --foreground --signal=INT --kill-after=10 "$left" "$@" # on SIGINT, pytest still tells what failed
}

benchmark() { # NAME OUT FLAGS...: unless it has ended; its JSON is written case by case
  local name=$1 out=$2
  shift 2
  if [ -e "$out.ended" ]; then return; fi
  run python3 "$root/benchmarks/$name.py" "${turns[@]}" "$@" --out "$out" && touch "$out.ended"
}

choose_steps() { # CASE SECONDS: as many as fit at the measured speed, with --compile where that pays
  local choose=(python3 "$root/benchmarks/session.py" steps . --case "$1" --batch-size "$batch" --seconds "$2")
  local chosen
  chosen=$("${choose[@]}")
  if [ -z "$chosen" ]; then # stage speed has not measured it
    benchmark bench_unet "bench_unet_$1.json" --cases "$1" --sampler-steps 1 >&2
    chosen=$("${choose[@]}")
  fi
  echo "$chosen"
}

train() { # FOLDER CASE RESERVE STEPS FLAGS...: in all but RESERVE seconds of the stage; going on from a checkpoint
  local folder=$1 case=$2 seconds=${fill:-$((deadline - SECONDS - $3))} steps=$4 how=--overwrite code=0
  shift 4
  if [ -e "$folder.trained" ]; then return; fi
  mkdir -p "$(dirname "$folder")"
  if [ ! -e "$folder.steps" ]; then # chosen once
    if [ -z "$steps" ]; then steps=$(choose_steps "$case" "$seconds"); fi
    [ -n "$steps" ] || { echo "the speed of $case could not be measured" && return 1; }
    echo "$steps" >"$folder.steps"
  fi
  read -ra steps <"$folder.steps"
  if [ -e "$folder/state.json" ]; then how=--resume; fi
  run python3 "$root/train_ddpm.py" "$@" --batch-size "$batch" --save-every $((steps / 4 + 1)) "${train[@]}" \
    --out "$folder" "$how" --steps "${steps[@]}" || code=$?
  if [ $code = 124 ] && [ -e "$folder/run.json" ]; then
    echo "the training of $folder was stopped at its limit, and is taken as it is"
    code=0
  fi
  [ $code = 0 ] && touch "$folder.trained"
  return $code
}

compare() { # OUT SAMPLES FLAGS...: evaluate.py compare, several models at a time; if that fails, one after the other
  local out=$1 num=$2 code=0
  shift 2
  local command=(run python3 "$root/evaluate.py" compare "$@" --out "$out" --num-samples "$num" "${evaluate[@]}")
  "${command[@]}" --jobs "$jobs" || code=$?
  if [ $code != 0 ] && [ $code != 124 ] && [ "$jobs" != 1 ]; then
    echo "evaluate.py compare --jobs $jobs failed ($code); again with --jobs 1"
    code=0
    "${command[@]}" --jobs 1 || code=$?
  fi
  return $code
}

stage_tests() {
  local code=0 warm_up=
  if [ ${#compiled[@]} -gt 0 ]; then
    run python3 "$root/benchmarks/bench_unet.py" --cases "$mnist_case" --turns 1 --steps 1 --batch-size "$batch" \
      "${compiled[@]}" --out warm_up.json >warm_up.log 2>&1 &
    warm_up=$!
  fi
  # Without what pyproject.toml adds for every run, which needs more packages; warnings of an unknown version of torch
  # are shown, and fail no test.
  run python3 -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" -o addopts= -W default \
    "$root/tests/test_cuda.py" || code=$?
  if [ -n "$warm_up" ]; then wait "$warm_up" || echo "torch.compile's cache was not filled, see warm_up.log"; fi
  return $code
}

stage_speed() {
  benchmark bench_unet bench_unet.json --cases "${cases[@]}"
  benchmark bench_posterior bench_posterior.json --cases "$mnist_case" "${posterior[@]}"
  if [ ${#compiled[@]} -gt 0 ]; then
    benchmark bench_unet bench_unet_compiled.json --cases "$mnist_case" "${compiled[@]}"
  fi
}

stage_train() {
  need_mnist
  train mnist/base "$mnist_case" 25 "${STEPS:-}" "${mnist[@]}"
}

compare_seeds() { # NUMBER FLAGS...: the methods, with that many of the seeds
  local number=$1
  shift
  compare mnist/compare "$samples" "${mnist[@]}" --base mnist/base --methods "${methods[@]}" \
    --seeds "${seeds[@]:0:number}" "$@"
  echo "$number" >mnist/compared
}

stage_unlearn() {
  need_model mnist/base train
  need_mnist
  compare_seeds 1
}

stage_narrow() {
  need_mnist
  train narrow/base "$narrow_case" 50 "${NARROW_STEPS:-}" "${narrow[@]}" --lr 1e-3
  compare narrow/compare "$samples" "${narrow[@]}" --base narrow/base --methods "${methods[0]}" "${methods[-1]}" \
    --seeds "${seeds[0]}"
}

stage_cifar() {
  need_cifar
  train cifar/base "$cifar_case" 105 "${CIFAR_STEPS:-}" "${cifar[@]}" --copies 500
  compare cifar/compare "$cifar_samples" "${cifar[@]}" --copies 500 --base cifar/base --methods "${cifar_methods[@]}" \
    --seeds "${seeds[0]}" --nll-tolerance 1e-2
}

stage_ancestral() {
  need_model mnist/base train
  need_mnist
  run python3 "$root/evaluate.py" mnist/base "${mnist[@]}" --sampler ddpm --num-samples "$samples" "${evaluate[@]}"
}

stage_seeds() {
  need_model mnist/base train
  need_mnist
  local number
  for ((number = 2; number <= ${#seeds[@]}; number++)); do
    compare_seeds "$number"
  done
}

stage_retrain() {
  need_model mnist/base train
  need_mnist
  local seed
  for seed in 1 2; do # not the base's: the same seed has the same initial weights
    train "mnist/retrain-$seed" "$mnist_case" 0 "$(cat mnist/base.steps)" "${mnist[@]}" --remain-only --seed "$seed"
  done
  compare_seeds "$(cat mnist/compared 2>/dev/null || echo 1)" --retrained mnist/retrain-1 mnist/retrain-2
}

stage_compile() {
  if [ ${#compiled[@]} -gt 0 ]; then
    benchmark bench_unet bench_unet_compiled_cifar10.json --cases "$cifar_case" "${compiled[@]}"
  fi
}

pack_weights() { # FOLDER NAME: float16, in parts of 15 MB, unless that was done
  if [ ! -e "$1.trained" ] || [ "$keep/$2.tar.aa" -nt "$1.trained" ]; then return; fi
  rm -rf half && mkdir -p half
  python3 "$root/benchmarks/session.py" half "$1" "half/$2"
  tar -cf - -C half "$2" | split -b 15m - "half/$2.tar."
  local part
  for part in half/"$2".tar.*; do mv "$part" "$keep/${part#half/}"; done
  rm -rf half
}

collect() { # what is worth keeping, into results/ and the archives
  cd "$session" && mkdir -p "$keep"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv >machine.txt
  else
    echo "no GPU" >machine.txt
  fi
  rm -rf results.new && mkdir results.new
  find . \( -path ./results -o -path ./results.new -o -path ./data -o -path ./keep -o -path ./half \) -prune -o \
    -type f -size -1024k -regex '.*\.\(jsonl?\|md\|png\|log\|txt\|steps\)' -exec cp --parents -t results.new {} +
  rm -rf results && mv results.new results
  tar -czf "$keep/results.tar.gz.new" results && mv "$keep/results.tar.gz.new" "$keep/results.tar.gz"
  pack_weights narrow/base narrow-weights
  pack_weights mnist/base base-weights
}

gather() {
  (
    set -e
    collect
  )
  if [ $? != 0 ]; then echo "the figures could not be collected into $session/results" && failed=1; fi
}

if [ $# -eq 0 ]; then
  echo "usage: $0 all | STAGE ...    stages: ${stages[*]}" >&2
  exit 2
fi
if [ "$1" != all ]; then stages=("$@"); fi
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" >/dev/null; then
    echo "no stage '$stage'" >&2
    exit 2
  fi
done

failed=0
end=$((SECONDS + ${BUDGET:-1000000} - reserve))
for stage in "${stages[@]}"; do
  if [ -e "$session/$stage.done" ]; then
    echo "== $stage: done before"
    continue
  fi
  left=$((end - SECONDS))
  if [ "$left" -lt "${least[$stage]}" ]; then
    echo "== $stage: skipped, as $left s are left and it wants ${least[$stage]} or more"
    continue
  fi
  name=LIMIT_$stage
  limit=${!name:-${limits[$stage]}}
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  begun=$SECONDS
  echo "== $stage, in at most $limit s"
  (
    set -e
    cd "$session"
    deadline=$((SECONDS + limit))
    "stage_$stage"
  ) 2>&1 | tee -a "$session/$stage.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) touch "$session/$stage.done" && echo "== $stage: done in $((SECONDS - begun)) s" ;;
    77) ;;
    124) echo "== $stage: stopped after $limit s, call it again to go on" && failed=1 ;;
    *) echo "== $stage: failed ($code), see $session/$stage.log" && failed=1 ;;
  esac
  echo "$stage: exit code $code after $((SECONDS - begun)) s" >>"$session/stages.txt"
  gather
done
python3 "$root/benchmarks/session.py" report "$session" "$session/report.md" || failed=1
gather
if [ -e "$session/report.md" ]; then cat "$session/report.md"; fi
exit $failed
