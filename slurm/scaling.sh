#!/usr/bin/env bash
# Submits slurm/scaling.sbatch as one array for each node count in the grid, and the report after all of them.
#   [AIS_GRID=slurm/scaling_grid.tsv] AIS_MODEL=/models/Qwen3-8B slurm/scaling.sh [sbatch options] [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
GRID=${AIS_GRID:-slurm/scaling_grid.tsv}
[ -r "$GRID" ] || { echo "error: AIS_GRID=$GRID: no such file" >&2; exit 2; }

options=() overrides=()
for argument; do # key=value belongs to the configuration, unless it is the value of an option
  case $argument in -*) options+=("$argument") ;; *=*) overrides+=("$argument") ;; *) options+=("$argument") ;; esac
done
export AIS_PARENT=${AIS_PARENT:-${AIS_RUN_ROOT:-runs}/scaling-$(date +%Y%m%d-%H%M%S)}
[ ! -e "$AIS_PARENT/grid.tsv" ] || { echo "error: AIS_PARENT=$AIS_PARENT: holds a scaling experiment already; choose another folder" >&2; exit 2; }
gpus=()
[ "${AIS_GPUS_PER_NODE:-8}" != 0 ] || gpus=(--gpus-per-node=0 --mem=1G)
mkdir -p "$AIS_PARENT"
cp "$GRID" "$AIS_PARENT/grid.tsv"

jobs=''
while read -r nodes tasks; do
  job=$(sbatch --parsable --nodes="$nodes" --array="$tasks" "${gpus[@]}" "${options[@]}" slurm/scaling.sbatch "${overrides[@]}")
  echo "tasks $tasks on $nodes nodes: job $job"
  jobs+=:${job%%;*}
done < <(grep -v '^#' "$GRID" | awk -F'\t' '{ n = $3 + $4; tasks[n] = tasks[n] (tasks[n] ? "," : "") NR } END { for (n in tasks) print n, tasks[n] }' | sort -n)

python=${AIS_PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
report=$(printf '%q ' "$python" -m ais_megatron report --scaling "$AIS_PARENT")
container=${AIS_CONTAINER:+--container-image=$AIS_CONTAINER --container-mounts=${AIS_MOUNTS:-$PWD:$PWD} --container-workdir=$PWD}
job=$(sbatch --parsable --dependency="afterany$jobs" --job-name=scaling-report --nodes=1 --ntasks=1 --output="$AIS_PARENT/report.out" \
  "${options[@]}" --wrap "srun $container $report")
echo "report: job ${job%%;*}, $AIS_PARENT/scaling.md"
