#!/usr/bin/env bash
# Writes a new random token to FILE, mode 0600. Copy it to every node and client: it is the key to the cluster.
set -euo pipefail
if [[ $# -ne 1 || $1 == -* ]]; then
    echo "usage: make-token.sh FILE" >&2
    exit 2
fi
if [[ -e $1 ]]; then
    echo "make-token.sh: $1 exists; a running cluster may need it: remove it first if none does" >&2
    exit 1
fi
umask 077
mkdir -p "$(dirname "$1")"
partial=$(mktemp "$1.XXXXXX")
trap 'rm -f "$partial"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$partial"
mv -n "$partial" "$1"
