"""A stand-in for SLURM on this machine: sbatch, srun, scontrol, sacct as submitit and fairseq call them.

One job at a time, with the environment that SLURM gives its tasks. `scontrol requeue` runs the job's script again once
its tasks have ended, under the same number, as SLURM does.
"""

import os
from pathlib import Path

SBATCH = """
cp "$1" "$STAND_IN/script"
option() { sed -n "s/^#SBATCH --$1=//p" "$STAND_IN/script"; }
nodes=$(option nodes) per_node=$(option ntasks-per-node)
export SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=$nodes SLURM_NNODES=$nodes SLURM_NTASKS=$((nodes * per_node))
export SLURM_NTASKS_PER_NODE=$per_node SLURM_JOB_NODELIST=localhost
( while true; do
    rm -f "$STAND_IN/requeued"
    bash "$STAND_IN/script"
    [ -f "$STAND_IN/requeued" ] || break
  done; touch "$STAND_IN/ended" ) </dev/null >"$STAND_IN/log" 2>&1 &
echo "Submitted batch job 7"
"""
SRUN = """
while [[ "$1" == --* ]]; do
  case "$1" in --output) out=$2; shift 2 ;; --error) shift 2 ;; *) shift ;; esac
done
for ((p = 0; p < SLURM_NTASKS; p++)); do
  to=${out//%j/$SLURM_JOB_ID}
  SLURM_PROCID=$p SLURM_LOCALID=$p SLURM_NODEID=0 SLURM_STEP_NODELIST=localhost "$@" >>"${to//%t/$p}" 2>&1 &
  echo $! >"$STAND_IN/task$p"
done
wait
"""
SCONTROL = """
case "$1" in
  requeue) touch "$STAND_IN/requeued"; echo "$2" >>"$STAND_IN/requeues" ;;
  show) echo "$3" ;;
esac
"""
SACCT = """
printf 'JobID|State|NodeList\\n7|%s|localhost\\n' "$([ -f "$STAND_IN/ended" ] && echo FAILED || echo RUNNING)"
"""


def install(folder: Path) -> dict[str, str]:
    """Write the programs to `folder`; the environment variables that put them in place."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT}.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text.lstrip()}")
        (programs / name).chmod(0o755)
    return {"STAND_IN": str(folder), "PATH": f"{programs}:{os.environ['PATH']}"}
