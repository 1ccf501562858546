#!/usr/bin/env bash
# docker/certificates.sh FOLDER NAME...: what the server side needs to be known and trusted.
#   ca.crt, ca.key          a certificate authority of your own; ca.crt goes to every device, ca.key to nobody
#   server.crt, server.key  the server's certificate, for the names (DNS or IP) under which devices reach it
#   superexec.secret        what the ServerApp's process shows to the SuperLink
# An authority that is there already is kept, so that the server's certificate can be renewed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
folder=$1
shift
mkdir -p "$folder"
umask 077
names=DNS:superlink,DNS:localhost,IP:127.0.0.1
for name in "$@"; do
  if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then names+=,IP:$name; else names+=,DNS:$name; fi
done
cd "$folder"
if [ ! -f ca.crt ]; then
  openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj "/CN=framp-ca" -keyout ca.key -out ca.crt \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
fi
openssl req -newkey rsa:3072 -nodes -subj "/CN=framp-server" -keyout server.key -out server.csr 2>/dev/null
printf '%s\n' "subjectAltName=$names" "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
  "extendedKeyUsage=serverAuth" "subjectKeyIdentifier=hash" "authorityKeyIdentifier=keyid" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile server.ext \
  -out server.crt 2>/dev/null
rm server.csr server.ext
[ -f superexec.secret ] || openssl rand -hex 32 > superexec.secret
chmod 644 ca.crt server.crt
echo "$PWD: certificate for $names, valid for 365 days"
