#!/usr/bin/env bash
# Runs the head node of a cluster in the foreground, until SIGTERM (systemd, Slurm and containers send it) or Ctrl-C.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'END'
usage: head.sh [options] [-- arguments of ray start]
  --port PORT          that nodes and clients join (default: 6379)
  --dashboard PORT     on localhost: look at it through ssh -L (default: 8265)
  --client-port PORT   of the Ray Client proxy, which `ray start` cannot leave out: keep it behind the firewall
                       (default: 10001)
END
    show_common_options
}

port=6379
dashboard=8265
client_port=10001
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage && exit ;;
        --port | --dashboard | --client-port)
            [[ $# -ge 2 ]] || die "$1 needs a value"
            case $1 in
                --port) port=$2 ;;
                --dashboard) dashboard=$2 ;;
                *) client_port=$2 ;;
            esac
            shift 2
            ;;
        --) shift && break ;;
        *)
            take_common_option "$@"
            [[ $taken -gt 0 ]] || die "unknown option '$1' (see head.sh --help)"
            shift "$taken"
            ;;
    esac
done

# shellcheck disable=SC2034 # common.sh reads it
ports=("$port" "$dashboard" "$client_port")
become_ray --head --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
    --ray-client-server-port "$client_port" "$@"
