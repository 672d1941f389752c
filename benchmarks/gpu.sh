#!/usr/bin/env bash
# Builds in place, then proves and measures everything on this machine's GPU. Needs no network and installs nothing.
#   benchmarks/gpu.sh                  all of it, in 10 minutes at the most
#   PART=bench benchmarks/gpu.sh       some of: test graph sanitize bench compile (the build always comes first)
#   PART="bench walk"                  ... for some of the ops named in `files` below
#   OUT=build/gpu   where gpu.log, summary.txt and the result rows go      PYTHON=python3
#   LIMIT=590       seconds for everything                                 WSSS_COMMIT=...  for a tree without git
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "$1" >&2; exit 1; }

python="${PYTHON:-python3}"
out="${OUT:-build/gpu}"
limit="${LIMIT:-590}"
read -ra words <<<"${PART:-}"
declare -A files=([walk]="random_walk random_walk_precision random_walk_gradients" [affinity]=local_affinity
  [boundary]="boundary_affinity boundary_walk" [adaptive]=pixel_adaptive [crf]="dense_crf dense_energy_loss"
  [attention]=attention_walk [vote]=mask_vote [loss]="affinity_loss affinity_loss_from_features" [kmeans]=kmeans
  [memory-attention]="cross_image_attention attention_entropy class_context" [histogram]=soft_histogram [pyramid]=hspp
  [refine]="refine refine_methods")
every=(walk affinity boundary adaptive crf attention vote loss kmeans memory-attention histogram pyramid refine)
parts=() ops=()
for word in "${words[@]}"; do
  case "$word" in
    build | test | graph | sanitize | bench | compile) parts+=("$word") ;;
    *)
      [[ -n "${files[$word]:-}" ]] ||
        stop "PART must name some of build test graph sanitize bench compile ${every[*]}, got $word"
      ops+=("$word")
      ;;
  esac
done

