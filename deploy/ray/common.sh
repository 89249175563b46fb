# What head.sh and worker.sh share: their options, the token, TLS, and the ports. Sourced, not run.
# shellcheck shell=bash

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

show_common_options() {
    cat <<'END'
  --ip ADDRESS         of this node, as the others reach it (default: what Ray finds)
  --token FILE         with the cluster's token, mode 0600 (default: $RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token)
  --object-store SIZE  shared memory for images and features in flight, such as 8G (default: 30% of the memory)
  --cpus N             CPUs that Ray may plan with (default: those that this process may use)
  --gpus N             GPUs, likewise
  --label KEY=VALUE    that a pool's label_selector may ask for; may be repeated
  --resources JSON     further resources, such as {"scratch": 1}
  --tls DIRECTORY      encrypt: it holds ca.crt, node.crt and node.key (make-certificates.sh)
  --metrics-port PORT  that Prometheus scrapes (default: 8090)
  --ports-from PORT    the first of five that nodes talk through (default: 6380)
  --worker-ports A-B   that worker processes listen on (default: 20000-20999)
  --temp-dir DIRECTORY logs and sockets (default: /tmp/ray)
  -- ARGUMENTS         are passed on to `ray start`
END
}

token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
metrics_port=8090
ports_from=6380
worker_ports=20000-20999
tls=
cpus=
labels=
arguments=()
ports=() # that one of the scripts needs, beside those above

# Reads one option off "$@"; says in `taken` how many words that were: 0 if it is none of these.
# shellcheck disable=SC2034 # the scripts that source this read `taken`
take_common_option() {
    taken=2
    case $1 in
        --ip | --token | --object-store | --cpus | --gpus | --label | --resources | --tls | --metrics-port | \
            --ports-from | --worker-ports | --temp-dir)
            [[ $# -ge 2 ]] || die "$1 needs a value"
            ;;
    esac
    case $1 in
        --ip) arguments+=(--node-ip-address "$2") ;;
        --token) token=$2 ;;
        --object-store)
            local bytes
            bytes=$(numfmt --from=iec -- "${2%B}" 2>/dev/null) ||
                die "--object-store must be a size such as 8G; got '$2'"
            arguments+=(--object-store-memory "$bytes")
            ;;
        --cpus) cpus=$2 ;;
        --gpus) arguments+=(--num-gpus "$2") ;;
        --label) labels+=${labels:+,}$2 ;;
        --resources) arguments+=(--resources "$2") ;;
        --tls) tls=$2 ;;
        --metrics-port) metrics_port=$2 ;;
        --ports-from) ports_from=$2 ;;
        --worker-ports) worker_ports=$2 ;;
        --temp-dir) arguments+=(--temp-dir "$2") ;;
        *) taken=0 ;;
    esac
}

# The token comes from a file that nobody else can read; one in the environment would show in /proc and win over it.
use_token() {
    [[ -s $token ]] || die "there is no token in $token: make one with make-token.sh, and copy it to every node"
    [[ -r $token ]] || die "$token cannot be read by $(id -un), who runs this: it must be that user's own"
    local mode
    mode=$(stat -Lc %a "$token")
    [[ $mode == 600 || $mode == 400 ]] || die "$token may be read by others (mode $mode): chmod 600 $token"
    unset RAY_AUTH_TOKEN
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
}

use_tls() {
    if [[ -z $tls ]]; then
        export RAY_USE_TLS=0
        return
    fi
    local file
    for file in ca.crt node.crt node.key; do
        [[ -r $tls/$file ]] || die "--tls: $tls/$file is missing: make it with make-certificates.sh"
    done
    export RAY_USE_TLS=1
    export RAY_TLS_CA_CERT=$tls/ca.crt RAY_TLS_SERVER_CERT=$tls/node.crt RAY_TLS_SERVER_KEY=$tls/node.key
}

# Ray's own words for a port in use are a traceback about something else, or none at all.
require_free() {
    local port
    for port in "$@"; do
        [[ $port =~ ^[0-9]+$ ]] || die "a port must be a number; got '$port'"
        # The kernel's list of sockets; 0A are those that listen.
        if grep -Eqs "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$port") [0-9A-F]+:[0-9A-F]+ 0A " /proc/net/tcp /proc/net/tcp6; then
            die "port $port is in use, perhaps by another node on this machine: end that, or choose other ports (--help)"
        fi
    done
}

# Becomes Ray: this process's number is then that of `ray start`, which ends with all that it started on SIGTERM, and
# whose processes the kernel ends should it be killed.
become_ray() {
    use_token
    use_tls
    export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
    # Milliseconds; with Ray's own 1000 a busy pool holds another second of results (dinov3_ray/pool/cluster.py).
    export RAY_free_objects_period_milliseconds=${RAY_free_objects_period_milliseconds:-100}
    # Seconds; Ray's own 30 are not enough on a machine that is busy, and the node would not come up.
    export RAY_raylet_start_wait_time_s=${RAY_raylet_start_wait_time_s:-180}
    [[ $worker_ports =~ ^[0-9]+-[0-9]+$ ]] ||
        die "--worker-ports must be a range such as 20000-20999; got '$worker_ports'"
    [[ $ports_from =~ ^[0-9]+$ ]] || die "--ports-from must be a port; got '$ports_from'"
    require_free "${ports[@]}" "$metrics_port" $((ports_from)) $((ports_from + 1)) $((ports_from + 2)) \
        $((ports_from + 3)) $((ports_from + 4))
    # Ray's own count is of the machine or container, whatever taskset, Slurm or systemd allow.
    if [[ -z $cpus ]] && ! cpus=$("${PYTHON:-python3}" -m dinov3_ray.machine.cpus 2>/dev/null); then
        echo "${0##*/}: ${PYTHON:-python3} (set PYTHON) has no dinov3_ray to count this process's CPUs: Ray counts" >&2
    fi
    [[ -z $cpus ]] || arguments+=(--num-cpus "$cpus")
    [[ -z $labels ]] || arguments+=(--labels "$labels")
    exec "${RAY:-ray}" start --block \
        --node-manager-port "$ports_from" --object-manager-port "$((ports_from + 1))" \
        --runtime-env-agent-port "$((ports_from + 2))" --dashboard-agent-grpc-port "$((ports_from + 3))" \
        --dashboard-agent-listen-port "$((ports_from + 4))" \
        --min-worker-port "${worker_ports%-*}" --max-worker-port "${worker_ports#*-}" \
        --metrics-export-port "$metrics_port" "${arguments[@]}" "$@"
}
