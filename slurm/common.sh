# shellcheck shell=bash
# Shared by the sbatch files here: splits the nodes, checks them, starts servers and ranks, ends all parts together, requeues.
#
#   sbatch [-A ACCOUNT] [-p PARTITION] [--nodes=N] [--time=…] slurm/FILE.sbatch [key=value ...]
#
# Account and partition are sbatch's own options (#SBATCH lines cannot read variables; SBATCH_ACCOUNT and SBATCH_PARTITION
# in the environment do the same). Everything else is an environment variable of the submitting shell:
#
#   variable            meaning                                                default
#   AIS_CONFIG          configuration file                                     each file's own
#   AIS_MODEL           Hugging Face checkpoint folder                         models/…, where the file needs one
#   AIS_TRAINER_NODES   nodes that train                                       each file's own
#   AIS_ROLLOUT_NODES   nodes that generate                                    all others of the allocation
#   AIS_GPUS_PER_NODE   GPUs of a node; 0: run on CPUs                         what Slurm gave, else 8
#   AIS_RUN_ROOT        run folders are AIS_RUN_ROOT/JOBNAME-JOBID             runs
#   AIS_RUN_DIR         exactly this run folder instead (with run.resume=true: continue its run)
#   AIS_PYTHON          interpreter that has ais_megatron                      .venv/bin/python if there, else python3; in a container python
#   AIS_SGLANG_PYTHON   interpreter that has SGLang                            rollout.sglang.python of the config
#   AIS_PORT            rendezvous port on the first trainer node              20000 + last four digits of the job id
#   AIS_SERVER_PORT     first server's port on each rollout node               rollout.sglang.port of the config
#   AIS_MASTER_ADDR     address of the first trainer node                      its name
#   AIS_CONTAINER       image for pyxis (srun --container-image); empty: no container
#   AIS_SGLANG_CONTAINER  another image for the servers; it needs ais_megatron too    AIS_CONTAINER
#   AIS_MOUNTS          --container-mounts                                     repository, model, run root
#   AIS_SRUN_ARGS       further arguments of every srun, for example --mpi=none
#   AIS_MAX_RESTARTS    requeues after which a stopped job stays stopped       100
#   AIS_DRY_RUN=1       print every command instead of starting it; also without Slurm: AIS_DRY_RUN=1 bash slurm/FILE.sbatch
#
# Signals: this script passes USR1 (--signal=B:USR1@…, before the time limit) to the ranks. At a preemption Slurm itself sends them TERM.
# The ranks finish their step, save and exit with 75. The job is requeued, and continues in the same run folder with run.resume=true.

readonly MODEL_UNREADABLE=3 REQUEUE_ME=75