asked() { [[ ${#parts[@]} == 0 || " ${parts[*]} " == *" $1 "* ]]; }
lacks() {  # MODULE...: those that this Python has not
  "$python" -c 'import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])' "$@"
}

# What there is

command -v "$python" >/dev/null || stop "$python was not found: name an interpreter with PYTHON=..."
[[ -z "$(lacks torch)" ]] || stop "$python has no torch: name another interpreter with PYTHON=..."
arch="$("$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("no GPU: torch %s finds no CUDA device on this machine" % torch.__version__)
print("%d%d" % torch.cuda.get_device_capability())')" || exit 1
missing="$(lacks setuptools pybind11)"
command -v cmake >/dev/null || [[ -x "$(dirname "$(command -v "$python")")/cmake" ]] || missing+=" cmake"
[[ -z "${missing// /}" ]] || stop "the build needs what $python lacks: $missing"

mkdir -p "$out"
out="$(cd "$out" && pwd)"
log="$out/gpu.log"
: >"$log"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 WSSS_REQUIRE_NATIVE=1
table=() status=0

note() { table+=("$(printf '%-20s %6s s  %s' "$1" "$2" "$3")"); echo "${table[-1]}"; }
skip() { note "$1" - "skipped: $2"; }
# run NAME SECONDS COMMAND...: into the log, bounded; the end of what fails is shown, and the next one follows.
run() {
  local name="$1" most="$2" start="$SECONDS" from code=0
  shift 2
  most=$((most < limit - SECONDS ? most : limit - SECONDS))
  if ((most < 5)); then
    note "$name" 0 "FAILED: not run, the $limit s are over"
    status=1
    return 1
  fi
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  from="$(wc -c <"$log")"
  timeout --signal=INT --kill-after=10 "$most" "$@" >>"$log" 2>&1 || code=$?  # pytest sums up what it has seen
  if ((code == 0)); then
    note "$name" $((SECONDS - start)) ok
    return 0
  fi
  status=1
  tail -c +$((from + 1)) "$log" | tail -n 15 | cut -c -200
  local why="exit code $code"
  ((code != 124 && code != 137)) || why="over $most s"
  note "$name" $((SECONDS - start)) "FAILED: $why"
  return 1
}

# Build: without the CUDA kernels where they do not compile, so that Triton's can still be seen

kernels=(cuda triton)
build() { run "$1" 180 env WSSS_CUDA="$2" WSSS_CUDA_ARCHS="$arch-real" "$python" setup.py -q build_ext --inplace; }
if ! build build ON; then
  kernels=(triton)
  build "build, no CUDA" OFF || kernels=()
fi
if [[ " ${kernels[*]} " == *" triton "* && -n "$(lacks triton)" ]]; then
  skip triton "$python has no triton"
  unset 'kernels[-1]'
fi
{ echo; "$python" -m wsss_kernels; nvidia-smi; } >>"$log" 2>&1 || true

# Parts

tests=() asked_ops=("${ops[@]}")
[[ ${#ops[@]} != 0 ]] || asked_ops=("${every[@]}") tests=(tests/test_{properties,shapes_sweep,compile,transforms}.py)
for op in "${asked_ops[@]}"; do for file in ${files[$op]}; do tests+=("tests/test_$file.py"); done; done
# In its summary a failure is followed by its reason where the line is long enough.
pytest=(env COLUMNS=200 "$python" -m pytest --device cuda -q --tb=short -p no:cacheprovider --maxfail=40)
no_pytest="$(lacks pytest hypothesis)"
side_by_side=()
[[ -n "$(lacks xdist)" ]] || side_by_side=(-n 6)

suite() {
  [[ -z "$no_pytest" ]] || { skip "test $1" "$python has no $no_pytest"; return; }
  local without=()
  [[ "$1" == cuda ]] || without=(-k "not crf and not dense_energy")  # they have no Triton kernels
  run "test $1" 110 env WSSS_GPU_KERNELS="$1" OMP_NUM_THREADS=2 "${pytest[@]}" \
    "${side_by_side[@]}" -m "not gpu" "${without[@]}" "${tests[@]}" || true
}

graph() {
  [[ -z "$no_pytest" ]] || { skip "graph $1" "$python has no $no_pytest"; return; }
  [[ "${ops[*]}" != kmeans ]] || { skip "graph $1" "k-means waits for the host once an iteration"; return; }
  local chosen=()
  ((${#ops[@]} != 1)) || chosen=(-k "${ops[0]}")
  run "graph $1" 60 env WSSS_GPU_KERNELS="$1" "${pytest[@]}" --release "${chosen[@]}" tests/test_gpu.py || true
}

sanitize() {
  local tool sanitizer
  local small=("$python" tests/every_kernel.py "${ops[@]}")
  run "streams $1" 40 env TORCH_CUDA_SANITIZER=1 WSSS_GPU_KERNELS="$1" "${small[@]}" || true
  [[ "$1" == cuda ]] || return 0
  sanitizer="$(PATH="$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer" command -v compute-sanitizer)" ||
    { skip sanitize "no compute-sanitizer on this machine"; return; }
  for tool in memcheck racecheck initcheck; do  # torch's own memory pool would hide what leaves an allocation
    run "sanitize $tool" 60 env WSSS_GPU_KERNELS=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
      --error-exitcode 1 --kernel-name kns=wsss "${small[@]}" || true
  done
}

measure() {  # NAME SECONDS KERNELS ARGUMENTS...
  [[ -z "$(lacks scipy)" ]] || { skip "$1" "$python has no scipy"; return; }
  run "$1" "$2" env WSSS_GPU_KERNELS="$3" "$python" -m benchmarks --device cuda --write --folder "$out" "${@:4}" || true
}

bench() {
  local groups=() more=() op
  for op in "${asked_ops[@]}"; do [[ "$1 $op" == "triton crf" ]] || groups+=("$op"); done
  ((${#ops[@]} != 0)) || groups+=(overhead)
  [[ "$1" == "${kernels[0]}" ]] || more=(--ours)  # the others' ways were measured with the first
  measure "bench $1" 240 "$1" --only "${groups[@]}" "${more[@]}"
}

for kernel in "${kernels[@]}"; do
  [[ "$kernel" == cuda || "${ops[*]}" != crf ]] || continue  # it has no Triton kernels
  ! asked test || suite "$kernel"
  ! asked graph || graph "$kernel"
  ! asked sanitize || sanitize "$kernel"
  ! asked bench || bench "$kernel"
done
! asked compile || [[ ${#kernels[@]} == 0 ]] || measure compile 100 "${kernels[0]}" --only compile

printf '\n%s\n' "$SECONDS s; log and result rows in $out" >>"$log"
{
  echo
  printf '%s\n' "${table[@]}"
  echo "$SECONDS s in all; the log and the result rows are in $out"
} | tee "$out/summary.txt"
exit "$status"
