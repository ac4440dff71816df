#!/usr/bin/env bash
# A real Slurm on this machine, for the tests: munged, slurmctld and one slurmd per pretended node (node1 … nodeN, each with
# its own host name and eight pretended H100s; no cgroups, no accounting). Needs root and Debian's packages, which it installs.
#   tests/slurm/cluster.sh start [NODES]     does nothing where it runs already
#   tests/slurm/cluster.sh stop              ends what start started, jobs first, and removes the configuration
# A requeued job starts again as soon as its credential has expired: 5 s here, 2 minutes by default.
# It refuses to touch a machine that has a Slurm configuration of its own.
set -euo pipefail

STATE=/var/lib/ais-megatron-slurm ETC=/etc/slurm MARK='# pretended cluster of ais_megatron' GPUS=8 CPUS=224 MEMORY=2000000

install_packages() {
  local missing=() program
  for program in slurmctld slurmd munge shellcheck; do command -v "$program" >/dev/null || missing+=("$program"); done
  command -v sbatch >/dev/null || missing+=(slurm-client)
  [ ${#missing[@]} -gt 0 ] || return 0
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$STATE/apt.log" 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$STATE/apt.log" 2>&1 ||
    { tail -n 20 "$STATE/apt.log" >&2; echo "Slurm could not be installed" >&2; exit 1; }
}

# Nodes differ by their name (a UTS namespace each) and by their address within 127/8; where namespaces are not allowed, by port.
write_configuration() {
  local i host
  sed "/$MARK\$/d" /etc/hosts >"$STATE/hosts"
  for ((i = 1; i <= NODES; i++)); do echo "127.0.1.$((10 + i)) node$i $MARK"; done >>"$STATE/hosts"
  cat "$STATE/hosts" >/etc/hosts # in place: containers mount it
  mkdir -p "$STATE"/{pid,log,spool,state,tmp,dev} "$ETC"
  for ((i = 0; i < GPUS; i++)); do # slurmd insists on a file per GPU
    [ -e "$STATE/dev/gpu$i" ] || mknod "$STATE/dev/gpu$i" c 1 3 2>/dev/null || : >"$STATE/dev/gpu$i"
  done
  {
    cat <<END
$MARK
ClusterName=pretended
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,bf_hetjob_immediate,requeue_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
GresTypes=gpu
TmpFS=$STATE/tmp/%n
StateSaveLocation=$STATE/state
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/pid/slurmctld
SlurmdPidFile=$STATE/pid/slurmd.%n
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd.%n.log
END
    for ((i = 1; i <= NODES; i++)); do
      host=node$i
      [ -n "$NAMESPACES" ] || host=$(hostname -s)
      echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.1.$((10 + i)) Port=$((17000 + i)) CPUs=$CPUS Boards=1 SocketsPerBoard=2" \
        "CoresPerSocket=$((CPUS / 2)) ThreadsPerCore=1 RealMemory=$MEMORY Gres=gpu:h100:$GPUS State=UNKNOWN"
      mkdir -p "$STATE/spool/node$i" "$STATE/tmp/node$i"
    done
    echo "PartitionName=batch Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=OFF"
    echo "PartitionName=preempt Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
  } >"$ETC/slurm.conf"
  printf '%s\n' "$MARK" "NodeName=node[1-$NODES] Name=gpu Type=h100 File=$STATE/dev/gpu[0-$((GPUS - 1))]" >"$ETC/gres.conf"
  printf '%s\n' "$MARK" CgroupPlugin=cgroup/v1 CgroupAutomount=no >"$ETC/cgroup.conf" # else slurmd ends where no cgroup is mounted
}

start_munge() {
  munge -n </dev/null >/dev/null 2>&1 && return
  install -d -o munge -g munge -m 755 /run/munge
  install -d -o munge -g munge -m 700 /etc/munge /var/log/munge
  install -d -o munge -g munge -m 711 /var/lib/munge
  [ -s /etc/munge/munge.key ] || (umask 077 && head -c 128 /dev/urandom >/etc/munge/munge.key && chown munge:munge /etc/munge/munge.key)
  setpriv --reuid=munge --regid=munge --clear-groups munged
  cp /run/munge/munged.pid "$STATE/pid/munged"
}

nodes_up() { { sinfo -h -N -p batch -o '%N %t' 2>/dev/null || true; } | awk '$2 ~ /^(idle|mix|alloc)/' | wc -l; }

start() {
  NODES=${1:-4} NAMESPACES=yes
  [ "$(id -u)" = 0 ] || { echo "must run as root: slurmd does" >&2; exit 1; }
  if [ -e "$ETC/slurm.conf" ] && [ "$(nodes_up)" = "$NODES" ] && grep -q "^$MARK" "$ETC/slurm.conf"; then return; fi
  if [ -e "$ETC/slurm.conf" ] && ! grep -q "^$MARK" "$ETC/slurm.conf"; then
    echo "$ETC/slurm.conf is not ours: a cluster is configured on this machine, and it is left alone" >&2; exit 1
  fi
  mkdir -p "$STATE/pid"
  unshare --uts true 2>/dev/null || NAMESPACES=''
  install_packages
  write_configuration
  start_munge
  rm -rf "${STATE:?}"/state/*
  slurmctld -c # -c: no jobs of an earlier start
  local i
  for ((i = 1; i <= NODES; i++)); do
    if [ -n "$NAMESPACES" ]; then unshare --uts sh -c "hostname node$i && exec slurmd -N node$i"; else slurmd -N "node$i"; fi
  done
  for i in {1..300}; do [ "$(nodes_up)" = "$NODES" ] && return; sleep 0.1; done
  tail -n 20 "$STATE"/log/*.log >&2
  echo "the nodes did not come up" >&2
  exit 1
}

stop() {
  [ -d "$STATE/pid" ] || return 0
  scancel --state=PENDING -u root 2>/dev/null || true
  timeout 5 scancel -u root 2>/dev/null || true
  for _ in {1..100}; do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 0.1; done
  local file pid
  for file in "$STATE"/pid/slurmd.* "$STATE/pid/slurmctld" "$STATE/pid/munged"; do
    [ -s "$file" ] || continue
    pid=$(<"$file")
    case $(cat "/proc/$pid/comm" 2>/dev/null) in slurmd | slurmctld | munged) kill "$pid" 2>/dev/null || true ;; esac
  done
  for file in slurm.conf gres.conf cgroup.conf; do ! grep -qs "^$MARK" "$ETC/$file" || rm "$ETC/$file"; done
  sed "/$MARK\$/d" /etc/hosts >"$STATE/hosts" && cat "$STATE/hosts" >/etc/hosts
  sleep 1
  rm -rf "$STATE"
}

case ${1:-} in start | stop) "$@" ;; *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