say() { printf '[%(%F %T)T] %s\n' -1 "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

ais_job() {
  OVERRIDES=("$@") PROBLEMS=() PARTS=() STOP=''
  DRY=${AIS_DRY_RUN:-}
  JOB=${SLURM_JOB_ID:-0}
  [ -n "${SLURM_JOB_ID:-}" ] || [ -n "$DRY" ] || die "not inside a Slurm job: submit with sbatch, or set AIS_DRY_RUN=1 to see what it would do"
  [ -r "$AIS_CONFIG" ] || die "AIS_CONFIG=$AIS_CONFIG: no such file; submit from the repository's root"
  export SLURM_EXPORT_ENV=ALL # after sbatch --export=NONE srun would start the ranks without MASTER_ADDR
  find_nodes
  find_paths
  check_model
  make_layout
  compose_commands
  if [ -n "$DRY" ]; then print_commands; return; fi
  trap 'on_signal USR1' USR1
  trap 'on_signal TERM' TERM
  trap 'record_status $?' EXIT
  make_key
  check_nodes
  run_doctor
  [ -z "$STOP" ] || requeue "$REQUEUE_ME" # stopped before it began
  start_parts
  watch_parts
}

# ---- what there is ------------------------------------------------------------------------------------------------------

find_nodes() {
  local all=() trainers=${AIS_TRAINER_NODES:-} rollouts=${AIS_ROLLOUT_NODES:-}
  GPUS=${AIS_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}} HET=''
  is_number "$GPUS" || die "AIS_GPUS_PER_NODE=$GPUS: must be a number; 0 runs on the CPU"
  for name in AIS_TRAINER_NODES AIS_ROLLOUT_NODES AIS_PORT AIS_SERVER_PORT; do
    [ -z "${!name:-}" ] || is_number "${!name}" || die "$name=${!name}: must be a number"
  done
  if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then # a heterogeneous job: its first component trains, its second generates
    [ "$SLURM_HET_SIZE" = 2 ] || die "this heterogeneous job has $SLURM_HET_SIZE components; there must be two: trainer, then rollout nodes"
    HET=1
    mapfile -t TRAINERS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0")
    mapfile -t ROLLOUTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1")
    return
  fi
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  else # a dry run outside Slurm uses invented names
    for ((i = 1; i <= ${trainers:-1} + ${rollouts:-1}; i++)); do all+=("node$i"); done
  fi
  if [ -z "$trainers" ]; then trainers=$((${#all[@]} - ${rollouts:-0})); fi
  if [ -z "$rollouts" ]; then
    rollouts=$((${#all[@]} - trainers))
    [ "$rollouts" -ge 0 ] || die "AIS_TRAINER_NODES=$trainers: the job has only ${#all[@]} nodes; submit with sbatch --nodes=N"
  fi
  [ $((trainers + rollouts)) = ${#all[@]} ] ||
    die "AIS_TRAINER_NODES=$trainers + AIS_ROLLOUT_NODES=$rollouts: the job has ${#all[@]} nodes; submit with sbatch --nodes=$((trainers + rollouts))"
  [ "$trainers" -ge 1 ] || die "AIS_TRAINER_NODES=$trainers: at least one node must train"
  TRAINERS=("${all[@]:0:trainers}") ROLLOUTS=("${all[@]:trainers}")
}

find_paths() {
  local name=${SLURM_JOB_NAME:-dry-run}
  RUN_ROOT=${AIS_RUN_ROOT:-runs}
  # In an array the folder has the parent's id, which all tasks share and a requeue keeps.
  RUN_DIR=${AIS_RUN_DIR:-$RUN_ROOT/${name%.sbatch}-${SLURM_ARRAY_JOB_ID:-$JOB}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
  CONTAINER=${AIS_CONTAINER:-} SGLANG_CONTAINER=${AIS_SGLANG_CONTAINER:-${AIS_CONTAINER:-}}
  local python=python3
  [ -n "$CONTAINER" ] && python=python
  [ -z "$CONTAINER" ] && [ -x .venv/bin/python ] && python=$PWD/.venv/bin/python
  AIS=("${AIS_PYTHON:-$python}" -m ais_megatron)
  MASTER=${AIS_MASTER_ADDR:-${TRAINERS[0]}} PORT=${AIS_PORT:-$((20000 + JOB % 10000))}
  OVERRIDES=("run.dir=$RUN_DIR" ${AIS_MODEL:+"model.path=$AIS_MODEL" "tokenizer.path=$AIS_MODEL"}
    ${AIS_SGLANG_PYTHON:+"rollout.sglang.python=$AIS_SGLANG_PYTHON"} ${AIS_SERVER_PORT:+"rollout.sglang.port=$AIS_SERVER_PORT"} "${OVERRIDES[@]}")
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then OVERRIDES+=(run.resume=true); fi
  MOUNTS=${AIS_MOUNTS:-$PWD:$PWD$(outside "${AIS_MODEL:-}")$(outside "$RUN_ROOT")$(outside "${AIS_RUN_DIR:-}")}
}

outside() { # ",PATH:PATH" if PATH is absolute and not below the repository
  case $1 in "$PWD"/*) ;; /*) printf ',%s:%s' "$1" "$1" ;; esac
}

is_number() { case $1 in '' | *[!0-9]*) return 1 ;; esac; }

# With a container AIS_MODEL may exist only inside it. Then only check_nodes, which runs on the nodes, can check it.
check_model() {
  [ -n "${AIS_MODEL:-}" ] && [ -z "$CONTAINER" ] || return 0
  local complaint
  complaint=$(bash -c "$MODEL_CHECK" model "$AIS_MODEL") && return
  [ -n "$DRY" ] || die "$complaint"
  PROBLEMS+=("$complaint")
}

# Run by bash -c with the checkpoint's folder as $1. Checks every file that loading would open.
# shellcheck disable=SC2016 # expanded by the inner shell
MODEL_CHECK='
bad() { echo "AIS_MODEL=$1: $2; give the folder of a Hugging Face checkpoint that $(hostname) can read"; exit '$MODEL_UNREADABLE'; }
[ -d "$1" ] || bad "$1" "no such folder"
[ -r "$1/config.json" ] || bad "$1" "there is no readable config.json in it"
if [ -e "$1/model.safetensors.index.json" ]; then
  [ -r "$1/model.safetensors.index.json" ] || bad "$1" "model.safetensors.index.json cannot be read"
  files=$(grep -o "\"[^\"]*\.safetensors\"" "$1/model.safetensors.index.json" | tr -d "\"" | sort -u)
else
  files=model.safetensors
fi
for file in $files; do [ -r "$1/$file" ] && [ -s "$1/$file" ] || bad "$1" "$file is missing, empty or cannot be read"; done'

# Decides which ranks and servers run where, or refuses a layout that does not fit. Uses only the configuration and the nodes, no GPU.
make_layout() {
  local lines arguments=() item
  for item in "${OVERRIDES[@]}"; do # without the model's files, a dry run uses the shape in the configuration
    case $item in model.path=* | tokenizer.path=*) [ ${#PROBLEMS[@]} = 0 ] || continue ;; esac
    arguments+=("$item")
  done
  local command=("${AIS[@]}" layout "$AIS_CONFIG" "${arguments[@]}"
    --trainer-nodes "$(joined "${TRAINERS[@]}")" --rollout-nodes "$(joined "${ROLLOUTS[@]}")" --gpus-per-node "$GPUS")
  if [ -n "$CONTAINER" ] && [ -z "$DRY" ]; then
    step 0 "${TRAINERS[0]}" 1 "$CONTAINER"
    lines=$("${STEP[@]}" "${command[@]}") || exit 2
  else
    lines=$("${command[@]}") || exit 2
  fi
  RANKS=$(awk '$1 == "trainer" { print $3; exit }' <<<"$lines")
  is_number "$RANKS" || die "the layout could not be read: $lines"
  mapfile -t SERVERS < <(awk '$1 == "server" { print $2, $3, $4 }' <<<"$lines")
  LAYOUT=$lines
}

joined() { local IFS=,; echo "$*"; }

# ---- commands -----------------------------------------------------------------------------------------------------------

# Sets STEP to the srun command for $3 tasks on the nodes $2 (comma list) in het group $1 and container $4 ("": none), with log $5 if given.
step() {
  local commas=${2//[!,]/}
  STEP=(srun --overlap "--nodes=$((${#commas} + 1))" "--ntasks=$3" "--nodelist=$2" --cpu-bind=none --unbuffered)
  [ "$GPUS" = 0 ] || STEP+=(--gpu-bind=none)
  [ -z "$HET" ] || STEP+=("--het-group=$1")
  [ -z "$4" ] || STEP+=("--container-image=$4" "--container-mounts=$MOUNTS" "--container-workdir=$PWD")
  # After a rank has failed, srun ends the others after a minute. Ranks that exit with 75 may still be writing.
  [ -z "${5:-}" ] || STEP+=(--kill-on-bad-exit=0 --wait=60 --open-mode=append "--output=$5")
  # shellcheck disable=SC2206 # words, as documented above
  STEP+=(${AIS_SRUN_ARGS:-})
}

# Sets SERVER_COMMANDS, TRAINER_COMMAND and DOCTOR_COMMANDS, quoted for a shell. A dry run prints exactly what a run evaluates.
compose_commands() {
  local server node port gpus urls=() engine=() key="rollout.sglang.key_file=$RUN_DIR/key"
  SERVER_COMMANDS=()
  for server in "${SERVERS[@]}"; do
    read -r node port gpus <<<"$server"
    step 1 "$node" 1 "$SGLANG_CONTAINER" "$RUN_DIR/logs/server-$node-$port.log"
    [ "$gpus" = - ] || STEP+=(env "CUDA_VISIBLE_DEVICES=$gpus")
    STEP+=("${AIS[@]}" serve "$AIS_CONFIG" "${OVERRIDES[@]}" rollout.sglang.host=0.0.0.0 "rollout.sglang.port=$port" "$key")
    SERVER_COMMANDS+=("$(quoted "${STEP[@]}")")
    urls+=("http://$node:$port")
  done
  [ ${#urls[@]} = 0 ] || engine=("rollout.sglang.servers=[$(joined "${urls[@]}")]" "$key")
  step 0 "$(joined "${TRAINERS[@]}")" $((${#TRAINERS[@]} * RANKS)) "$CONTAINER" "$RUN_DIR/logs/trainer-%t.log"
  STEP+=("--ntasks-per-node=$RANKS" env "MASTER_ADDR=$MASTER" "MASTER_PORT=$PORT")
  TRAINER_COMMAND=$(quoted "${STEP[@]}" "${AIS[@]}" train "$AIS_CONFIG" "${OVERRIDES[@]}" "${engine[@]}")
  # Each side is checked on all its nodes and in its own environment. The trainer's check writes its NCCL version into the run folder,
  # which all nodes share, and the servers' check compares it.
  local part=all
  [ ${#urls[@]} = 0 ] || part=trainer
  step 0 "$(joined "${TRAINERS[@]}")" ${#TRAINERS[@]} "$CONTAINER"
  STEP+=(--ntasks-per-node=1 "${AIS[@]}" doctor "$AIS_CONFIG" "${OVERRIDES[@]}" "${engine[@]}" --local-ranks "$RANKS")
  DOCTOR_COMMANDS=("$(quoted "${STEP[@]}" --part "$part" --facts "$RUN_DIR/doctor")")
  [ ${#urls[@]} -gt 0 ] || return 0
  step 1 "$(joined "${ROLLOUTS[@]}")" ${#ROLLOUTS[@]} "$SGLANG_CONTAINER"
  STEP+=(--ntasks-per-node=1 "${AIS[@]}" doctor "$AIS_CONFIG" "${OVERRIDES[@]}" rollout.sglang.host=0.0.0.0 "$key")
  DOCTOR_COMMANDS+=("$(quoted "${STEP[@]}" --part servers --facts "$RUN_DIR/doctor")")
}

quoted() { printf '%q ' "$@"; }

print_commands() {
  local i rank=0 node
  echo "run folder: $RUN_DIR"
  echo "key:        $RUN_DIR/key (made with mode 600)"
  echo
  echo "# first, what is missing: on the trainer nodes, then on the rollout nodes"
  printf '%s\n' "${DOCTOR_COMMANDS[@]}"
  for i in "${!SERVERS[@]}"; do
    read -r node port gpus <<<"${SERVERS[i]}"
    echo
    echo "# $node: server on port $port, GPUs $gpus"
    echo "${SERVER_COMMANDS[i]}"
  done
  echo
  for node in "${TRAINERS[@]}"; do
    echo "# $node: trainer ranks $rank to $((rank + RANKS - 1)) of $((${#TRAINERS[@]} * RANKS)), one task each of"
    rank=$((rank + RANKS))
  done
  echo "$TRAINER_COMMAND"
  [ ${#PROBLEMS[@]} = 0 ] || printf '\nthis job would be refused: %s\n' "${PROBLEMS[@]}" >&2
}

# ---- before the start ---------------------------------------------------------------------------------------------------

make_key() {
  mkdir -p "$RUN_DIR/logs"
  printf '%s\n' "$LAYOUT" >"$RUN_DIR/layout.tsv"
  rm -f "$RUN_DIR/exit_status"
  [ ${#SERVERS[@]} = 0 ] || [ -s "$RUN_DIR/key" ] || (umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$RUN_DIR/key")
  say "run folder $RUN_DIR; follow it with: tail -f $RUN_DIR/logs/trainer-0.log"
}

# On every node, inside its container: checks that its ports are free and that the checkpoint can be read.
check_nodes() {
  local node image group ports server pids=() pid check
  for node in "${TRAINERS[@]}" "${ROLLOUTS[@]}"; do
    ports=() image=$CONTAINER group=0 check=$PORT_CHECK
    if [ "$node" = "${TRAINERS[0]}" ]; then ports=("$PORT"); fi
    for server in "${SERVERS[@]}"; do
      [ "${server%% *}" = "$node" ] || continue
      image=$SGLANG_CONTAINER group=1 server=${server#* } ports+=("${server%% *}")
    done
    [ "$group" = 1 ] || [ -z "${AIS_MODEL:-}" ] || check="$check set -- \"\$MODEL\"; $MODEL_CHECK" # servers get their weights from the trainer
    step "$group" "$node" 1 "$image"
    "${STEP[@]}" bash -c "$check" check "${AIS_MODEL:-}" "${ports[@]}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || die "the nodes cannot be used as planned (see above); nothing was started"
  done
}

# shellcheck disable=SC2016 # expanded by the inner shell
PORT_CHECK='
MODEL=$1; shift
for port; do
  for address in 127.0.0.1 "$(hostname)"; do
    if (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; then
      echo "port $port of $(hostname) is in use: end what listens there, or choose another (AIS_PORT for the trainer, AIS_SERVER_PORT for servers)" >&2; exit 4
    fi
  done
done;'

run_doctor() {
  local command
  rm -rf "$RUN_DIR/doctor" # from an earlier start, perhaps on other nodes
  for command in "${DOCTOR_COMMANDS[@]}"; do
    eval "$command" ||
      die "$AIS_CONFIG: something that it needs is missing (see above); nothing was started"
  done
}

# ---- run, watch, end ----------------------------------------------------------------------------------------------------

start_parts() {
  local i pid
  PARTS=()
  for i in "${!SERVERS[@]}"; do
    eval "exec ${SERVER_COMMANDS[i]}" &
    pid=$!
    PARTS+=("$pid server ${SERVERS[i]}")
  done
  eval "exec $TRAINER_COMMAND" &
  TRAINER=$!
  say "started ${#SERVERS[@]} servers and $((${#TRAINERS[@]} * RANKS)) ranks on ${#TRAINERS[@]} trainer nodes"
}

on_signal() {
  STOP=$1
  say "signal $1: the ranks finish their step, save, and the job is requeued"
  [ -z "${TRAINER:-}" ] || kill -USR1 "$TRAINER" 2>/dev/null || true # srun passes it on to every rank
}

# Waits until the first part ends, which decides how the job ends. Polls once a second, because in older shells wait -n does not tell
# which process ended.
watch_parts() {
  local part pid status
  while :; do
    if ! kill -0 "$TRAINER" 2>/dev/null; then part=trainer pid=$TRAINER; break; fi
    for part in "${PARTS[@]}"; do
      pid=${part%% *}
      kill -0 "$pid" 2>/dev/null && continue
      being_preempted || break 2
      PARTS=() # all servers got TERM, like the ranks; let the ranks finish what they can
      break
    done
    sleep 1 &
    wait $! || true # a signal ends the wait, and its handler runs
  done
  status=0
  wait "$pid" || status=$?
  if [ "$part" = trainer ] && [ "$status" = 0 ]; then say "finished: $RUN_DIR"; end_parts; exit 0; fi
  if [ "$part" = trainer ] && [ "$status" = "$REQUEUE_ME" ] || [ -n "$STOP" ] || being_preempted; then requeue "$status"; fi
  [ "$part" = trainer ] || part=${part#* }
  say "$part ended with status $status; ending everything else"
  show_logs
  end_parts
  [ "$status" != 0 ] || status=1 # a server that ends by itself is a failure, even with status 0
  exit "$status"
}

# A preemption sends TERM only to the job's steps, so this script has to ask Slurm.
being_preempted() { scontrol -o show job "$JOB" 2>/dev/null | grep -q 'PreemptTime=[0-9]'; }

# The trainer has saved (75), or the same signal ended it earlier. Then the newest checkpoint is older.
requeue() {
  local status=$1 state
  state=$(squeue -h -j "$JOB" -o %T | head -n 1)
  [ "$status" = "$REQUEUE_ME" ] || say "the trainer ended with status $status before it could save; the newest checkpoint will do"
  end_parts
  if [ "$state" != RUNNING ]; then say "the job is ${state:-gone}: not requeued; AIS_RUN_DIR=$RUN_DIR with run.resume=true continues it"; exit "$status"; fi
  [ "${SLURM_RESTART_COUNT:-0}" -lt "${AIS_MAX_RESTARTS:-100}" ] || die "requeued ${SLURM_RESTART_COUNT} times already (AIS_MAX_RESTARTS); not again"
  say "requeueing; it will continue in $RUN_DIR"
  scontrol requeue "$JOB" || die "Slurm refuses the requeue; AIS_RUN_DIR=$RUN_DIR with run.resume=true continues it in a new job"
  trap '' TERM USR1
  sleep 300 # Slurm ends this script
  exit "$status"
}

end_parts() {
  local part pid
  for part in "${PARTS[@]}" "${TRAINER:-}"; do
    pid=${part%% *}
    [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || true
  done
  for _ in {1..20}; do
    [ -n "$(jobs -pr)" ] || return 0
    sleep 0.5
  done # whatever is left ends with this script, because Slurm kills the steps of a job with it
}

show_logs() {
  local log
  for log in "$RUN_DIR"/logs/trainer-0.log "$RUN_DIR"/logs/server-*.log; do
    [ -s "$log" ] || continue
    echo "--- end of $log" >&2
    tail -n 15 "$log" >&2
  done
}

record_status() { echo "$1" >"$RUN_DIR/exit_status" 2>/dev/null || true; }
