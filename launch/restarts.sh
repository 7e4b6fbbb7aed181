# shellcheck shell=bash
# make_key: a key of this run's own, by environment alone: ranks ignore what a stranger writes to their store.
make_key() { export MMR1_DS_RUN_KEY="${MMR1_DS_RUN_KEY:-$(head -c 32 /dev/urandom | base64 | tr -d '/+=\n')}"; }
# may_restart STATUS PYTHON SETTING ...: whether a run that ended so is started again, from its last checkpoint. Not one
# that is done (0), that a user's mistake ended (2), or that was told to end (75, 130, 143); the others are counted in
# the run directory, up to trainer.max_restarts without progress.
may_restart() {
  local status="$1" interpreter="$2"
  shift 2
  case "$status" in 0 | 2 | 75 | 129 | 130 | 143) return 1 ;; esac
  "$interpreter" -m mmr1_ds.cluster.restart "$@"
}
