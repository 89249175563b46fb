#!/usr/bin/env bash
# Runs a node that joins a head node, in the foreground, until SIGTERM or Ctrl-C, or until the head is gone.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: worker.sh --head HOST:PORT [options] [-- arguments of ray start]
  --head HOST:PORT     of the head node
END
    show_common_options
}

head=
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage && exit ;;
        --head)
            [[ $# -ge 2 ]] || die "$1 needs a value"
            head=$2
            shift 2
            ;;
        --) shift && break ;;
        *)
            take_common_option "$@"
            [[ $taken -gt 0 ]] || die "unknown option '$1' (see worker.sh --help)"
            shift "$taken"
            ;;
    esac
done
[[ $head =~ ^\[.+\]:[0-9]+$ || $head =~ ^[^:]+:[0-9]+$ ]] ||
    die "--head must be HOST:PORT of the head node, with an IPv6 address in brackets ([fd00::1]:6379); got '$head'"

become_ray --address "$head" "$@"
