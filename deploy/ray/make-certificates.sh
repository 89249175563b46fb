#!/usr/bin/env bash
# Writes a node's certificate for TLS to DIRECTORY/NAME: ca.crt, node.crt, node.key; and, at the first call, makes the
# authority that signs them all, DIRECTORY/ca. Copy DIRECTORY/NAME to that node; DIRECTORY/ca/ca.key stays where it is.
set -euo pipefail

usage() {
    cat <<'END'
usage: make-certificates.sh DIRECTORY NAME [NAME ...]
  NAME  an address or host name under which the others reach the node; the first one names its folder
  DAYS  (environment) until the certificates end; default 365
END
}

if [[ $# -ge 1 && ($1 == -h || $1 == --help) ]]; then
    usage
    exit
fi
if [[ $# -lt 2 || $1 == -* ]]; then
    usage >&2
    exit 2
fi
directory=$1
shift
days=${DAYS:-365}
names=DNS:localhost,IP:127.0.0.1
for name in "$@"; do
    if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then
        names+=,IP:$name
    elif [[ $name =~ ^[A-Za-z0-9.-]+$ ]]; then
        names+=,DNS:$name
    else
        echo "make-certificates.sh: '$name' is neither an address nor a host name" >&2
        exit 2
    fi
done

key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
umask 077
mkdir -p "$directory/ca"
if [[ ! -e $directory/ca/ca.crt ]]; then
    openssl req -x509 "${key[@]}" -days "$days" -subj "/CN=dinov3-ray cluster" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$directory/ca/ca.key" -out "$directory/ca/ca.crt" 2>/dev/null
fi

partial=$(mktemp -d "$directory/.new.XXXXXX")
trap 'rm -rf "$partial"' EXIT
openssl req "${key[@]}" -subj "/CN=$1" -keyout "$partial/node.key" -out "$partial/node.csr" 2>/dev/null
# Every node is a server to some and a client of others.
openssl x509 -req -in "$partial/node.csr" -days "$days" -CA "$directory/ca/ca.crt" -CAkey "$directory/ca/ca.key" \
    -CAcreateserial -out "$partial/node.crt" -extfile <(
        echo "subjectAltName=$names"
        echo "extendedKeyUsage=serverAuth,clientAuth"
    ) 2>/dev/null
rm "$partial/node.csr"
cp "$directory/ca/ca.crt" "$partial/ca.crt"
if [[ -e $directory/$1 ]]; then
    rm -r "${directory:?}/$1"
fi
mv "$partial" "$directory/$1"
