#!/usr/bin/env bash
# A real SLURM on this machine alone, from Debian's packages, with two pretended nodes and no accounting. Needs root.
#
#     bash one_machine_slurm.sh FOLDER         starts it; the programs then need SLURM_CONF=FOLDER/slurm.conf
#     bash one_machine_slurm.sh FOLDER stop    ends what it started
#
# The partition `low` is preempted by `high` after 2 seconds' grace; `main` is the default.
set -euo pipefail
FOLDER=$1
HOST=$(hostname -s)
NODES="node1 node2"
export SLURM_CONF="$FOLDER/slurm.conf"

if [ "${2:-start}" = stop ]; then
  for pid in "$FOLDER"/*.pid; do
    [ ! -f "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true
  done
  exit 0
fi

mkdir -p "$FOLDER/state" "$FOLDER/munge"
chmod 755 "$FOLDER" && chmod 700 "$FOLDER/munge"
head -c 1024 /dev/urandom >"$FOLDER/munge/key" && chmod 400 "$FOLDER/munge/key"
munged --force --key-file "$FOLDER/munge/key" --socket "$FOLDER/munge/socket" --pid-file "$FOLDER/munged.pid" \
  --log-file "$FOLDER/munge/log" --seed-file "$FOLDER/munge/seed"
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthInfo=socket=$FOLDER/munge/socket
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=1
MinJobAge=3600
CONF
port=16818
for node in $NODES; do
  echo "NodeName=$node NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((port++)) CPUs=4 RealMemory=8000" >>"$SLURM_CONF"
  grep -q "[[:space:]]$node\$" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts # rank 0 listens under this name
done
cat >>"$SLURM_CONF" <<CONF
PartitionName=main Nodes=ALL Default=YES PriorityTier=10
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=2
PartitionName=high Nodes=ALL PriorityTier=100 PreemptMode=OFF
CONF
slurmctld
for node in $NODES; do slurmd -N "$node"; done
for _ in $(seq 60); do
  [ "$(sinfo --noheader --Node --partition main --state idle | wc -l)" != 2 ] || exit 0
  sleep 0.5
done
echo "SLURM did not start:" >&2 && tail -n 5 "$FOLDER"/*.log >&2
exit 1
