# shellcheck shell=bash
# may_restart STATUS PYTHON SETTING ...: whether a run that ended so is started again, from its last checkpoint. Not one
# that is done (0), that a user's mistake ended (2), or that was told to end (75, 130, 143); the others are counted in
# the run directory, up to trainer.max_restarts without progress.
may_restart() {
  local status="$1" python="$2"
  shift 2
  case "$status" in 0 | 2 | 75 | 129 | 130 | 143) return 1 ;; esac
  "$python" -m mmr1_ds.cluster.restart "$@"
}
